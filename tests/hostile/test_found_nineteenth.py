"""What the nineteenth hunt found."""

import json
import os
from hashlib import sha256

import pytest
from conftest import refused, save_tiny_model
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook

import rotlib as rl
from rotlib.models.content import model_content
from rotlib.study import bundle


def test_a_model_loaded_by_a_relative_name_is_not_replaced_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "base")
    base, tokenizer = rl.load("base")
    rl.fuse(base, rl.hadamard_rotation(base))
    rl.export(base, "rotated", "fused", tokenizer)
    model, tokenizer = rl.load("rotated")
    rl.rtn(model, rl.WeightQuant())
    monkeypatch.chdir("/")
    with refused("holds the model that is exported"):
        rl.export(model, tmp_path / "rotated", tokenizer=tokenizer, overwrite=True)
    monkeypatch.chdir(tmp_path / "base")
    model, tokenizer = rl.load(".")
    rl.rtn(model, rl.WeightQuant())
    monkeypatch.chdir(tmp_path)
    assert rl.export(model, tmp_path / "out", tokenizer=tokenizer) == tmp_path / "out"


@pytest.mark.parametrize("rounding", [{"kv_bits": 2}, {"activation_bits": 4}])
def test_a_recipe_whose_rounding_the_checkpoint_cannot_ask_for_is_not_exported(rounding, folder):
    recipe = rl.Recipe(model=str(folder / "model"), **rounding)
    with refused("for no other rounding of activations"):
        rl.export_recipe(recipe, folder / "out")


def test_hooks_on_all_modules_are_seen(model, tokens):
    watch = register_module_forward_hook(lambda module, inputs, output: None)
    with watch, refused("a hook on all modules would see rotated states: remove it first"):
        rl.fuse(model, rl.hadamard_rotation(model))
    rl.fuse(model, rl.hadamard_rotation(model))


def test_backward_hooks_are_seen_where_something_is_learned(model, tokens):
    learn = {
        "spinquant": lambda: rl.spinquant(model, tokens, quant=rl.WeightQuant(), steps=1),
        "loss slopes": lambda: rl.gptq(model, tokens, rl.WeightQuant(), loss_weighted=True),
    }
    for call in learn.values():
        watch = register_module_full_backward_hook(lambda module, before, after: None)
        with watch, refused("a backward hook on all modules may change slopes: remove it first"):
            call()
        linear = model.model.layers[0].mlp.up_proj
        watch = linear.register_full_backward_hook(lambda module, before, after: None)
        with watch, refused(r"model.layers.0.mlp.up_proj has a backward hook, which may change"):
            call()
    rl.rtn(model, rl.WeightQuant())  # where nothing has a slope, it is nobody's business


def test_a_pipe_among_the_weights_is_not_waited_for(tmp_path):
    save_tiny_model(tmp_path)
    os.mkfifo(tmp_path / "other.safetensors")
    with refused("its other.safetensors is no file: take it away"):
        rl.load(str(tmp_path))


def test_a_tokenizer_of_sentencepiece_belongs_to_the_model(tmp_path):
    save_tiny_model(tmp_path)
    without = model_content(str(tmp_path))
    (tmp_path / "spiece.model").write_bytes(b"pieces")
    assert model_content(str(tmp_path)) != without


def test_a_bundle_whose_file_is_another_ones_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "PYTHON", "{}.{}".format(*bundle.sys.version_info))
    file = {"sha256": sha256(b"x").hexdigest(), "pieces": ["0.0"]}
    manifest = {"commit": None, "parts": 1, "files": {"a/b": file, "a": file}}
    (part := tmp_path / "1").mkdir()
    (part / "0.0").write_bytes(b"x")
    (part / bundle.MANIFEST).write_text(json.dumps(manifest))
    with refused("a and a/b can't both be files: pack the bundle anew"):
        bundle.unpack([part], tmp_path / "place")
    assert not (tmp_path / "place").exists()
