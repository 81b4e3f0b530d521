"""Integer grids for weights, the search for their scale, and round-to-nearest (RTN).

A weight row (or a group of `group_size` of its entries) is written as ``scale · (code − zero)`` with b-bit codes. The
unclipped step is absmax/(2^(b−1)−½) ("half": GPTQ, compressed-tensors) or absmax/(2^(b−1)−1) ("full": QuaRot,
SpinQuant); asymmetric grids span [min, max] with a rounded zero point. Clip search looks for the shrink factor among
1.00, 0.99 … 0.21 with the smallest Σ|w − q(w)|^2.4 (GPTQ's public code tries all 80; here 20 of them, coarse to fine).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from rotlib.checks import one_of, whole_number, yes_or_no
from rotlib.families import Family, adapt, check_finite
from rotlib.fuse import is_quantized
from rotlib.rotation import placed_weights

CLIP_NORM = 2.4
CLIP_FACTORS = 1.0 - torch.arange(80) / 100  # 1.00 … 0.21
_SEARCH = (tuple(range(0, 80, 8)), (-6, -4, -2, 0, 2, 4, 6), (-1, 0, 1))  # coarse to fine: steps from the best so far
_CHUNK = 2**19  # entries searched at a time, so that temporaries stay in the processor's cache
CONVENTIONS = ("half", "full")


@dataclass(frozen=True)
class WeightQuant:
    """How weights are quantized: `bits` 2–8, one scale per output channel or per `group_size` inputs.

    Raises ValueError at construction for bits or a convention outside the choices.
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True
    convention: str = "half"
    clip_search: bool = True

    def __post_init__(self):
        whole_number("bits", self.bits, 2, 8)
        if self.group_size is not None:
            whole_number("group_size (unless it is None)", self.group_size, 1)
        one_of("convention", self.convention, CONVENTIONS)
        yes_or_no("symmetric", self.symmetric)
        yes_or_no("clip_search", self.clip_search)

    @property
    def codes(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        return (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1) if self.symmetric else (0, 2**self.bits - 1)

    @property
    def storage(self) -> torch.dtype:
        """The integer type that holds the codes."""
        return torch.int8 if self.symmetric else torch.uint8

    def check_width(self, width: int, name: str) -> None:
        """Raises ValueError where the groups don't divide an input width."""
        if self.group_size and width % self.group_size:
            raise ValueError(f"group_size {self.group_size} doesn't divide the {width} inputs of {name}")


class QuantizedWeight(NamedTuple):
    """A weight as it is stored: codes, and scale and zero point of every group of inputs (one group: per channel)."""

    codes: Int[Tensor, "out in"]  # int8, or uint8 on an asymmetric grid
    scale: Float[Tensor, "out groups"]
    zero: Float[Tensor, "out groups"]

    def dense(self) -> Float[Tensor, "out in"]:
        """The weight that the codes stand for."""
        codes = self.codes.to(self.scale.dtype).unflatten(1, (self.scale.shape[1], -1))
        return codes.sub_(self.zero.unsqueeze(2)).mul_(self.scale.unsqueeze(2)).flatten(1)


class Grid(NamedTuple):
    """Scale and zero point of each row of a (rows, n) block; both broadcast against it."""

    scale: Float[Tensor, "rows 1"]
    zero: Float[Tensor, "rows 1"]
    low: int
    high: int

    def codes(self, w: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
        """The codes of the nearest points of the grid."""
        return (w / self.scale).add_(self.zero).round_().clamp_(self.low, self.high)

    def round(self, w: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
        """The nearest points of the grid."""
        return self.codes(w).sub_(self.zero).mul_(self.scale)

    def row(self) -> "Grid":
        """The same grid for a single column laid out as a vector of rows."""
        return Grid(self.scale.squeeze(-1), self.zero.squeeze(-1), self.low, self.high)


def fit_grid(W: Float[Tensor, "rows n"], quant: WeightQuant) -> Grid:
    """The grid of each row, with the clip factor searched where `quant` says so."""
    if not quant.clip_search:
        return grid_at(W, quant, 1.0)
    rows = max(1, _CHUNK // W.shape[1])
    factors = torch.cat([_best_factor(part, quant) for part in W.split(rows)])
    return grid_at(W, quant, factors)


def round_to_nearest(W: Float[Tensor, "out in"], quant: WeightQuant) -> QuantizedWeight:
    """W on its grid, per output channel or per group."""
    grouped = W.reshape(-1, quant.group_size or W.shape[1])
    grid = fit_grid(grouped, quant)
    scale, zero = (part.view(len(W), -1) for part in (grid.scale, grid.zero))
    return QuantizedWeight(grid.codes(grouped).view_as(W).to(quant.storage), scale, zero)


def set_weight(linear: nn.Linear, weight: QuantizedWeight) -> QuantizedWeight:
    """Give a linear the weight that its codes stand for, and on the host the codes themselves, which an export writes."""
    linear.weight.copy_(weight.dense())
    linear.quantized = QuantizedWeight(*(part.cpu() for part in weight))
    return linear.quantized


@torch.no_grad()
def rtn(model: PreTrainedModel, quant: WeightQuant) -> dict[str, QuantizedWeight]:
    """Round every linear of every decoder layer to its nearest grid point, in place; raises like `check_quantizable`.

    Returns what was stored, by names such as "layers.0.q".
    """
    family = check_quantizable(model, quant)
    model.config.rotlib_quantized = True  # first: an interrupted model is neither the original nor quantized
    weights = {}
    for placed in tqdm(list(placed_weights(family, quantized_only=True)), desc="RTN", unit="weight"):
        weight = placed.module.weight.to(family.device).float()
        weights[placed.name] = set_weight(placed.module, round_to_nearest(weight, quant))
    return weights


@torch.no_grad()
def restore(model: PreTrainedModel, weights: dict[str, QuantizedWeight]) -> PreTrainedModel:
    """Put weights that `rtn` returned, or `gptq` in its report's `weights`, into a model prepared as theirs was, in place.

    Raises ValueError before touching anything where they don't fit, or the model is quantized already.
    """
    family = adapt(model)
    if is_quantized(model):
        raise ValueError("this model is already quantized: load the original again and prepare it as theirs was")
    if not isinstance(weights, dict):
        raise ValueError(f"quantized weights come as a dictionary, such as report.weights, not as a {type(weights).__name__}")
    placed_by_name = {placed.name: placed for placed in placed_weights(family, quantized_only=True)}
    for name in placed_by_name.keys() | weights.keys():
        if name not in placed_by_name or not _fits(weights.get(name), placed_by_name[name].module.weight):
            raise ValueError(f"these quantized weights belong to another model: {name} doesn't fit")
    model.config.rotlib_quantized = True
    for name, weight in weights.items():
        set_weight(placed_by_name[name].module, weight)
    return model


def _fits(weight: QuantizedWeight | None, shape_of: Tensor) -> bool:
    if not isinstance(weight, QuantizedWeight) or weight.codes.shape != shape_of.shape or weight.scale.shape != weight.zero.shape:
        return False
    rows, groups = weight.scale.shape
    return rows == len(shape_of) and groups > 0 and shape_of.shape[1] % groups == 0 and bool(torch.isfinite(weight.scale).all())


def check_quantizable(model: PreTrainedModel, quant: WeightQuant) -> Family:
    """The model's family, once it is known that its weights can be quantized so.

    Raises ValueError for a model quantized before, groups that don't divide a width, or non-finite weights.
    """
    family = adapt(model)
    if not isinstance(quant, WeightQuant):
        raise ValueError(f"quant must be a WeightQuant such as WeightQuant(bits=4), not {quant!r}")
    if is_quantized(model):
        raise ValueError("this model is already quantized: load the original again and quantize it once")
    for name, linear in family.linears(0).items():
        quant.check_width(linear.in_features, f"{name}_proj")
    check_finite(model)
    return family


def grid_at(W: Float[Tensor, "rows n"], quant: WeightQuant, factor: Tensor | float) -> Grid:
    """The grid of each row whose range is `factor` times the unclipped one; all-zero rows get the step 1."""
    low, high = quant.codes
    if quant.symmetric:
        steps = 2 ** (quant.bits - 1) - (0.5 if quant.convention == "half" else 1.0)
        scale = W.abs().amax(dim=1, keepdim=True) * factor / steps
        zero = torch.zeros_like(scale)
    else:
        bottom = W.amin(dim=1, keepdim=True).clamp(max=0) * factor
        top = W.amax(dim=1, keepdim=True).clamp(min=0) * factor
        scale = (top - bottom) / high
        zero = (-bottom / torch.where(scale > 0, scale, 1)).round()
    return Grid(torch.where(scale > 0, scale, 1), zero, low, high)


def _best_factor(W: Tensor, quant: WeightQuant) -> Float[Tensor, "rows 1"]:
    """The best clip factor of each row, coarse to fine over `CLIP_FACTORS`."""
    factors = CLIP_FACTORS.to(W)
    best = torch.zeros(len(W), 1, dtype=torch.long, device=W.device)
    for offsets in _SEARCH:
        candidates = (best + torch.tensor(offsets, device=W.device)).clamp(0, len(factors) - 1)
        errors = [_clip_error(W, quant, factors[index].unsqueeze(1)) for index in candidates.unbind(1)]
        best = candidates.gather(1, torch.stack(errors, dim=1).argmin(dim=1, keepdim=True))
    return factors[best]


def _clip_error(W: Tensor, quant: WeightQuant, factor: Tensor) -> Float[Tensor, " rows"]:
    return grid_at(W, quant, factor).round(W).sub_(W).abs_().pow_(CLIP_NORM).sum(dim=1)
