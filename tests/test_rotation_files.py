"""Rotations as SpinQuant's code keeps them, and what a checkpoint's config says of its own."""

import json

import pytest
import torch
from conftest import exact_logits, tiny_model

import rotlib as rl

LAYERS, HEADS, B = 2, 2, 8


def shared(seed=0):
    """A random rotation with one R2 for all heads of a layer."""
    rotation = rl.random_rotation(tiny_model(), seed)
    rotation.R2 = rotation.R2[:, :1].repeat(1, HEADS, 1, 1)
    return rotation


def test_a_rotation_is_read_back_as_it_was_written(tmp_path, tokens):
    model = tiny_model()
    wanted = exact_logits(model, tokens)
    read = rl.load_rotation(rl.save_rotation(shared(), tmp_path / "R.bin"), model)
    assert torch.equal(read.R1, shared().R1)
    assert torch.equal(read.R2, shared().R2)
    assert (exact_logits(rl.fuse(model, read), tokens) - wanted).abs().max() < 1e-9


def test_a_file_turns_weights_as_spinquants_code_does(tmp_path):
    """Its `rotate_attention_inputs`, `rotate_attention_output` and `rotate_ov_proj`, by hand."""
    model, rotation = tiny_model(), shared()
    attention = model.model.layers[1].self_attn
    gain = model.model.layers[1].input_layernorm.weight
    v, o = attention.v_proj.weight.clone() * gain, attention.o_proj.weight.clone()
    rl.fuse(model, rl.load_rotation(rl.save_rotation(rotation, tmp_path / "R.bin"), model))
    held = torch.load(tmp_path / "R.bin", weights_only=True)
    R1, R2 = held["R1"], held["model.layers.1.self_attn.R2"]
    v = ((v @ R1).T.reshape(48, -1, B) @ R2).reshape(48, -1).T
    o = ((R1.T @ o).reshape(48, -1, B) @ R2).reshape(48, -1)
    assert (attention.v_proj.weight - v).abs().max() < 1e-9
    assert (attention.o_proj.weight - o).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("rotation", "message"),
    [
        (lambda: rl.random_rotation(tiny_model()), "another for each head"),
        (lambda: rl.Rotation(torch.eye(48), None, R4=True), "this rotation has R4 as well"),
        (lambda: torch.eye(48), "takes a Rotation, not a Tensor"),
    ],
)
def test_what_the_file_cannot_hold_is_not_written(rotation, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        rl.save_rotation(rotation(), tmp_path / "R.bin")
    assert not list(tmp_path.iterdir())


R2 = {f"model.layers.{layer}.self_attn.R2": torch.eye(B) for layer in range(LAYERS)}


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (
            {"R1": torch.eye(47)},
            r"R\.bin: R1 has shape \(47, 47\), but this model needs \(48, 48\)",
        ),
        ({"R1": 2 * torch.eye(48)}, r"R\.bin: the rotation isn't orthogonal"),
        ({"R1": "eye"}, r"R\.bin: R1 must be a real floating-point tensor"),
        ({"R2": torch.eye(B)}, "must hold R1 and model.layers.0.self_attn.R2 to 1"),
        (dict(list(R2.items())[:1]), "holds R2 of 1 layers, and this model has 2"),
        (R2 | {"model.layers.0.self_attn.R2": torch.eye(6)}, "must hold R2 of 8 x 8"),
        ({}, "must hold R1"),
        ([torch.eye(48)], "must hold R1"),
    ],
)
def test_a_file_of_something_else_is_refused_by_its_name(held, message, tmp_path):
    torch.save(held, tmp_path / "R.bin")
    with pytest.raises(ValueError, match=message):
        rl.load_rotation(tmp_path / "R.bin", tiny_model())


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"PK\x03\x04"])
def test_a_file_that_is_none_of_torchs_is_refused(content, tmp_path):
    (tmp_path / "R.bin").write_bytes(content)
    with pytest.raises(ValueError, match="isn't a file of tensors"):
        rl.load_rotation(tmp_path / "R.bin", tiny_model())
    with pytest.raises(ValueError, match="isn't a file of tensors"):
        rl.load_rotation(tmp_path / "nowhere.bin", tiny_model())


def test_a_checkpoint_says_which_rotation_is_in_its_weights(tmp_path):
    model = tiny_model(dtype=torch.float32)
    rotation = rl.gsr_rotation(model, block=16)
    rl.rtn(rl.fuse(model, rotation), rl.WeightQuant(bits=4))
    config = json.loads((rl.export(model, tmp_path / "W4") / "config.json").read_text())
    assert config["rotation"]["folded"]["R1"] == "Hadamard, blocks of 16"
    assert config["rotation"]["at_runtime"] == {}
    assert config["rotation"]["digest"] == rotation.digest()
