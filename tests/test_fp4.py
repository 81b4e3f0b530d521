"""Grids of 4-bit floats, value by value against compressed-tensors, which reads the checkpoints."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA
from compressed_tensors.quantization.utils.helpers import (
    calculate_qparams,
    compute_dynamic_scales_and_zp,
)
from conftest import SHAPE
from safetensors.torch import load_file
from test_gptq import gptq_slowly, problem
from transformers import AutoModelForCausalLM, LlamaConfig

import rotlib as rl
from rotlib.checkpoints.gguf_file import check_holds
from rotlib.measure.slopes import slope_agreement
from rotlib.models.supported import adapt
from rotlib.quantization.activations import round_tokens
from rotlib.quantization.coordinate import CoordinateDescent
from rotlib.quantization.fp4 import FP4
from rotlib.quantization.grids import round_to_nearest
from rotlib.quantization.quantized import check_on_grid, grid_of
from rotlib.quantization.solver import Solver

BOTH = pytest.mark.parametrize("grid", FP4)
E2M1 = {sign * size for size in (0, 0.5, 1, 1.5, 2, 3, 4, 6) for sign in (1, -1)}


def weights(rows=64, n=96):
    W = torch.randn(rows, n, generator=torch.Generator().manual_seed(0))
    return 0.02 * W * W.abs()


def fp4_model():
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE | {"hidden_size": 96, "intermediate_size": 160, "head_dim": 16})
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def tokens():
    return torch.randint(96, (4, 32), generator=torch.Generator().manual_seed(1))


@BOTH
def test_numbers_round_to_the_floats_that_compressed_tensors_rounds_them_to(grid):
    x = torch.linspace(-8, 8, 6401)  # with every tie
    expected = FP4_E2M1_DATA.cast_to_fp4(x.clone().clamp(-6, 6))
    found = rl.WeightQuant(grid=grid).nearest_(x.clone())
    assert torch.equal(found, expected)
    assert {*found.tolist()} == E2M1


@BOTH
def test_unclipped_weights_are_those_of_compressed_tensors(grid):
    W = weights()
    quant = rl.WeightQuant(grid=grid, clip_search=False)
    args = preset_name_to_scheme(f"{grid}A16".upper(), ["Linear"]).weights
    grouped = W.unflatten(1, (-1, FP4[grid]))
    globally = torch.tensor([1 / quant.in_units(W)[1]]) if grid == "nvfp4" else None
    scale, zero = calculate_qparams(grouped.amin(2), grouped.amax(2), args, globally)
    expected = fake_quantize(W, scale, zero, args, global_scale=globally)
    rounded = round_to_nearest(W, quant)
    assert torch.equal(rounded.dense(), expected)
    assert torch.equal(rounded.scale, scale.float() * quant.in_units(W)[1])


@BOTH
def test_clip_search_brings_weights_nearer_on_scales_of_the_format(grid):
    W = weights()
    plain, searched = (
        round_to_nearest(W, rl.WeightQuant(grid=grid, clip_search=clip)) for clip in (False, True)
    )
    assert (searched.dense() - W).abs().pow(2.4).sum() < (plain.dense() - W).abs().pow(2.4).sum()
    check_on_grid("W", searched, rl.WeightQuant(grid=grid))
    mantissas = torch.frexp(searched.scale)[0]
    assert len(mantissas.unique()) == (1 if grid == "mxfp4" else 8)
    assert grid_of(searched) == grid


@BOTH
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-6, 1e4])
def test_weights_of_any_size_keep_their_direction(grid, size):
    W = size * weights() / 0.02
    W[3] = 0
    rounded = round_to_nearest(W, rl.WeightQuant(grid=grid))
    check_on_grid("W", rounded)
    assert (rounded.dense() - W).norm() <= 0.2 * W.norm()
    assert not rounded.dense()[3].any()


def test_the_largest_and_the_smallest_scale_of_nvfp4_stand_beside_each_other():
    W = torch.zeros(1, 32)
    W[0, :16], W[0, 16:] = 1338, 6 * 2**-9
    rounded = round_to_nearest(W, rl.WeightQuant(grid="nvfp4", clip_search=False))
    assert rounded.scale.tolist() == [[224, 2**-9]]
    check_on_grid("W", rounded)


@BOTH
@pytest.mark.parametrize("act_order", [False, True])
def test_the_blocked_solver_agrees_with_gptq_column_by_column(grid, act_order):
    W, H = problem()
    quant = rl.WeightQuant(grid=grid)
    W /= quant.in_units(W)[1]  # the slow one knows no unit
    Q, error, _, _ = Solver(quant, act_order)(W, H)
    slow = gptq_slowly(W, H, quant, act_order, 0.01)
    assert ((Q.dense() - slow).abs() < 1e-4).float().mean() > 0.97
    assert (
        error.sum()
        < 0.8 * ((nearest := round_to_nearest(W, quant).dense() - W) @ H * nearest).sum()
    )


@BOTH
def test_coordinate_descent_visits_floats_as_well(grid):
    W, H = problem()
    quant = rl.WeightQuant(grid=grid)
    W /= quant.in_units(W)[1]
    Q = round_to_nearest(W, quant)
    better = CoordinateDescent(quant, 2)(Q, W, H)
    check_on_grid("W", better, quant)

    def error(weight):
        return ((weight.dense() - W) @ H * (weight.dense() - W)).sum(dim=1)

    assert (error(better) <= error(Q)).all()
    assert error(better).sum() < 0.7 * error(Q).sum()


@BOTH
def test_every_setting_of_gptq_stays_on_the_grid(grid):
    every = {"asymmetry": 0.25, "act_order": True, "descent": 2, "scale_search": grid == "nvfp4"}
    for settings in ({}, every):
        report = rl.gptq(fp4_model(), tokens(), rl.WeightQuant(grid=grid), **settings)
        for name, weight in report.weights.items():
            check_on_grid(name, weight, rl.WeightQuant(grid=grid))


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("by", ["rtn", "gptq"])
def test_transformers_reads_the_checkpoint_as_the_model_in_memory(grid, by, tmp_path):
    model = rl.fuse(fp4_model(), rl.random_rotation(fp4_model()))
    quant = rl.WeightQuant(grid=grid)
    rl.rtn(model, quant) if by == "rtn" else rl.gptq(model, tokens(), quant)
    folder = rl.export(model, tmp_path / "W4")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == f"{grid}-pack-quantized"
    read = AutoModelForCausalLM.from_pretrained(folder)
    read(tokens())  # it unpacks them then
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        found, wanted = (of.model.layers[1].get_submodule(name).weight for of in (read, model))
        assert found.dtype == torch.bfloat16
        assert torch.equal(found.float(), wanted)  # 4-bit floats times these scales are exact there
    if grid == "nvfp4":  # vLLM multiplies q, k and v at once, which have one global scale there
        stored = load_file(folder / "model.safetensors")
        scales = {
            stored[f"model.layers.1.self_attn.{name}_proj.weight_global_scale"].item()
            for name in "qkv"
        }
        assert len(scales) == 1


@BOTH
def test_activations_round_to_the_floats_that_compressed_tensors_rounds_them_to(grid):
    x = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(2)) ** 3
    quant, clip = rl.ActivationQuant(bits=4, grid=grid).input_grid()
    args = preset_name_to_scheme(grid.upper(), ["Linear"]).input_activations
    globally = torch.tensor([1 / quant.in_units(x)[1]]) if grid == "nvfp4" else None
    scale, zero = compute_dynamic_scales_and_zp(x, args, None, globally)
    expected = fake_quantize(x, scale, zero, args, global_scale=globally)
    assert torch.equal(round_tokens(x, quant, clip, quant.group_size), expected)


@BOTH
def test_a_model_reads_its_inputs_as_floats_while_it_is_asked_to(grid):
    model, seen = fp4_model(), []
    before = model(tokens()).logits
    with rl.quantized_activations(model, rl.ActivationQuant(bits=4, grid=grid)):
        down = model.model.layers[0].mlp.down_proj
        hook = down.register_forward_hook(lambda _, args, __: seen.append(args[0]))
        assert not torch.equal(model(tokens()).logits, before)
        hook.remove()
    assert torch.equal(model(tokens()).logits, before)
    groups = seen[0].reshape(-1, FP4[grid])
    assert all(len(group.abs().unique()) <= 8 for group in groups)


@BOTH
def test_restored_weights_are_the_same(grid):
    model, again = fp4_model(), fp4_model()
    weights = rl.rtn(model, rl.WeightQuant(grid=grid))
    rl.restore(again, deepcopy(weights), rl.WeightQuant(grid=grid))
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"grid": "fp4"}, "unknown grid 'fp4': choose one of int, nvfp4, mxfp4"),
        ({"grid": "nvfp4", "bits": 3}, "the grid nvfp4 has bits 4, not 3"),
        ({"grid": "nvfp4", "group_size": 32}, "the grid nvfp4 has group_size 16, not 32"),
        ({"grid": "mxfp4", "symmetric": False}, "the grid mxfp4 has symmetric True, not False"),
        ({"grid": "mxfp4", "convention": "signed"}, "has convention half, not 'signed'"),
    ],
)
def test_a_grid_of_floats_has_its_own_settings(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        rl.WeightQuant(**settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"group_size": 16}, "group_size belongs to integer grids, and nvfp4 has its own"),
        ({"tuning": 8}, "tuning moves scales freely"),
        ({"rotation": "spinquant"}, "spinquant learns on integer grids"),
        ({"rounding": "none"}, "grid belongs to rounded weights"),
        ({"activation_grid": "nvfp4"}, "the activation_grid nvfp4 has 4 bits, not 16"),
        (
            {"activation_bits": 4, "activation_grid": "nvfp4", "protocol": "quarot"},
            "protocol says how integers are rounded: inputs are nvfp4",
        ),
    ],
)
def test_a_recipe_of_floats_refuses_what_goes_unread(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        rl.Recipe(grid="nvfp4", **settings)


def test_a_recipe_of_floats_is_named_by_them_and_learns_for_their_groups():
    recipe = rl.Recipe(rotation="optrot", grid="nvfp4", grouped=True)
    assert recipe.precision == "W4A16 NVFP4"
    rounded = rl.Recipe(grid="mxfp4", activation_bits=4, activation_grid="mxfp4")
    assert rounded.precision == "W4A4 MXFP4"
    assert replace(rounded, grid="int").precision == "W4A4 int/MXFP4"
    assert replace(rounded, activation_grid="int").precision == "W4A4 MXFP4/int"
    turned = replace(rounded, rotation="optrot")  # by the weights alone
    assert turned.rotation_reads == rl.Recipe(rotation="optrot").rotation_reads
    assert recipe.rotation_reads["group_size"] == 16
    integers = rl.Recipe(rotation="optrot", group_size=16, grouped=True)
    assert recipe.rotation_reads == integers.rotation_reads  # one rotation is learned for both
    assert rl.Recipe.of_quality("best", grid="mxfp4").tuning == 0


def test_what_takes_no_floats_says_so(tmp_path):
    model = fp4_model()
    with pytest.raises(ValueError, match="learned through integer grids, not nvfp4"):
        rl.spinquant(model, tokens(), quant=rl.WeightQuant(grid="nvfp4"), steps=1)
    with pytest.raises(ValueError, match="learned through integer grids, not nvfp4"):
        slope_agreement(model, tokens(), quant=rl.WeightQuant(grid="nvfp4"))
    with pytest.raises(ValueError, match="scale_search tries scales nearby"):
        rl.gptq(model, tokens(), rl.WeightQuant(grid="mxfp4"), scale_search=True)
    reference = rl.Reference(model, tokens())
    rl.rtn(model, rl.WeightQuant(grid="mxfp4"))
    with pytest.raises(ValueError, match="tuning moves scales freely, and mxfp4"):
        rl.tune(model, reference, held_out=1)
    with pytest.raises(ValueError, match="4-bit floats aren't written as GGUF"):
        check_holds(adapt(model), rl.WeightQuant(grid="mxfp4"))
    with pytest.raises(ValueError, match="reads 4-bit floats as bfloat16"):
        rl.export(model, tmp_path / "W4", dtype=torch.float16)
    narrow = LlamaConfig(**SHAPE | {"hidden_size": 96, "head_dim": 16})
    narrow = AutoModelForCausalLM.from_config(narrow).eval()
    with pytest.raises(ValueError, match="doesn't divide the 80 inputs of down_proj"):
        rl.rtn(narrow, rl.WeightQuant(grid="mxfp4"))


@BOTH
def test_damaged_codes_and_scales_are_refused(grid):
    model = fp4_model()
    weights = rl.rtn(model, rl.WeightQuant(grid=grid))
    damaged = []
    for part, value in (("codes", 5.0), ("scale", 0.3), ("scale", -1.0), ("scale", torch.inf)):
        weight = deepcopy(weights["layers.0.q"])
        getattr(weight, part)[0, 0] = value
        damaged.append(weight)
    for weight in damaged:
        with pytest.raises(ValueError, match=r"layers\.0\.q is damaged"):
            rl.restore(fp4_model(), weights | {"layers.0.q": weight})
