"""What a rotation leaves for scales of weight groups: how unlike the coordinates of one group are, and how large its largest weight.

GSR's argument (arXiv 2505.03810, §3) is that columns ordered by sequency bring coordinates of like energy together, so that a
group's own scale fits it better. Both ends of it are measured on the rotated weights: the share of the spread of the coordinates'
energies (log Σ_i W_ij²) that lies within groups, and the mean squared peak of a group over the mean square of its matrix, which is what
the error of rounding to nearest is proportional to.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rotlib import store
from rotlib.checks import whole_number
from rotlib.families import adapt
from rotlib.grouped import check_group
from rotlib.pipeline import rotation_of
from rotlib.recipe import Recipe
from rotlib.rotation import Rotation, placed_weights
from rotlib.store import Record, Result
from rotlib.zoo import load, pick_device

SHOWN_LAYER = 10  # whose coordinates' energies are kept, or the last layer of a smaller model


def groups(recipe: Recipe, group_size: int, device: str = "auto") -> Result:
    """`group_spread` of every weight under the recipe's rotation (`rotation`, `seed`), kept like a run.

    `energies` holds, for the coordinates that q reads in one layer, Σ_i W_ij² over its mean. Raises ValueError where the groups don't
    divide a weight's inputs.
    """
    if not isinstance(recipe, Recipe):
        raise ValueError(f"groups are of a Recipe, such as rl.Recipe(rotation='gsr', block=64), not of {recipe!r}")
    whole_number("group_size", group_size, 1)
    recipe = recipe.of_rotation()
    picked = pick_device(device)
    spec = recipe.spec() | {"task": "groups", "groups_of": group_size}
    return store.once(spec, picked, lambda record: _compute(recipe, group_size, picked, record))


@torch.no_grad()
def _compute(recipe: Recipe, group_size: int, device: torch.device, record: Record) -> None:
    model, _ = load(recipe.model, str(device))
    family = adapt(model)
    check_group(family, group_size)
    rotation = (rotation_of(recipe, model, record) or Rotation(None, None)).projected(family.device)
    record.metrics["modules"] = []
    for placed in placed_weights(family, quantized_only=True):
        W = dict(placed.rotated(rotation, family.device))["weight"]
        record.metrics["modules"].append({"site": placed.site, "layer": placed.layer} | group_spread(W, group_size))
        if (placed.site, placed.layer) == ("q", min(SHOWN_LAYER, len(family.layers) - 1)):
            energy = W.square().sum(0)
            record.metrics["energies"] = [float(f"{value:.4g}") for value in energy / energy.mean()]


def group_spread(W: Float[Tensor, "out in"], group_size: int) -> dict[str, float]:
    """`within`, the share of the variance of the inputs' log energies that lies within groups; `peak`, a group's mean squared largest
    weight over the matrix's mean square.

    `within` is 1 where groups are alike, 0 where the inputs of every group are.
    """
    W = W.double()
    log = W.square().sum(0).clamp_min(1e-300).log().view(-1, group_size)
    total = log.var(correction=0)
    within = (log.var(dim=1, correction=0).mean() / total).item() if total > 0 else 1.0
    peaks = W.abs().view(len(W), -1, group_size).amax(2).square()
    return {"within": within, "peak": (peaks.mean() / W.square().mean().clamp_min(1e-300)).item()}
