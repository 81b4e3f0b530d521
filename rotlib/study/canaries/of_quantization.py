"""Grids, GPTQ and its kin, tuning, activations."""

from collections.abc import Iterable

import torch
from torch import Tensor

from rotlib.learning import tuning
from rotlib.models import walk
from rotlib.models.reference import Reference
from rotlib.models.supported import adapt
from rotlib.quantization import (
    activations,
    fp4,
    gptq,
    grids,
    hessian,
    importance,
    quantized,
    refit,
    solver,
)
from rotlib.study.canaries.inputs import covariance, noise, profile, tiny, token_windows
from rotlib.study.canaries.register import canary


@canary(
    "grids",
    grids.WeightQuant,
    clip_norm=grids.CLIP_NORM,
    high_power=grids.HIGH_POWER,
    clip_factors=grids.CLIP_FACTORS,
    search=grids.SEARCH,
    conventions=grids.CONVENTIONS[:2],  # a further choice makes no result stale
    short_of=grids.SHORT_OF,
    ties=("put back",),
)
def _grids() -> dict:
    W = noise(6, 48).pow(3)
    W[5] = 0
    numbers = {}
    for name, settings in {
        "symmetric": {},
        "full": {"convention": "full"},
        "asymmetric": {"symmetric": False, "bits": 3},
        "groups": {"group_size": 16, "bits": 2},
        "unclipped": {"clip_search": False},
        "signed": {"convention": "signed"},
    }.items():
        quant = grids.WeightQuant(**settings)
        rounded = grids.round_to_nearest(W, quant)
        numbers[f"{name}, codes"] = profile(rounded.codes)
        numbers[f"{name}, range"] = quant.codes
        numbers[f"{name}, scale"] = rounded.scale
        numbers[f"{name}, dense"] = profile(rounded.dense())
    model = tiny(torch.float32)
    stored = quantized.rtn(model, grids.WeightQuant(bits=8))
    numbers["model"] = profile(torch.cat([weight.scale.flatten() for weight in stored.values()]))
    put_back = quantized.restore(tiny(torch.float32), stored)
    numbers["put back"] = profile(adapt(put_back).linears(1)["down"].weight)
    stored = quantized.rtn(tiny(torch.float32), grids.WeightQuant(bits=8, convention="full"))
    put_back = quantized.restore(tiny(torch.float32), stored)
    numbers["full, put back"] = profile(adapt(put_back).linears(1)["down"].weight)
    return numbers


@canary(
    "4-bit floats",
    choices=grids.GRIDS[:3],
    groups=fp4.FP4,
    halves=fp4.HALVES,
    largest=fp4.FP4_LARGEST,
    room=fp4.E4M3_ROOM,
    scales=str(fp4.E4M3),
    tolerance=5e-3,
)
def _floats() -> dict:
    W = noise(6, 96).pow(3)
    W[5] = 0
    numbers = {}
    for grid in fp4.FP4:
        for clip_search in (True, False):
            quant = grids.WeightQuant(grid=grid, clip_search=clip_search)
            rounded = grids.round_to_nearest(W, quant)
            name = f"{grid}{', clipped' if clip_search else ''}"
            numbers[f"{name}, codes"] = profile(rounded.codes.double())
            numbers[f"{name}, scale"] = rounded.scale
            numbers[f"{name}, dense"] = profile(rounded.dense())
        numbers[f"{grid}, nearest"] = quant.nearest_(torch.arange(-80, 80) / 10.0)
        numbers[f"{grid}, held"] = quant.held(torch.logspace(-3, 2, 30))
        numbers[f"{grid}, unit"] = quant.in_units(1000 * W)[1]
        numbers[f"{grid}, unit of scales"] = quant.unit_of(rounded.scale)
        inputs = activations.ActivationQuant(4, grid=grid).input_grid()
        numbers[f"{grid}, inputs"] = activations.round_tokens(
            1e-4 * noise(3, 96), *inputs, quant.group_size
        )
        W_solved, H = noise(4, 160, seed=2), covariance(160, seed=3)
        Q, error, _, _ = solver.Solver(quant, descent=1)(W_solved, H)
        numbers |= {f"{grid}, solved": profile(Q.codes.double()), f"{grid}, error": error}
    return numbers


