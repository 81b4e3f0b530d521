"""What the twenty-second and the twenty-third hunt found."""

import json
import os
from copy import deepcopy
from shutil import rmtree
from stat import S_IMODE

import pytest
import torch
from conftest import CONFIGS, refused, save_tiny_model, small_tokenizer
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import rotlib as rl
from rotlib.disk import cache_folder, write_text
from rotlib.models.gguf_model import unpacked_gguf
from rotlib.models.gguf_tokenizer import cut_of
from rotlib.models.zoo import load_tokenizer
from rotlib.study import peers
from rotlib.study.files import local_path


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
    with pytest.raises(FileExistsError, match="pipe is there, and is no file"):
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


@pytest.mark.parametrize("ends", ["<|endoftext|> $A", "<|im_start|> <|im_start|> $A"])
def test_what_a_tokenizer_puts_around_a_text_is_in_the_file_or_refused(ends):
    tokenizer = deepcopy(small_tokenizer())
    numbers = [(name, tokenizer.convert_tokens_to_ids(name)) for name in set(ends.split()[:-1])]
    template = TemplateProcessing(single=ends, special_tokens=numbers)
    tokenizer.backend_tokenizer.post_processor = template
    with refused("this tokenizer puts .* around a text"):
        cut_of(tokenizer)


def test_sinks_are_not_looked_for_among_padding_or_behind_another_sequence(model, tokens):
    length = tokens.shape[1]
    mask, row = torch.ones_like(tokens), torch.arange(length)
    mask[0, :3] = 0
    with rl.quantized_activations(model, rl.ActivationQuant(bits=4, sinks=2)):
        with refused("padding comes before them: pad on the right"):
            model(tokens, attention_mask=mask)
        with refused("several follow each other in a row"):
            model(tokens, position_ids=(row % 5).expand_as(tokens))
        right = model(tokens, attention_mask=mask.flip(1), position_ids=row.expand_as(tokens))
        assert torch.isfinite(right.logits).all()
        whole = model(tokens, attention_mask=torch.ones_like(tokens))
        assert torch.equal(whole.logits, model(tokens).logits)


def test_a_packed_weight_beyond_the_dtype_is_named(model, tmp_path):
    for layer in model.model.layers:
        layer.mlp.up_proj.weight[:4] *= 1e-6
        layer.mlp.down_proj.weight[:, :4] /= 1e-6
    rl.rtn(model, rl.WeightQuant(group_size=16))
    with refused("down_proj.* has values beyond torch.float16"):
        rl.export(model, tmp_path / "out", dtype=torch.float16)


def test_settings_that_are_no_numbers_are_named(tmp_path):
    save_tiny_model(tmp_path)
    file = tmp_path / "config.json"
    whole = file.read_text()
    file.write_text(json.dumps(json.loads(whole) | {"rms_norm_eps": float("nan")}))
    with refused("its config.json says rms_norm_eps nan, no finite number"):
        rl.load(str(tmp_path))
    file.write_text(whole)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": "x"}))
    with refused("its tokenizer_config.json says model_max_length 'x', no number above 0"):
        rl.load(str(tmp_path))


def test_a_file_that_is_replaced_keeps_its_permissions_and_its_links(tmp_path):
    store, link = tmp_path / "real", tmp_path / "current"
    store.write_text("old")
    store.chmod(0o600)
    link.symlink_to(store)
    write_text(link, "new")
    assert link.is_symlink()
    assert store.read_text() == "new"
    assert S_IMODE(store.stat().st_mode) == 0o600


def test_a_folder_in_the_place_of_a_kept_file_costs_a_run_nothing(folder):
    settings = {"window": 64, "calibration_windows": 2, "test_windows": 2}
    recipe = rl.Recipe(model=str(folder / "model"), text="wikitext2", **settings)
    kept = local_path(recipe.sharing_weights().spec() | {"task": "weights"}, ".pt")
    kept.mkdir(parents=True)
    with pytest.warns(UserWarning, match="couldn't be written, so it won't be reused"):
        result = rl.run(recipe)
    assert result.metrics["kl"] > 0


def test_a_cap_so_low_that_no_token_counts_is_refused(model, tokens):
    with refused("token_cap must be a positive number from 1e-06"):
        rl.gptq(model, tokens, rl.WeightQuant(), token_cap=1e-60)
    with refused("token_cap must be a positive number from 1e-06"):
        rl.Recipe(token_cap=1e-60)


@pytest.mark.parametrize("stranger", ["added_tokens.json", "adapter_config.json"])
def test_a_stranger_in_an_unpacked_folder_is_not_read(stranger, written):
    tokenizer, file = written
    rl.load(str(file))
    unpacked = unpacked_gguf(file)
    (unpacked / stranger).write_text('{"Hi": 7}')
    _, read = rl.load(str(file))
    assert read("Hi there").input_ids == tokenizer("Hi there").input_ids
    assert not (unpacked / stranger).exists()
    rmtree(unpacked)
    unpacked.touch()
    with refused("is in the way of the dequantized model: take it away"):
        rl.load(str(file))


def test_a_quality_of_another_rounding_is_refused_by_its_name():
    with refused("quality 'fast' is of gptq's codes: leave rounding out"):
        rl.Recipe.of_quality("fast", rounding="rtn")


def test_a_default_that_leads_nowhere_is_not_blamed_on_its_variable(monkeypatch):
    monkeypatch.delenv("ROTLIB_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-at-all")
    with refused("ROTLIB_CACHE's default names '~nobody-at-all/rotlib'"):
        cache_folder()
