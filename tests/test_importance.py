"""Tokens weighed by the slope of the loss."""

import pytest
import torch
from conftest import tiny_model, with_weights_in
from torch.nn.functional import cross_entropy

import rotlib as rl
from rotlib.models import walk
from rotlib.models.supported import adapt
from rotlib.precision import float32_everywhere
from rotlib.quantization.hessian import Hessian
from rotlib.quantization.importance import BY_SLOPE, token_shares
from rotlib.quantization.solver import Solver

QUANT = rl.WeightQuant(bits=3)


def by_autograd(model, tokens):
    """The same by one backward pass through the whole model."""
    put_out = {}
    hooks = [
        module.register_forward_hook(lambda module, args, y: put_out.update({module: y}))
        for layer in model.model.layers
        for module in layer.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    embedded = model.model.embed_tokens(tokens).detach().requires_grad_()
    with torch.enable_grad():
        logits = model(inputs_embeds=embedded).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        slopes = dict(zip(put_out, torch.autograd.grad(loss, [*put_out.values()]), strict=True))
    for hook in hooks:
        hook.remove()
    return slopes


@pytest.mark.parametrize(
    "name", ["llama", "qwen3, tied", "granite, multipliers", "gemma3, tied", "mixtral, experts"]
)
def test_slopes_are_those_of_one_pass_back_through_the_whole_model(name, tokens):
    model = tiny_model(name, dtype=torch.float32)
    family, slopes = adapt(model), by_autograd(model, tokens)
    with float32_everywhere():
        shares = token_shares(family, tokens, slopes=True)
    for layer, found in enumerate(shares):
        linears = family.linears(layer)
        for site in found.keys() & BY_SLOPE.keys():
            parts = [
                slopes[linears[name]].square().sum(-1, keepdim=True) for name in BY_SLOPE[site]
            ]
            expected = sum(parts).sqrt()
            expected /= expected.mean()
            torch.testing.assert_close(found[site], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["llama", "granite, multipliers", "gemma3, tied", "mixtral, experts"]
)
def test_what_goes_into_the_stream_counts_by_one_over_its_size(name, tokens):
    model = tiny_model(name, dtype=torch.float32)
    family, streams = adapt(model), {}
    for layer, norms in enumerate(map(family.norms, range(len(family.layers)))):
        for of, norm in norms.items():
            norm.register_forward_pre_hook(
                lambda _, args, at=(layer, of): streams.update({at: args[0]})
            )
    family.final_norm.register_forward_pre_hook(
        lambda _, args: streams.update({(len(family.layers), "attention_norm"): args[0]})
    )
    model(tokens)
    seen = dict(streams)
    with float32_everywhere():
        of_layers = token_shares(family, tokens, slopes=False)
    for layer, shares in enumerate(of_layers):
        weighed = {"gemma3, tied": set(), "mixtral, experts": {"o"}}.get(name, {"o", "down"})
        assert shares.keys() == weighed
        behind = {"o": (layer, "mlp_norm"), "down": (layer + 1, "attention_norm")}
        for site in weighed:
            expected = 1 / seen[behind[site]].norm(dim=-1, keepdim=True)
            torch.testing.assert_close(shares[site], expected / expected.mean())


def test_the_first_weights_are_quantized_by_the_weighted_hessian(model, tokens):
    family = adapt(model)
    weight = token_shares(family, tokens, slopes=True)[0]["q"]
    x, _ = walk.layer_inputs(family, tokens)[0]
    hessian = Hessian()
    hessian.add(family.norms(0)["attention_norm"](x) * weight.sqrt())
    W = torch.cat([family.linears(0)[name].weight for name in BY_SLOPE["q"]])
    expected = Solver(QUANT)(W, hessian.take(), None)[0].codes
    codes = rl.gptq(model, tokens, QUANT, loss_weighted=True).weights
    found = torch.cat([codes[f"layers.0.{name}"].codes for name in BY_SLOPE["q"]])
    assert (found != expected).float().mean() < 0.01  # a sum in another order turns a tie


@pytest.mark.parametrize("asymmetry", [0.0, 0.5])
def test_weights_follow_their_windows_into_every_batch(model, tokens, monkeypatch, asymmetry):
    together = rl.gptq(model, tokens, QUANT, asymmetry=asymmetry, loss_weighted=True).weights
    monkeypatch.setattr(walk, "BATCH_TOKENS", 3 * tokens.shape[1])
    apart = tiny_model(dtype=torch.float32)
    weights = rl.gptq(apart, tokens, QUANT, asymmetry=asymmetry, loss_weighted=True).weights
    for name, weight in weights.items():
        assert (weight.codes != together[name].codes).float().mean() < 0.02, name


def test_a_mixture_of_experts_is_weighed_in_its_attention(tokens):
    plain, weighed = (tiny_model("mixtral, experts", dtype=torch.float32) for _ in range(2))
    one = rl.gptq(plain, tokens, QUANT).weights
    other = rl.gptq(weighed, tokens, QUANT, loss_weighted=True).weights
    assert not torch.equal(one["layers.0.q"].codes, other["layers.0.q"].codes)


def test_a_pass_back_leaves_no_slope_behind(model, tokens):
    before = [parameter.requires_grad for parameter in model.parameters()]
    token_shares(adapt(model), tokens, slopes=True)
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weighing_by_loss_is_refused_where_there_is_no_slope(tokens):
    how = {"calibration": tokens, "quant": QUANT, "loss_weighted": True}
    with pytest.raises(ValueError, match="too small for float16"):
        rl.gptq(with_weights_in(torch.float16, tiny_model(dtype=torch.float32)), **how)
    model = tiny_model(dtype=torch.float32)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode is on"):
        rl.gptq(model, **how)
    with pytest.raises(ValueError, match="loss_weighted must be True or False"):
        rl.gptq(tiny_model(dtype=torch.float32), tokens, QUANT, loss_weighted="yes")


def test_streams_are_part_of_the_loss(model, tokens):
    with pytest.raises(ValueError, match="loss_weighted weighs o's and down's tokens, too"):
        rl.gptq(model, tokens, QUANT, stream_weighted=True, loss_weighted=True)
    with pytest.raises(ValueError, match="stream_weighted is part of loss_weighted: leave it out"):
        rl.Recipe(stream_weighted=True, loss_weighted=True)
    assert not rl.Recipe.of_quality("fast", loss_weighted=True).stream_weighted
    codes = rl.gptq(tiny_model(dtype=torch.float32), tokens, QUANT, stream_weighted=True).weights
    plain = rl.gptq(model, tokens, QUANT).weights
    assert torch.equal(codes["layers.0.q"].codes, plain["layers.0.q"].codes)
    assert not torch.equal(codes["layers.0.o"].codes, plain["layers.0.o"].codes)


def test_a_recipe_that_rounds_to_nearest_has_no_tokens_to_weigh():
    with pytest.raises(ValueError, match="loss_weighted weighs the tokens"):
        rl.Recipe(rounding="rtn", loss_weighted=True)
