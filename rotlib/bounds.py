"""The theory behind OptRot, measured: incoherence, tr(H), tr(D), the bounds on a layer's error, and the error itself.

With ``max|W_ij| ≤ μ ‖W‖_F / √(mn)`` and an absmax grid, rounding a layer to nearest costs an error ``tr(ΔW H ΔWᵀ)`` of about
``μ² ‖W‖²_F tr(H) / (n (2^b − 1)²)`` at most, and GPTQ the same with tr(D), H = (U + I) D (U + I)ᵀ (QuIP, arXiv 2307.13304;
OptRot, arXiv 2512.24124), as long as no weight is clamped. Rotations leave ‖W‖_F, tr(H) and det(H) alone; they
change μ and tr(D), which can't pass ``n · det(H)^{1/n}``. A model is walked once, un-rotated and unquantized; each layer's
Hessians are rotated analytically.
"""

from dataclasses import fields

import torch
from jaxtyping import Float
from torch import Tensor

from rotlib import store
from rotlib.checks import whole_number
from rotlib.covariance import damped, hessians, pivots
from rotlib.families import STAGES, adapt
from rotlib.gptq import Solver
from rotlib.measure import incoherence
from rotlib.online import check_online
from rotlib.pipeline import calibration_tokens, rotation_of
from rotlib.quant import check_quantizable, round_to_nearest
from rotlib.recipe import Recipe
from rotlib.rotation import Rotation, placed_in_layer, times
from rotlib.store import Record, Result
from rotlib.text import fingerprint
from rotlib.zoo import load, pick_device


def bounds(recipe: Recipe, every: int = 1, device: str = "auto") -> Result:
    """Bounds and errors of every weight under the recipe's rotation and weight grid, without drift of the inputs; kept like a run.

    A line of `metrics["modules"]` holds, in the units of tr(W H Wᵀ) for one token: `energy`, that itself; `rtn_error` and `gptq_error`;
    `rtn_bound` and `gptq_bound`, by the weight's μ; `row_bound`, GPTQ's with every output's own largest weight in the place of μ.
    `every` second, third … layer is measured. `edge_codes` is the share of GPTQ's codes at either end of the grid, where clamping happens.
    """
    if not isinstance(recipe, Recipe):
        raise ValueError(f"bounds are of a Recipe, such as rl.Recipe(rotation='optrot'), not of {recipe!r}")
    recipe = recipe.of_rotation("text", "window", "calibration_windows", *(grid.name for grid in fields(recipe.quant)))
    picked = pick_device(device)
    whole_number("every", every, 1)
    spec = recipe.spec() | {"task": "bounds"} | ({"every": every} if every > 1 else {})
    return store.once(spec, picked, lambda record: _compute(recipe, every, picked, record))


@torch.no_grad()
def _compute(recipe: Recipe, every: int, device: torch.device, record: Record) -> None:
    calibration = calibration_tokens(recipe)
    model, _ = load(recipe.model, str(device))
    check_online(check_quantizable(model, recipe.quant), recipe.online)
    family = adapt(model)
    rotation = (rotation_of(recipe, model, record) or Rotation(None, None)).projected(family.device)
    record.metrics["modules"] = []
    with record.stage("bounds"):
        for layer, H in enumerate(hessians(model, calibration)):
            if layer % every:
                continue
            placed = {weight.site: weight for weight in placed_in_layer(family, layer)}
            for stage in STAGES:
                turn = rotation.on_inputs(placed[stage[0]].at, layer)
                turned = times(times(H[stage[0]].double(), turn).mT, turn)
                weights = {site: dict(placed[site].rotated(rotation, family.device))["weight"].float() for site in stage}
                record.metrics["modules"] += [line | {"layer": layer} for line in measure_stage(weights, turned, recipe)]
    record.tokens["calibration"] = fingerprint(calibration)


def measure_stage(weights: dict[str, Float[Tensor, "out n"]], H: Float[Tensor, "n n"], recipe: Recipe) -> list[dict]:
    """A line for each of the weights that read one input, in the coordinates that H and they are given in."""
    safe = damped(H, next(iter(weights)), recipe.damping)
    n = len(H)
    tr_H, tr_D = H.diagonal().sum().item(), pivots(safe).sum().item()
    floor = n * (torch.logdet(safe) / n).exp().item()
    H = H.float()
    lines = []
    for site, W in weights.items():
        Q, error, _, fallback = Solver(recipe.quant, damping=recipe.damping)(W, H)
        nearest = round_to_nearest(W, recipe.quant).dense() - W
        low, high = recipe.quant.codes
        mu, frobenius, levels = incoherence(W), W.double().square().sum().item(), (2**recipe.bits - 1) ** 2
        lines.append({
            "site": site, "incoherence": mu, "tr_H": tr_H, "tr_D": tr_D, "floor": floor,
            "energy": _quadratic(W, H), "rtn_error": _quadratic(nearest, H), "gptq_error": error.sum().item(), "fallback": fallback,
            "rtn_bound": mu**2 * frobenius * tr_H / (n * levels), "gptq_bound": mu**2 * frobenius * tr_D / (n * levels),
            "row_bound": W.abs().amax(1).double().square().sum().item() * tr_D / levels,
            "edge_codes": ((Q.codes == low) | (Q.codes == high)).double().mean().item(),
        })  # fmt: skip
    return lines


def _quadratic(W: Float[Tensor, "out n"], H: Float[Tensor, "n n"]) -> float:
    return (W @ H * W).sum().item()
