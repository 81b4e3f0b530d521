"""What the twenty-fourth hunt found."""

import json
from copy import deepcopy
from hashlib import sha256

import pytest
import torch
from conftest import refused, save_tiny_model, small_tokenizer

import rotlib as rl
from rotlib.disk import write_json
from rotlib.models.gguf_tokenizer import cut_of
from rotlib.study import bundle, reproduce


@pytest.mark.parametrize("part", ["signs", "order"])
def test_factors_that_were_changed_in_place_are_no_rotation(part, model):
    rotation = rl.gsr_rotation(model, block=16, signs=True)
    getattr(rotation.R1, part)[0] = 2
    rotation.R1.order[1] = 2
    with refused("signs must be real|the order must name each"):
        rl.fuse(model, rotation)


class Store(dict):
    put = dict.__setitem__


def test_layers_of_another_text_or_other_settings_are_not_put_back(model, tokens):
    kept, quant = Store(), rl.WeightQuant(bits=3)
    rl.gptq(deepcopy(model), tokens, quant, kept=kept)
    for text, settings in ((tokens.flip(1), {}), (tokens, {"act_order": True})):
        other, anew = deepcopy(model), deepcopy(model)
        rl.gptq(other, text, quant, **settings, kept=Store(kept))
        rl.gptq(anew, text, quant, **settings)
        assert torch.equal(other(tokens).logits, anew(tokens).logits)
    before = deepcopy(kept)
    rl.gptq(model, tokens, quant, kept=kept)
    assert kept.keys() == before.keys()


def test_a_tokenizer_that_cuts_texts_short_is_compared_as_it_is_called():
    tokenizer = deepcopy(small_tokenizer())
    tokenizer.backend_tokenizer.enable_truncation(2)
    assert cut_of(tokenizer) == cut_of(small_tokenizer())


def test_a_config_nested_without_end_is_named(tmp_path):
    save_tiny_model(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with refused("its config.json is not a valid JSON file"):
        rl.load(str(tmp_path))


def test_a_tokenizer_class_that_is_no_word_is_named(tmp_path):
    save_tiny_model(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": 5}))
    with refused("its tokenizer_config.json says tokenizer_class 5, no word"):
        rl.load(str(tmp_path))


def test_a_folder_is_the_same_one_for_the_notebooks_that_run_elsewhere(tmp_path, monkeypatch):
    save_tiny_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROTLIB_RESULTS", str(tmp_path / "results"))
    given = []
    monkeypatch.setattr(reproduce, "check_plan", lambda plan: None)
    monkeypatch.setattr(
        reproduce, "execute", lambda path, out, parameters, in_place: given.append(parameters)
    )
    with pytest.raises(SystemExit):
        reproduce.main(["smoke", "--model", "model", "--only", "02_rotations"])
    assert given == [{"model": str(tmp_path / "model")}]


@pytest.mark.parametrize("name", ["data/./A", "data//A", "data/"])
def test_a_bundle_names_no_file_twice(name, tmp_path):
    digest = sha256(b"hello").hexdigest()
    files = {each: {"sha256": digest, "pieces": ["0.0"]} for each in ("data/A", name)}
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "0.0").write_text("hello")
    write_json(tmp_path / "1" / "manifest.json", {"commit": "", "parts": 1, "files": files})
    with refused("isn't written out plainly"):
        bundle.unpack([tmp_path / "1"], tmp_path / "place")
    assert not (tmp_path / "place").exists()


def test_a_rotation_file_cut_short_is_told(model, tmp_path):
    width = model.config.hidden_size
    rotation = rl.Rotation(torch.eye(width, dtype=torch.float64), None)
    file = rl.save_rotation(rotation, tmp_path / "R.bin")
    whole = file.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 1):
        file.write_bytes(whole[:length])
        with refused("isn't a file of tensors: it is damaged or cut short|as torch.save writes"):
            rl.load_rotation(file, model)