@canary("covariance", damping=hessian.DAMPING, ladder=hessian.LADDER, tolerance=1e-4)
def _covariance() -> dict:
    seen = hessian.Hessian()
    wide = noise(3, 4, 400)
    for part in wide.split(2):
        seen.add(part)
    numbers = {"sum": profile(seen.take())}
    H = covariance(12)
    M, damping = hessian.factorise(H)
    trace, slope = hessian.pivots_and_slope(H)
    numbers |= {"M": profile(M), "damping": damping, "damped": profile(hessian.damped(H, "x"))}
    numbers |= {"pivots": hessian.pivots(H), "trace": trace, "slope": profile(slope)}
    flat = torch.diag(torch.tensor([1.0, 0.5, -0.02], dtype=torch.float64))
    numbers["ladder"] = hessian.factorise(flat)[1]
    numbers["lost"] = hessian.factorise(-H)[0] is None
    for layer, of in enumerate(hessian.hessians(adapt(tiny()), token_windows())):
        numbers |= {f"{site} {layer}": profile(matrix) for site, matrix in of.items()}
    return numbers


def _solved(solve: solver.Solver, C: Tensor | None = None) -> dict:
    W, H = noise(4, 136, seed=2), covariance(136, seed=3)
    H[7], H[:, 7] = 0, 0  # an input that is always zero
    Q, error, _, fallback = solve(W, H, C)
    return {"codes": profile(Q.codes), "scale": profile(Q.scale), "error": error, "fell": fallback}


@canary("gptq", gptq.gptq, solver.Solver, tolerance=5e-3, ties=("errors", "again"))
def _gptq() -> dict:
    numbers = {}
    for name, settings, how in (
        ("rows", {}, {}),
        ("rows, act-order", {}, {"act_order": True}),
        ("groups", {"group_size": 68, "symmetric": False}, {}),
        ("narrow groups", {"group_size": 8, "bits": 3}, {}),
        ("groups, act-order", {"group_size": 68}, {"act_order": True}),
        ("groups, static", {"group_size": 68}, {"static_groups": True}),
    ):
        solve = solver.Solver(grids.WeightQuant(**settings), **how)
        numbers |= {f"{name}, {key}": value for key, value in _solved(solve).items()}
    W = noise(2, 6)
    numbers["fallback"] = solver.Solver(grids.WeightQuant())(W, -covariance(6))[3]
    batch, walk.BATCH_TOKENS = walk.BATCH_TOKENS, 12  # two batches: one waits for the other
    try:
        for name, convention in (("", "half"), ("full, ", "full")):
            quant = grids.WeightQuant(bits=8, clip_search=False, convention=convention)
            kept = _Kept()
            report = gptq.gptq(tiny(torch.float32), token_windows(), quant, kept=kept)
            again = gptq.gptq(tiny(torch.float32), token_windows(), quant, kept=kept)
            numbers[f"{name}errors"] = [module.error for module in report.modules]
            numbers[f"{name}again"] = [module.error for module in again.modules]
            numbers[f"{name}fallbacks"] = report.fallbacks
            mixture = tiny(torch.float32, experts=4)
            report = gptq.gptq(mixture, token_windows(4), quant)
            numbers[f"{name}fallbacks of experts"] = [one.fallback for one in report.modules]
            numbers[f"errors, {name}of experts"] = [one.error for one in report.modules]
    finally:
        walk.BATCH_TOKENS = batch
    return numbers


class _Kept(dict):
    """Layers in memory."""

    put = dict.__setitem__


@canary("gptaq", tolerance=5e-3)
def _gptaq() -> dict:
    C = 0.1 * noise(136, 136, seed=5)
    numbers = _solved(solver.Solver(grids.WeightQuant()), C)
    quant = grids.WeightQuant(bits=3)
    report = gptq.gptq(tiny(torch.float32), token_windows(), quant, asymmetry=0.5)
    return numbers | {"errors": [module.error for module in report.modules][7:]}


def _refined(drift_size: float = 0.1, **how: object) -> dict:
    C = drift_size * noise(136, 136, seed=5)
    numbers = {}
    for name, settings, drift in (("rows", {}, None), ("drift", {}, C), ("groups", {"bits": 3}, C)):
        quant = grids.WeightQuant(group_size=68 if name == "groups" else None, **settings)
        found = _solved(solver.Solver(quant, **how), drift)
        numbers |= {f"{name}, {key}": value for key, value in found.items()}
    return numbers


@canary("token cap", tolerance=5e-3)
def _token_cap() -> dict:
    weights = hessian.token_weights(noise(2, 8, 6).square(), 1.5)
    quant = grids.WeightQuant(bits=3)
    report = gptq.gptq(tiny(torch.float32), token_windows(), quant, asymmetry=0.5, token_cap=1.5)
    return {"weights": profile(weights), "errors": [module.error for module in report.modules][7:]}


