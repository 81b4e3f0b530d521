"""The theory behind OptRot, measured: what bounds the error of a layer, and the error itself.

The bounds are made of a weight's incoherence μ, and of tr(H) or tr(D) of what it reads.
With ``max|W_ij| ≤ μ ‖W‖_F / √(mn)`` and an absmax grid, rounding a layer to nearest costs an error
``tr(ΔW H ΔWᵀ)`` of about ``μ² ‖W‖²_F tr(H) / (n (2^b − 1)²)`` at most, and GPTQ the same with
tr(D), H = (U + I) D (U + I)ᵀ (QuIP, arXiv 2307.13304; OptRot, arXiv 2512.24124), as long as no
weight is clamped. Rotations leave ‖W‖_F, tr(H) and det(H) alone; they change μ and tr(D), which
can't pass ``n · det(H)^{1/n}``. A model is walked once, un-rotated and unquantized; each layer's
Hessians are rotated analytically.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rotlib.measure.weights import incoherence
from rotlib.models.families import READERS, Family
from rotlib.quantization.grids import WeightQuant, round_to_nearest
from rotlib.quantization.hessian import damped, hessians, pivots
from rotlib.quantization.solver import Solver
from rotlib.rotations.rotation import Rotation, placed_in_layer, times


@torch.no_grad()
def module_bounds(
    family: Family,
    rotation: Rotation,
    calibration: Int[Tensor, "windows length"],
    quant: WeightQuant,
    every: int = 1,
) -> list[dict]:
    """`stage_bounds` of every weight of every `every`-th layer, each line with its layer."""
    rotation = rotation.projected(family.device)
    lines = []
    for layer, H in enumerate(hessians(family, calibration)):
        if layer % every:
            continue
        placed = {weight.site: weight for weight in placed_in_layer(family, layer)}
        for sites in READERS:
            turn = rotation.on_inputs(placed[sites[0]].at, layer)
            turned = times(times(H[sites[0]].double(), turn).mT, turn)
            weights = {
                site: dict(placed[site].rotated(rotation, family.device))["weight"].float()
                for site in sites
            }
            lines += [line | {"layer": layer} for line in stage_bounds(weights, turned, quant)]
    return lines


def stage_bounds(
    weights: dict[str, Float[Tensor, "out n"]], H: Float[Tensor, "n n"], quant: WeightQuant
) -> list[dict]:
    """A line for each of the weights that read one input, in the coordinates that they and H have.

    In the units of tr(W H Wᵀ) for one token: `energy`, that itself; `rtn_error` and `gptq_error`;
    `rtn_bound` and `gptq_bound`, by the weight's μ; `row_bound`, GPTQ's with every output's own
    largest weight in the place of μ. `edge_codes` is the share of GPTQ's codes at either end of the
    grid, where clamping happens.
    """
    safe = damped(H, next(iter(weights)))
    n = len(H)
    tr_H, tr_D = H.diagonal().sum().item(), pivots(safe).sum().item()
    floor = n * (torch.logdet(safe) / n).exp().item()
    H = H.float()
    low, high = quant.codes
    levels = (2**quant.bits - 1) ** 2
    lines = []
    for site, W in weights.items():
        Q, error, _, fallback = Solver(quant)(W, H)
        nearest = round_to_nearest(W, quant).dense() - W
        mu, frobenius = incoherence(W), W.double().square().sum().item()
        peaks = W.abs().amax(1).double().square().sum().item()
        lines.append(
            {
                "site": site,
                "incoherence": mu,
                "tr_H": tr_H,
                "tr_D": tr_D,
                "floor": floor,
                "energy": _quadratic(W, H),
                "rtn_error": _quadratic(nearest, H),
                "gptq_error": error.sum().item(),
                "fallback": fallback,
                "rtn_bound": mu**2 * frobenius * tr_H / (n * levels),
                "gptq_bound": mu**2 * frobenius * tr_D / (n * levels),
                "row_bound": peaks * tr_D / levels,
                "edge_codes": ((Q.codes == low) | (Q.codes == high)).double().mean().item(),
            }
        )
    return lines


def _quadratic(W: Float[Tensor, "out n"], H: Float[Tensor, "n n"]) -> float:
    return (W @ H * W).sum().item()
