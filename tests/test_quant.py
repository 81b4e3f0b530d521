import itertools

import pytest
import torch
from conftest import tiny_model

import rotlib as rl
from rotlib.quantization.grids import CLIP_FACTORS, CLIP_NORM, fit_grid, round_to_nearest

GRIDS = [
    rl.WeightQuant(bits=bits, symmetric=symmetric, convention=convention, clip_search=clip)
    for bits, symmetric, convention, clip in itertools.product(
        (2, 3, 4, 8), (True, False), ("half", "full", "signed"), (True, False)
    )
]


def weights(rows=64, n=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, n, generator=generator)
    return W * W.abs()  # heavier tails than a Gaussian's


def round_slowly(row, quant, factor):
    """The definition, one number at a time: the oracle of `Grid.round`."""
    low, high = quant.codes
    if quant.symmetric:
        steps = 2 ** (quant.bits - 1) - {"half": 0.5, "full": 1, "signed": 0}[quant.convention]
        largest = float(max(row, key=abs))
        largest = -largest if quant.convention == "signed" else abs(largest)
        scale, zero = largest * factor / steps, 0
    else:
        bottom, top = min(0.0, float(min(row))) * factor, max(0.0, float(max(row))) * factor
        scale = (top - bottom) / high
        zero = round(-bottom / scale)
    return [(min(max(round(float(w) / scale + zero), low), high) - zero) * scale for w in row]


@pytest.mark.parametrize("quant", GRIDS, ids=str)
def test_a_row_holds_at_most_two_to_the_bits_distinct_values(quant):
    for row in round_to_nearest(weights(), quant).dense():
        assert len(row.unique()) <= 2**quant.bits


@pytest.mark.parametrize("quant", [grid for grid in GRIDS if not grid.clip_search], ids=str)
def test_rounding_agrees_with_the_definition(quant):
    W = weights(rows=4).double()
    slow = torch.tensor([round_slowly(row, quant, 1.0) for row in W], dtype=torch.float64)
    torch.testing.assert_close(round_to_nearest(W, quant).dense(), slow)


@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_search_finds_the_best_of_all_eighty_factors(symmetric):
    W = weights(rows=200)
    plain = rl.WeightQuant(bits=4, symmetric=symmetric, clip_search=False)
    searched = rl.WeightQuant(bits=4, symmetric=symmetric)

    def error(Q):
        return (Q - W).abs().pow(CLIP_NORM).sum(dim=1)

    exhaustive = torch.stack(
        [error(_clipped(W, plain, factor)) for factor in CLIP_FACTORS.tolist()]
    ).amin(dim=0)
    found = error(round_to_nearest(W, searched).dense())
    assert (
        found <= error(round_to_nearest(W, plain).dense()) * 1.0001
    ).all()  # never worse than no clipping
    assert (found >= exhaustive * 0.9999).all()
    assert found.sum() < 1.01 * exhaustive.sum()  # coarse to fine loses next to nothing


def _clipped(W, quant, factor):
    grid = fit_grid(W, quant)
    scale = grid.scale * factor
    zero = (
        grid.zero
        if quant.symmetric
        else (-(W.amin(dim=1, keepdim=True).clamp(max=0) * factor) / scale).round()
    )
    return grid._replace(scale=scale, zero=zero).round(W)


def test_a_signed_scale_puts_the_largest_weight_on_the_lowest_code():
    W = weights()
    Q = round_to_nearest(W, rl.WeightQuant(convention="signed", clip_search=False))
    largest = W.abs().argmax(dim=1, keepdim=True)
    assert (Q.codes.gather(1, largest) == -8).all()
    torch.testing.assert_close(Q.dense().gather(1, largest), W.gather(1, largest))
    assert (Q.scale < 0).any()
    assert (Q.scale > 0).any()
    half = round_to_nearest(W, rl.WeightQuant(clip_search=False))
    assert (Q.dense() - W).square().mean() < (half.dense() - W).square().mean()


def test_the_two_conventions_differ_by_two_fifths_at_two_bits_without_clip_search():
    W = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))
    mse = {
        convention: (
            round_to_nearest(
                W, rl.WeightQuant(bits=2, convention=convention, clip_search=False)
            ).dense()
            - W
        )
        .square()
        .mean()
        .item()
        for convention in ("full", "half")
    }
    assert mse["half"] < 0.75 * mse["full"]


def test_groups_are_quantized_as_if_each_were_a_row_of_its_own():
    W = weights(n=96)
    Q = round_to_nearest(W, rl.WeightQuant(group_size=32)).dense()
    alone = round_to_nearest(W[:, 32:64], rl.WeightQuant()).dense()
    torch.testing.assert_close(Q[:, 32:64], alone)


def test_all_zero_rows_stay_zero():
    W = weights()
    W[3] = 0
    for quant in GRIDS:
        assert round_to_nearest(W, quant).dense()[3].abs().max() == 0


def test_rtn_touches_the_seven_linears_and_nothing_else():
    before, after = tiny_model(dtype=torch.float32), tiny_model(dtype=torch.float32)
    rl.rtn(after, rl.WeightQuant(bits=3))
    changed = {
        name
        for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert changed == {name for name, _ in before.named_parameters() if "_proj" in name}
    with pytest.raises(ValueError, match="already quantized"):
        rl.rtn(after, rl.WeightQuant())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, "from 2 to 8"),
        ({"bits": 9}, "from 2 to 8"),
        ({"bits": 4.0}, "from 2 to 8"),
        ({"bits": "4"}, "from 2 to 8"),
        ({"group_size": 0}, "group_size .* whole number of at least 1"),
        ({"group_size": 32.0}, "group_size .* whole number"),
        ({"convention": "halb"}, "choose one of half, full"),
        ({"symmetric": "no"}, "True or False"),
    ],
)
def test_a_grid_outside_the_choices_is_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        rl.WeightQuant(**arguments)


def test_groups_that_do_not_divide_a_width_are_refused_before_anything_changes(tokens):
    model = tiny_model(dtype=torch.float32)
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    for act in (
        lambda: rl.rtn(model, rl.WeightQuant(group_size=32)),
        lambda: rl.gptq(model, tokens, rl.WeightQuant(group_size=32)),
    ):
        with pytest.raises(
            ValueError, match="group_size 32 doesn't divide the 48 inputs of q_proj"
        ):
            act()
    assert torch.equal(before, model.model.layers[0].self_attn.q_proj.weight)


def test_weights_that_do_not_fit_are_refused_and_the_model_stays_as_it_was():
    weights = rl.rtn(tiny_model(dtype=torch.float32), rl.WeightQuant())
    last = list(weights)[-1]
    cut = weights[last]._replace(scale=weights[last].scale[:1], zero=weights[last].zero[:1])
    model = tiny_model(dtype=torch.float32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for wrong, message in [
        (weights | {last: cut}, f"{last} doesn't fit"),
        (weights | {last: weights[last].dense()}, f"{last} doesn't fit"),
        (
            weights | {last: weights[last]._replace(scale=weights[last].scale * float("nan"))},
            f"the quantized weight {last} is damaged",
        ),
        ({name: weight for name, weight in weights.items() if name != last}, f"lack {last}"),
        (None, "come as a dictionary, such as report.weights, not as a NoneType"),
    ]:
        with pytest.raises(ValueError, match=message):
            rl.restore(model, wrong)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    rl.restore(model, weights)
    with pytest.raises(ValueError, match="already quantized"):
        rl.restore(model, weights)