@canary("loss slopes", sites=importance.BY_SLOPE, tolerance=5e-3)
def _loss_slopes() -> dict:
    return _weighed(importance.BY_SLOPE, slopes=True, loss_weighted=True)


@canary("stream sizes", tolerance=5e-3)
def _stream_sizes() -> dict:
    return _weighed(("o", "down"), slopes=False, stream_weighted=True)


def _weighed(sites: Iterable[str], slopes: bool, **how: bool) -> dict:
    """How much tokens count at these inputs, and the errors of a GPTQ that they weigh."""
    found = importance.token_shares(adapt(tiny(torch.float32)), token_windows(), slopes)
    report = gptq.gptq(tiny(torch.float32), token_windows(), grids.WeightQuant(bits=3), **how)
    shares = {site: torch.stack([profile(layer[site]) for layer in found]) for site in sites}
    return shares | {"errors": [module.error for module in report.modules][7:]}


@canary("scale search", widths=solver.WIDTHS, tolerance=5e-3)
def _scale_search() -> dict:
    return _refined(scale_search=True)


@canary("coordinate descent", tolerance=5e-3)
def _coordinate_descent() -> dict:
    return _refined(descent=2)


@canary("refit", ridge=refit.RIDGE, tolerance=5e-3)
def _refit() -> dict:
    numbers = _refined(0.002, refit=True)
    again = _refined(0.002, refit=True, descent=1)
    return numbers | {f"{name}, descended": value for name, value in again.items()}


@canary(
    "tuning",
    tuning.tune,
    steps=tuning.STEPS,
    lr=tuning.LR,
    held_out=tuning.HELD_OUT,
    warm_up=tuning.WARM_UP,
    betas=tuning.BETAS,
    looks=tuning.LOOKS,
    tolerance=2e-3,
)
def _tuning() -> dict:
    numbers = {}
    for name, group_size in (("rows", None), ("groups", 8)):
        model = tiny(torch.float32)
        ids = token_windows(4, 24)
        seen = Reference(model, ids)
        quantized.rtn(model, grids.WeightQuant(bits=3, group_size=group_size, convention="full"))
        found = tuning.tune(model, seen, steps=3, held_out=2)
        numbers[f"{name}, kl"] = found.kl
        numbers[f"{name}, held out"] = [float(kl) for kl in found.held_out.values()]
        numbers[f"{name}, scales"] = [profile(one.scale) for one in found.weights.values()]
        numbers[f"{name}, gains"] = [profile(gain) for gain in found.gains]
        tuning.set_gains(model, [2 * gain for gain in found.gains])
        numbers[f"{name}, doubled"] = [profile(gain) for gain in tuning.gains_of(adapt(model))]
    return numbers


# what results have noted of these protocols
_PROTOCOL = ("symmetric", "clip", "o_per_head", "kv_clip")
_PAPERS = {
    name: {setting: getattr(protocol, setting) for setting in _PROTOCOL}
    for name, protocol in activations.PROTOCOLS.items()
    if name != "compressed-tensors"
}


@canary(
    "activations",
    activations.ActivationQuant,
    protocols=_PAPERS,
    of_checkpoints=activations.PROTOCOLS["compressed-tensors"],
    conventions={name: one.convention for name, one in activations.PROTOCOLS.items()},
    tolerance=2e-2,
)
def _activations() -> dict:
    x, numbers = noise(2, 3, 16), {}
    for name in activations.PROTOCOLS:
        quant = activations.ActivationQuant(bits=4, kv_bits=3, protocol=name)
        for side, (grid, clip) in {"x": quant.input_grid(), "kv": quant.kv_grid()}.items():
            numbers[f"{name}, {side}"] = activations.round_tokens(x, grid, clip)
            numbers[f"{name}, {side}, clip"] = clip
    quant = activations.ActivationQuant(bits=4)
    numbers["by heads"] = activations.round_tokens(x, *quant.input_grid(), 4)
    leaf = x.clone().requires_grad_()
    (activations.round_tokens(leaf, *quant.input_grid()) * x).sum().backward()
    numbers["straight through"] = profile(leaf.grad)
    for protocol, sinks in (("spinquant", 0), ("rotlib", 2)):
        model = tiny(torch.float32)
        quant = activations.ActivationQuant(8, 8, protocol, sinks)
        with activations.quantized_activations(model, quant):
            numbers[f"logits, {protocol}"] = profile(model(token_windows(1)).logits)
    return numbers
