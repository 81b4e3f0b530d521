"""What the fifteenth hunt left."""

import pytest
import torch
from conftest import refused, tiny_model

import rotlib as rl
from rotlib.study.sweep_file import read_sweep
from rotlib.study.yaml_file import word_of


@pytest.mark.parametrize(("written", "number"), [("1e-3", 1e-3), ("2E1", 20.0), ("1.e-2", 0.01)])
def test_a_power_of_ten_is_a_number_in_a_sweep(written, number, tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(f"base: {{rotation: spinquant, lr: {written}}}")
    assert [recipe.lr for recipe in read_sweep(file)] == [number]
    assert word_of(written) == number
    assert word_of(f"[{written}]") == [number]


def test_a_quoted_power_stays_a_word(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text('base: {rotation: spinquant, lr: "1e-3"}')
    with refused("lr .* must be a positive number, not '1e-3'"):
        read_sweep(file)


def test_names_that_are_not_utf8_are_refused(tmp_path):
    name = b"caf\xe9".decode(errors="surrogateescape")
    for use in (rl.load, lambda name: rl.Recipe(model=name)):
        with refused("must be in UTF-8"):
            use(name)
    with refused("is no place for a rotation"):
        rl.save_rotation(rl.Rotation(torch.eye(4), None), tmp_path / name)


def test_a_rotation_is_written_over_no_other_file(tmp_path):
    rotation = rl.Rotation(torch.eye(4), None)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    with refused("isn't a file of tensors"):
        rl.save_rotation(rotation, file)
    assert file.read_bytes() == b"weights"
    torch.save({"state": torch.eye(4)}, file := tmp_path / "state.pt")
    with refused("holds no rotation"):
        rl.save_rotation(rotation, file)
    assert rl.save_rotation(rotation, rl.save_rotation(rotation, tmp_path / "R.bin")).exists()


def test_a_rotations_methods_say_what_they_take():
    rotation = rl.Rotation(torch.eye(4), None)
    with refused("must be floating-point, not torch.int32"):
        rotation.to("cpu", torch.int32)
    with refused("a site is one of SITES"):
        rotation.at("q", 0)
    with refused("R2 must be a tensor of layers x heads x n x n"):
        rl.Rotation(None, torch.eye(4)).digest()


@pytest.mark.parametrize(("scale", "zero"), [((3, 1), (3, 1)), ((2, 1), (1, 1)), ((2, 3), (2, 3))])
def test_parts_of_different_weights_make_no_weight(scale, zero):
    weight = rl.QuantizedWeight(
        torch.ones(2, 4, dtype=torch.int8), torch.ones(scale), torch.zeros(zero)
    )
    with refused("don't have scales"):
        weight.dense()


def test_reports_and_recipes_name_what_they_take():
    with refused("a Report takes up another"):
        rl.Report().add(None)
    with refused("unknown setting 'bit'"):
        rl.Recipe().of_rotation("bit")


def test_a_copy_of_a_model_with_R4_keeps_it(tokens):
    from copy import deepcopy

    model = tiny_model(dtype=torch.float32)
    rl.fuse(model, rl.hadamard_rotation(model, R4=True))
    copied = deepcopy(model)
    assert torch.equal(copied(tokens).logits, model(tokens).logits)
    rl.rtn(copied, rl.WeightQuant())
