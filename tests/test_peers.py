"""The bench of other tools, with a peer that rounds to nearest and needs nothing installed."""

import json
import sys
from pathlib import Path

import pytest
from conftest import save_tiny_model

from rotlib.study import peers

ROUNDS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
assert torch.load(sys.argv[2]).shape == (16, 64) and sys.argv[4:] == ["4", "0"]
for parameter in model.parameters():
    parameter.data = (parameter.data * 256).round() / 256
model.save_pretrained(sys.argv[3])
print(json.dumps({"seconds": 1.5, "peak_memory_mb": 7}))
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    save_tiny_model(tmp_path / "model", "llama, tied")
    monkeypatch.setenv("ROTLIB_RESULTS", str(tmp_path / "results"))
    where = ["--environments", str(tmp_path / "environments"), "--out", str(tmp_path / "out.json")]
    return [*where, "--model", str(tmp_path / "model"), "--window", "64", "--qualities"]


def line_of(command, tmp_path, monkeypatch, program):
    (tmp_path / "peer.py").write_text(program)
    monkeypatch.setitem(peers.PEERS, "rounds", peers.Peer((), str(tmp_path / "peer.py")))
    monkeypatch.setattr(peers, "_environment", lambda *_: sys.executable)
    peers.main([*command, "--peers", "rounds"])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["threads"] >= 1
    return found["lines"][0]


def test_a_peers_checkpoint_is_measured_as_ones_own(command, tmp_path, monkeypatch):
    line = line_of(command, tmp_path, monkeypatch, ROUNDS)
    assert line["seconds"] == 1.5
    assert 0 < line["kl"] < 1
    assert line["perplexity"] > 1


def test_a_peer_that_fails_is_a_line_that_says_why(command, tmp_path, monkeypatch):
    line = line_of(command, tmp_path, monkeypatch, "raise SystemExit('no such driver')")
    assert "no such driver" in line["error"]


def test_a_peer_that_says_nothing_is_a_line_as_well(command, tmp_path, monkeypatch):
    line = line_of(command, tmp_path, monkeypatch, "pass")
    assert "made" in line["error"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--peers", "gptq"], "invalid choice: 'gptq'"),
        (["--bits", "1"], "bits must be a whole number from 2 to 8"),
        (["--model", "no/where"], "no/where"),
    ],
)
def test_a_mistyped_option_is_refused_at_once(command, options, message, capsys):
    with pytest.raises(SystemExit):
        peers.main([*command, *options])
    assert message in capsys.readouterr().err
    assert not Path(command[3]).exists()


@pytest.mark.parametrize("held", ['{"recipe": {"bits": 3}, "threads": 64, "lines": []}', "[]", "é"])
def test_a_file_of_something_else_is_not_replaced(command, held, capsys):
    Path(command[3]).write_text(held, encoding="utf-16" if held == "é" else "utf-8")
    before = Path(command[3]).read_bytes()
    with pytest.raises(SystemExit):
        peers.main([*command, "--peers"])
    assert "holds something else than a bench of this recipe" in capsys.readouterr().err
    assert Path(command[3]).read_bytes() == before
