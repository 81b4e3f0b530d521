"""Mixtures of experts: each quantized by the tokens it is given, and written apart."""

import re
import warnings
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import CONFIGS, save_tiny_model, tiny_model
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

import rotlib as rl
from rotlib.models.joined import Experts
from rotlib.models.supported import adapt
from rotlib.models.zoo import load_tokenizer
from rotlib.quantization.solver import Solver

NAMES = [name for name in CONFIGS if "experts" in name]


@pytest.fixture(params=NAMES)
def mixture(request):
    return tiny_model(request.param, dtype=torch.float32)


def stock_model(name, seed=0):
    """The same as transformers has it, its experts in two tensors."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(deepcopy(CONFIGS[name]))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", NAMES)
def test_opened_experts_compute_what_transformers_does(name, tokens, tmp_path):
    stock = stock_model(name)
    stock.save_pretrained(tmp_path)
    load_tokenizer("smollm2-135m").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"mlp\.experts isn't opened .* load the model with rl"):
        adapt(stock)
    opened, _ = rl.load(str(tmp_path), device="cpu")
    torch.testing.assert_close(opened(tokens).logits, stock(tokens).logits, rtol=0, atol=1e-6)
    opened.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(tokens).logits, stock(tokens).logits)


def test_opening_copies_no_weight():
    stock = stock_model(NAMES[0]).model.layers[0].mlp.experts
    packed = stock.gate_up_proj
    experts = Experts(stock, {"gate": "w1", "up": "w3", "down": "w2"})
    begin, end = packed.data_ptr(), packed.data_ptr() + packed.nbytes
    assert all(begin <= expert.w1.weight.data_ptr() < end for expert in experts)


def test_every_experts_weights_count_in_the_objective(mixture):
    before = rl.optrot(mixture, steps=2).history[0]
    adapt(mixture).linears(1)["experts.3.down"].weight.mul_(2)
    assert rl.optrot(mixture, steps=2).history[0] > before


def test_an_expert_is_quantized_by_the_tokens_it_is_given(mixture, tokens):
    """GPTQ of one expert alone, on what a hook sees it read, gives its codes."""
    family, layer = adapt(mixture), 0
    expert = family.linears(layer)["experts.2.gate"]
    many = tokens.repeat(4, 1)[:, torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    model = deepcopy(mixture)
    report = rl.gptq(model, many, rl.WeightQuant(bits=3))
    read = []
    # what lies before the experts is quantized by then
    others = {name: one for name, one in report.weights.items() if "experts" not in name}
    for site in ("q", "k", "v", "o"):
        family.linears(layer)[site].weight.copy_(others[f"layers.0.{site}"].dense())
    with torch.no_grad():
        hook = expert.register_forward_pre_hook(lambda module, args: read.append(args[0]))
        mixture(many)
        hook.remove()
    x = torch.cat(read)
    assert len(x) >= expert.in_features
    H = x.T @ x / len(x)
    Q, *_ = Solver(rl.WeightQuant(bits=3))(expert.weight, H)
    same = (Q.codes == report.weights["layers.0.experts.2.gate"].codes).double().mean()
    assert same > 0.99


def test_an_expert_without_tokens_is_rounded_to_nearest_and_few_are_told_of(mixture, tokens):
    family = adapt(mixture)
    same = tokens[:1, :1].repeat(1, 8)  # one token over and over goes to the same two experts
    rounded = rl.rtn(deepcopy(mixture), rl.WeightQuant())
    wide = max(family.width, family.inner_width)
    told = rf"experts were given fewer .* inputs \({wide}\), layers\..* the fewest, 0;"
    with pytest.warns(UserWarning, match=told):
        report = rl.gptq(mixture, same, rl.WeightQuant())
    starved = {one.name for one in report.modules if not one.tokens}
    assert {one.name for one in report.modules if one.fallback} == starved
    assert len(starved) == report.fallbacks > 0
    for name in starved:
        assert torch.equal(report.weights[name].codes, rounded[name].codes)
    by_name = {one.name: one.tokens for one in report.modules}
    assert by_name["layers.0.q"] == 8
    every = [by_name[f"layers.0.experts.{expert}.up"] for expert in range(family.experts)]
    assert sum(every) == 8 * family.config.num_experts_per_tok


def test_experts_with_enough_tokens_are_no_reason_to_warn(mixture, tokens):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rl.gptq(mixture, tokens.repeat(8, 1), rl.WeightQuant())


@pytest.mark.parametrize("group_size", [None, 16])
def test_a_checkpoint_is_read_by_transformers(mixture, group_size, tokens, tmp_path):
    rl.fuse(mixture, rl.optrot(mixture, steps=3))
    rl.gptq(mixture, tokens, rl.WeightQuant(group_size=group_size), True, asymmetry=0.25)
    rl.export(mixture, tmp_path / "W4")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "W4", dtype=torch.float32)
    assert (stock(tokens).logits - mixture(tokens).logits).abs().max() < 1e-4
    with safe_open(tmp_path / "W4" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    inside = "block_sparse_moe.experts.3.w2" if "w1" in str(names) else "mlp.experts.3.down_proj"
    assert f"model.layers.1.{inside}.weight_packed" in names


def test_a_rotated_mixture_is_saved_as_the_familys_own(mixture, tokens, tmp_path):
    rl.fuse(mixture, rl.random_rotation(mixture))
    rl.export(mixture, tmp_path / "fused", "fused")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    torch.testing.assert_close(stock(tokens).logits, mixture(tokens).logits, rtol=0, atol=1e-4)


def test_rounded_activations_pass_an_expert_without_tokens(mixture, tokens):
    before = mixture(tokens[:1, :2]).logits
    with rl.quantized_activations(mixture, rl.ActivationQuant(bits=8)):
        assert torch.isfinite(mixture(tokens[:1, :2]).logits).all()
    assert torch.equal(mixture(tokens[:1, :2]).logits, before)


@pytest.mark.filterwarnings("ignore:.*experts were given fewer")
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_exported_with_a_card_that_says_what_was_rounded(name, folder, tmp_path):
    save_tiny_model(folder / "model", name)
    recipe = rl.Recipe(
        model=str(folder / "model"), text="wikitext2", window=2, calibration_windows=1
    )
    recipe = replace(recipe, test_windows=2, rotation="kurtail", asymmetry=0.25, tuning=1)
    rl.export_recipe(recipe, tmp_path / "W4")
    card = " ".join((tmp_path / "W4" / "README.md").read_text().split())
    assert re.search(r"\d+ of its weight matrices are rounded to nearest: no tokens", card)
    assert "vLLM" not in card


@pytest.mark.parametrize(
    "act",
    [
        lambda model, tokens: rl.spinquant(model, tokens),
        lambda model, tokens: rl.ostquant(model, tokens),
        lambda model, tokens: rl.optrot_plus(model, tokens),
        lambda model, tokens: rl.quantized_activations(
            model, rl.ActivationQuant(bits=8, sinks=1)
        ).__enter__(),
    ],
)
def test_what_experts_cant_have_is_refused(act, tokens):
    with pytest.raises(ValueError, match="doesn't know mixtures of experts such as mixtral"):
        act(tiny_model(NAMES[0], dtype=torch.float32), tokens)


def test_an_asymmetric_grid_of_experts_is_refused_before_it_is_written(mixture, tmp_path):
    rl.rtn(mixture, rl.WeightQuant(symmetric=False))
    with pytest.raises(ValueError, match=r"reads experts .* on symmetric integer grids alone"):
        rl.export(mixture, tmp_path / "W4")
    assert not (tmp_path / "W4").exists()


def test_layers_without_experts_among_them_are_refused_by_their_module():
    config = deepcopy(CONFIGS["qwen3_moe, experts, q/k norms"])
    config.mlp_only_layers = [0]
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.gate_proj has no place"):
        adapt(model)


def test_clipped_values_are_refused():
    name = "qwen3_moe, experts, q/k norms"
    model = tiny_model(name)
    model.config.clip_qkv = 3.0
    with pytest.raises(ValueError, match="clip_qkv clips values"):
        adapt(model)


def test_routers_are_left_as_they_are(mixture, tokens):
    before = [adapt(mixture).router(layer).weight.clone() for layer in range(2)]
    report = rl.gptq(mixture, tokens, rl.WeightQuant(bits=2))
    assert not any("router" in name for name in report.weights)
    for layer, weight in enumerate(before):
        assert torch.equal(adapt(mixture).router(layer).weight, weight)
    assert all(isinstance(one, nn.Linear) for one in adapt(mixture).linears(0).values())
