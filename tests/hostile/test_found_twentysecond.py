"""What the twenty-second hunt found."""

import json
import os
from copy import deepcopy
from stat import S_IMODE

import pytest
import torch
from conftest import CONFIGS, refused, save_tiny_model, small_tokenizer
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import rotlib as rl
from rotlib.disk import write_text
from rotlib.models.gguf_tokenizer import cut_of
from rotlib.models.zoo import load_tokenizer
from rotlib.study import peers


def edited(**settings: object) -> PreTrainedTokenizerFast:
    description = json.loads(small_tokenizer().backend_tokenizer.to_str())
    description["model"] |= settings
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(description)))


def some_merges() -> list:
    return json.loads(small_tokenizer().backend_tokenizer.to_str())["model"]["merges"][:20]


@pytest.mark.parametrize(
    "settings",
    [{"end_of_word_suffix": "</w>"}, {"ignore_merges": True, "merges": some_merges()}],
    ids=lambda settings: next(iter(settings)),
)
def test_a_tokenizer_that_merges_otherwise_than_its_file_would_is_refused(settings):
    with refused("this tokenizer makes other tokens of .* than llama.cpp would"):
        cut_of(edited(**settings))


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_an_added_token_that_takes_its_surroundings_is_refused(flag):
    description = json.loads(small_tokenizer().backend_tokenizer.to_str())
    description["added_tokens"][-1][flag] = True
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description))
    )
    with refused("this tokenizer makes other tokens of .* than llama.cpp would"):
        cut_of(tokenizer)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A GGUF file's tokenizer as it was, with tokens of its own, and the file."""
    monkeypatch.setenv("ROTLIB_CACHE", str(tmp_path / "cache"))
    tokenizer = deepcopy(small_tokenizer())
    tokenizer.add_tokens(["first maps", "ab\tcd", "<a b>", "zebra"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<| x y |>"]})
    config = deepcopy(CONFIGS["llama"])
    config.vocab_size = len(tokenizer) + 3
    config.hidden_size, config.intermediate_size, config.head_dim = 96, 64, 16
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    rl.rtn(model, rl.WeightQuant(group_size=32))
    return tokenizer, rl.export(model, tmp_path / "out", "gguf", tokenizer) / "model.gguf"


def test_added_tokens_with_spaces_are_read_back(written):
    tokenizer, file = written
    text = "The first maps seen<a b>by ab\tcd and zebra<| x y |>zebras"
    assert load_tokenizer(str(file))(text).input_ids == tokenizer(text).input_ids


@pytest.mark.parametrize("mode", [0o700, 0o2770])
def test_an_export_keeps_the_permissions_of_the_folder_that_it_fills(mode, model, tmp_path):
    rl.rtn(model, rl.WeightQuant(group_size=16))
    folder = tmp_path / "out"
    folder.mkdir()
    folder.chmod(mode)
    for _ in range(2):  # an empty one, then an export
        rl.export(model, folder, overwrite=True)
        assert S_IMODE(folder.stat().st_mode) == mode


def test_a_pipe_is_not_replaced_by_what_peers_find(folder, capsys):
    os.mkfifo(folder / "out.json")
    arguments = ["--out", str(folder / "out.json"), "--environments", str(folder / "env")]
    with pytest.raises(SystemExit):
        peers.main([*arguments, "--model", str(folder / "model"), "--window", "64"])
    assert "--out must name a file" in capsys.readouterr().err
    assert (folder / "out.json").is_fifo()


def test_no_file_that_is_written_whole_replaces_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with refused("pipe is there, and is no file"):
        write_text(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo()


def test_an_index_cut_short_is_named(tmp_path):
    save_tiny_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ')
    with refused("its model.safetensors.index.json is not a valid JSON file"):
        rl.load(str(tmp_path))


def test_why_a_file_of_settings_is_not_valid_is_said(tmp_path):
    save_tiny_model(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text(), encoding="utf-8-sig")
    with refused(r"its config.json is not a valid JSON file of settings by name \(.*BOM"):
        rl.load(str(tmp_path))


def test_control_characters_of_a_name_do_not_reach_the_terminal():
    with pytest.raises(ValueError, match="unknown model") as error:
        rl.load("\x1b[31mevil\nmodel")
    assert str(error.value).isprintable()


def test_a_rotation_is_not_written_over_an_empty_file_of_another(tmp_path):
    (tmp_path / "R.bin").touch()
    with refused("is there, and holds no rotation: name another file"):
        rl.save_rotation(rl.Rotation(torch.eye(48, dtype=torch.float64), None), tmp_path / "R.bin")
