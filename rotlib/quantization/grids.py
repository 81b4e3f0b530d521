"""Grids for weights, the search for their scale, and round-to-nearest (RTN).

On an integer grid a weight row (or a group of `group_size` of its entries) is written as
``scale · (code − zero)`` with b-bit codes. The unclipped step is absmax/(2^(b−1)−½) ("half": GPTQ,
compressed-tensors), absmax/(2^(b−1)−1) ("full": QuaRot, SpinQuant) or, with the sign that puts the
largest entry on the lowest code, ±absmax/2^(b−1) ("signed": llama.cpp's Q4_0); asymmetric grids
span [min, max] with a rounded zero point. Clip search looks for the shrink factor among 1.00, 0.99
… 0.21 with the smallest Σ|w − q(w)|^2.4 (GPTQ's public code tries all 80; here 20 of them, coarse
to fine).

"nvfp4" and "mxfp4" are grids of 4-bit floats (E2M1: 0, ½, 1, 1½, 2, 3, 4, 6 and their negatives),
as today's hardware multiplies them: NVFP4 has an E4M3 scale for 16 weights and a float32 for a
tensor, MXFP4 (OCP Microscaling v1.0) a power of two for 32. Their codes are the floats themselves.
"""

from dataclasses import dataclass
from math import frexp
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from rotlib.checks import one_of, shown, whole_number, yes_or_no
from rotlib.models.families import READERS, Family, adapt, is_quantized, mark
from rotlib.models.sound import check_sound
from rotlib.rotations.rotation import check_sizes, placed_weights

CLIP_NORM = 2.4
CLIP_FACTORS = 1.0 - torch.arange(80) / 100  # 1.00 … 0.21
# coarse to fine: steps from the best so far
SEARCH = (tuple(range(0, 80, 8)), (-6, -4, -2, 0, 2, 4, 6), (-1, 0, 1))
HALVES = (1.0, 0.5, 0.25)
# entries searched at a time: temporaries stay in a processor's cache, and fill a GPU
_CHUNK = {"cpu": 2**19, "cuda": 2**26}
# how many steps short of the lowest code the largest weight lies
SHORT_OF = {"half": 0.5, "full": 1.0, "signed": 0.0}
CONVENTIONS = (*SHORT_OF,)
# the 4-bit floats: weights that share a scale
FP4 = {"nvfp4": 16, "mxfp4": 32}
GRIDS = ("int", *FP4)
FP4_LARGEST = 6.0
E4M3 = torch.float8_e4m3fn
# a tensor's largest weight has a scale of at most half of what E4M3 holds: GPTQ's may grow
E4M3_ROOM = torch.finfo(E4M3).max / 2
_SCALES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class WeightQuant:
    """How weights are quantized: to `bits` 2–8, on a symmetric grid or not.

    There is a scale an output channel, or one every `group_size` inputs. The grids "nvfp4" and
    "mxfp4" have groups of their own and leave of the rest only `clip_search` to choose. Raises
    ValueError at construction for values outside the choices.

    >>> WeightQuant(bits=3, group_size=128, symmetric=False).codes
    (0, 7)
    >>> WeightQuant(grid="nvfp4").group_size
    16
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True
    convention: str = "half"
    clip_search: bool = True
    grid: str = GRIDS[0]

    def __post_init__(self):
        one_of("grid", self.grid, GRIDS)
        if self.grid in FP4:
            self._check_fp4()
        whole_number("bits", self.bits, 2, 8)
        if self.group_size is not None:
            whole_number("group_size (unless it is None)", self.group_size, 1)
        one_of("convention", self.convention, CONVENTIONS)
        yes_or_no("symmetric", self.symmetric)
        yes_or_no("clip_search", self.clip_search)

    def _check_fp4(self) -> None:
        group = FP4[self.grid]
        own = {"bits": 4, "group_size": group, "symmetric": True, "convention": CONVENTIONS[0]}
        if self.group_size is None:
            object.__setattr__(self, "group_size", group)
        for name, value in own.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"the grid {self.grid} has {name} {value}, not {getattr(self, name)!r}"
                )

    @property
    def codes(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        if self.grid in FP4:
            return -int(FP4_LARGEST), int(FP4_LARGEST)
        half = 2 ** (self.bits - 1)
        return (-half, half - 1) if self.symmetric else (0, 2 * half - 1)

    @property
    def storage(self) -> torch.dtype:
        """The type that holds the codes."""
        if self.grid in FP4:
            return E4M3
        return torch.int8 if self.symmetric else torch.uint8

    def nearest_(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The codes nearest to these numbers, in their place; halves go to the even code."""
        if self.grid in FP4:
            size = x.abs()
            step = 0.5 + 0.5 * (size >= 2) + (size >= 4)
            x.div_(step).round_().mul_(step)
        else:
            x.round_()
        return x.clamp_(*self.codes)

    def in_units(self, W: Float[Tensor, "*n"]) -> tuple[Float[Tensor, "*n"], float]:
        """(a tensor over its unit, the power of two that all its scales are multiples of)"""
        if self.grid != "nvfp4" or not (largest := W.abs().max().item()):
            return W, 1.0
        unit = 2.0 ** frexp(largest / (FP4_LARGEST * E4M3_ROOM))[1]
        return W / unit, unit

    def unit_of(self, scale: Float[Tensor, "*n"]) -> float:
        """The smallest unit that scales which have one can be stored with."""
        if self.grid != "nvfp4":
            return 1.0
        return 2.0 ** (1 - frexp(torch.finfo(E4M3).max / scale.max().item())[1])

    def held(self, scale: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The scales that a tensor of unit 1 can have, nearest to these."""
        if self.grid == "nvfp4":
            return scale.clamp(max=torch.finfo(E4M3).max).to(E4M3).to(scale.dtype)
        if self.grid == "mxfp4":
            return torch.ldexp(torch.ones_like(scale), _exponent_of_two(scale))
        return scale

    def check_width(self, width: int, name: str) -> None:
        """Raises ValueError where the groups don't divide an input width."""
        if self.group_size and width % self.group_size:
            raise ValueError(
                f"group_size {self.group_size} doesn't divide the {width} inputs of {name}"
            )


class QuantizedWeight(NamedTuple):
    """A weight as it is stored: codes, and scale and zero point of every group of inputs.

    A single group is a scale an output channel.

    >>> codes = torch.tensor([[-1, 2]], dtype=torch.int8)
    >>> QuantizedWeight(codes, scale=torch.tensor([[0.5]]), zero=torch.zeros(1, 1)).dense()
    tensor([[-0.5000,  1.0000]])
    """

    codes: Shaped[Tensor, "out in"]  # int8; uint8 on an asymmetric grid; float8_e4m3fn of FP4
    scale: Float[Tensor, "out groups"]
    zero: Float[Tensor, "out groups"]

    def dense(self) -> Float[Tensor, "out in"]:
        """The weight that the codes stand for."""
        codes = self.codes.to(self.scale.dtype).unflatten(1, (self.scale.shape[1], -1))
        return codes.sub_(self.zero.unsqueeze(2)).mul_(self.scale.unsqueeze(2)).flatten(1)


class Grid(NamedTuple):
    """Scale and zero point of each row of a (rows, n) block, or of a column of rows entries."""

    scale: Float[Tensor, "rows *one"]
    zero: Float[Tensor, "rows *one"]
    quant: WeightQuant

    def codes(self, w: Float[Tensor, "rows *n"]) -> Float[Tensor, "rows *n"]:
        """The codes of the nearest points of the grid."""
        return self.quant.nearest_((w / self.scale).add_(self.zero))

    def round(self, w: Float[Tensor, "rows *n"]) -> Float[Tensor, "rows *n"]:
        """The nearest points of the grid."""
        return self.codes(w).sub_(self.zero).mul_(self.scale)

    def row(self) -> "Grid":
        """The same grid for a single column laid out as a vector of rows."""
        return Grid(self.scale.squeeze(-1), self.zero.squeeze(-1), self.quant)

    def widened(self, width: float) -> "Grid":
        """The same grid with scales `width` times as large, as near as its format has them."""
        return self if width == 1 else self._replace(scale=self.quant.held(width * self.scale))


def fit_grid(W: Float[Tensor, "rows n"], quant: WeightQuant) -> Grid:
    """The grid of each row, with the clip factor searched where `quant` says so."""
    if not quant.clip_search:
        return grid_at(W, quant, 1.0)
    rows = max(1, _CHUNK[W.device.type] // W.shape[1])
    factors = torch.cat([_best_factor(_in_reach(part), quant) for part in W.split(rows)])
    return grid_at(W, quant, factors)


def round_to_nearest(W: Float[Tensor, "out in"], quant: WeightQuant) -> QuantizedWeight:
    """W on its grid, per output channel or per group."""
    in_units, unit = quant.in_units(W)
    grouped = in_units.reshape(-1, quant.group_size or W.shape[1])
    grid = fit_grid(grouped, quant)
    scale, zero = (part.view(len(W), -1) for part in (grid.scale, grid.zero))
    codes = grid.codes(grouped).view_as(W).to(quant.storage)
    return QuantizedWeight(codes, scale * unit, zero)


def set_weight(linear: nn.Linear, weight: QuantizedWeight) -> QuantizedWeight:
    """Give a linear the weight that its codes stand for, and the codes, kept on the host."""
    linear.weight.copy_(weight.dense())
    linear.quantized = QuantizedWeight(*(part.cpu() for part in weight))
    return linear.quantized


@torch.no_grad()
def rtn(model: PreTrainedModel, quant: WeightQuant) -> dict[str, QuantizedWeight]:
    """Round every linear of every decoder layer to its nearest grid point, in place.

    Returns what was stored, by names such as "layers.0.q". Raises like `check_quantizable`.

    >>> weights = rtn(model, WeightQuant(bits=4))
    >>> weights["layers.1.down"].codes.shape == model.model.layers[1].mlp.down_proj.weight.shape
    True
    """
    family = adapt(model)
    check_quantizable(family, quant)
    # marked before it is: an interrupted model is neither the original nor quantized
    mark(model, "rotlib_quantized")
    weights = {}
    for layer in tqdm(range(len(family.layers)), desc="RTN", unit="layer"):
        linears = family.linears(layer)
        for sites in READERS:
            together = {f"layers.{layer}.{site}": linears[site] for site in sites}
            W = tall(together, family.device)
            weights |= set_together(together, round_to_nearest(W, quant))
    return weights


def tall(linears: dict[str, nn.Linear], device: torch.device) -> Float[Tensor, "out in"]:
    """The weights that read one input as a single matrix, which has one unit."""
    return torch.cat([linear.weight.to(device).float() for linear in linears.values()])


def set_together(
    linears: dict[str, nn.Linear], weight: QuantizedWeight
) -> dict[str, QuantizedWeight]:
    """Give each its rows of the matrix that `tall` made of them, by their names."""
    sizes = [linear.out_features for linear in linears.values()]
    parts = zip(*(part.split(sizes) for part in weight), strict=True)
    return {
        name: set_weight(linear, QuantizedWeight(*part))
        for (name, linear), part in zip(linears.items(), parts, strict=True)
    }


@torch.no_grad()
def restore(
    model: PreTrainedModel, weights: dict[str, QuantizedWeight], quant: WeightQuant | None = None
) -> PreTrainedModel:
    """Put quantized weights into a model prepared as theirs was, in place.

    They are what `rtn` returned, or `gptq` in its report's `weights`. Raises ValueError before
    touching anything where they don't fit, or aren't on the grid `quant` where it is given; where
    scales or zero points aren't finite; where the model is quantized already.

    >>> from copy import deepcopy
    >>> original = deepcopy(model)
    >>> weights = rtn(model, WeightQuant(bits=4))
    >>> torch.equal(restore(original, weights)(tokens).logits, model(tokens).logits)
    True
    """
    family = adapt(model)
    if is_quantized(model):
        raise ValueError(
            "this model is already quantized: load the original again and prepare it as theirs was"
        )
    if not isinstance(weights, dict):
        raise ValueError(
            "quantized weights come as a dictionary, such as report.weights, "
            f"not as a {type(weights).__name__}"
        )
    linears = {placed.name: placed.module for placed in placed_weights(family, quantized_only=True)}
    for name in linears.keys() | weights.keys():
        if name not in linears or not fits(weights.get(name), linears[name].weight):
            raise ValueError(
                f"these quantized weights belong to another model: {name} doesn't fit, or is no "
                "rl.QuantizedWeight"
            )
    if quant is not None and not isinstance(quant, WeightQuant):
        raise ValueError(f"quant must be a WeightQuant or None, not {shown(quant)}")
    for name, weight in weights.items():
        check_on_grid(name, weight, quant, model.dtype)
    mark(model, "rotlib_quantized")
    for name, weight in weights.items():
        set_weight(linears[name], weight)
    return model


def codes_of(model: PreTrainedModel) -> dict[str, QuantizedWeight]:
    """The codes of every quantized weight, by names such as "layers.0.q".

    Raises ValueError where one has none, or another weight by now than its codes stand for.
    """
    weights = {}
    for placed in placed_weights(adapt(model), quantized_only=True):
        weights[placed.name] = getattr(placed.module, "quantized", None)
        if not isinstance(weights[placed.name], QuantizedWeight):
            raise ValueError(
                f"{placed.name} has no codes: quantize the model with rl.gptq or rl.rtn first, "
                "or export it as 'fused'"
            )
        check_on_grid(placed.name, weights[placed.name])
        if not _stands_for(weights[placed.name], placed.module.weight):
            raise ValueError(
                f"the weight of {placed.name} was changed since it was quantized, so its codes "
                "aren't its own: load the original again and quantize it"
            )
    return weights


def _stands_for(codes: QuantizedWeight, weight: Tensor) -> bool:
    """Whether a weight is what its codes stand for, in its own dtype or rounded to 16 bits once."""
    dense, weight = codes.dense(), weight.to(codes.codes.device)
    return dense.shape == weight.shape and any(
        torch.equal(dense.to(dtype).to(weight.dtype), weight)
        for dtype in (weight.dtype, torch.bfloat16, torch.float16)
    )


def check_on_grid(
    name: str,
    weight: QuantizedWeight,
    quant: WeightQuant | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Raises ValueError for codes outside their grid, or a scale that no weight has.

    Without `quant` every code that their type holds is allowed. The weight is for a model of
    `dtype`.
    """
    codes, scale, zero = weight
    if not all(part.layout == torch.strided and not part.is_meta for part in weight):
        raise ValueError(f"the quantized weight {name} holds no values: it is meta or sparse")
    if not all(part.dtype in _SCALES for part in (scale, zero)):
        raise ValueError(
            f"the quantized weight {name} has scales of {scale.dtype} and zero points of "
            f"{zero.dtype}: both must be of a floating-point type"
        )
    whole = (
        (zero == zero.round()) & (zero >= 0) & (zero <= (255 if codes.dtype == torch.uint8 else 0))
    )
    floats = codes.dtype == E4M3
    # the farthest code that a type holds is 255 steps away
    largest = torch.finfo(dtype).max / 256
    usable = torch.isfinite(scale) & (scale != 0) & (scale.abs() < largest) & whole
    if codes.dtype not in (torch.int8, torch.uint8, E4M3) or not usable.all():
        raise ValueError(
            f"the quantized weight {name} is damaged: its codes must be int8, uint8 or 4-bit "
            f"floats, its scales not zero and within {dtype}, its zero points whole (0 where codes "
            "have a sign)"
        )
    values = codes.float() if floats else codes
    if floats and not _all_fp4(weight):
        raise ValueError(
            f"the quantized weight {name} is damaged: its codes must be 4-bit floats (E2M1) in "
            "groups of 16 or 32, its scales numbers that NVFP4 or MXFP4 has"
        )
    if quant is not None:
        low, high = quant.codes
        inside = low <= values.min() and values.max() <= high
        groups = codes.shape[1] // (quant.group_size or codes.shape[1])
        if codes.dtype != quant.storage or not inside or scale.shape[1] != groups:
            raise ValueError(
                f"the quantized weight {name} has codes outside {low} … {high}, or other groups: "
                "it is damaged, or of another grid"
            )


def grid_of(weight: QuantizedWeight) -> str:
    """Which of `GRIDS` a weight is on, by its codes' type and its groups."""
    group = weight.codes.shape[1] // weight.scale.shape[1]
    floats = weight.codes.dtype == E4M3
    return next((grid for grid, of in FP4.items() if floats and of == group), GRIDS[0])


def _all_fp4(weight: QuantizedWeight) -> bool:
    """Whether these are E2M1's floats, with scales of NVFP4 or MXFP4."""
    if (grid := grid_of(weight)) not in FP4 or not (weight.scale > 0).all():
        return False
    quant, codes = WeightQuant(grid=grid), weight.codes.float()
    scale = weight.scale / quant.unit_of(weight.scale)
    nearest = quant.nearest_(codes.clone()), quant.held(scale)
    return torch.equal(nearest[0], codes) and torch.equal(nearest[1], scale)


def fits(weight: QuantizedWeight | None, shape_of: Tensor) -> bool:
    """Whether these are a quantized weight's parts, of the shapes that this weight asks for."""
    if not isinstance(weight, QuantizedWeight):
        return False
    if not all(isinstance(part, Tensor) for part in weight) or weight.codes.shape != shape_of.shape:
        return False
    if weight.scale.ndim != 2 or weight.scale.shape != weight.zero.shape:
        return False
    rows, groups = weight.scale.shape
    return rows == len(shape_of) and groups > 0 and shape_of.shape[1] % groups == 0


def check_quantizable(family: Family, quant: WeightQuant) -> None:
    """Raises ValueError where a model's weights can't be quantized so.

    It is quantized already, the groups don't divide a width, or its weights aren't finite.
    """
    if not isinstance(quant, WeightQuant):
        raise ValueError(
            f"quant must be a WeightQuant such as WeightQuant(bits=4), not {shown(quant)}"
        )
    if is_quantized(family.model):
        raise ValueError(
            "this model is already quantized: load the original again and quantize it once"
        )
    for name, linear in family.linears(0).items():
        quant.check_width(linear.in_features, f"{name}_proj")
    check_sound(family.model)
    check_sizes(family, 1e-30, 1e30, "grids are computed with (float32)")


def grid_at(W: Float[Tensor, "rows n"], quant: WeightQuant, factor: Tensor | float) -> Grid:
    """The grid of each row whose range is `factor` times the unclipped one.

    A row of zeros gets step 1.
    """
    if quant.grid in FP4:
        scale = quant.held(W.abs().amax(dim=1, keepdim=True) * factor / FP4_LARGEST)
        zero = torch.zeros_like(scale)
    elif quant.symmetric:
        largest = W.abs().amax(dim=1, keepdim=True)
        steps = 2 ** (quant.bits - 1) - SHORT_OF[quant.convention]
        if quant.convention == "signed":  # a scale's sign puts the largest entry on the lowest code
            largest = torch.where(W.amin(dim=1, keepdim=True) > -largest, -largest, largest)
        scale = largest * factor / steps
        zero = torch.zeros_like(scale)
    else:
        bottom = W.amin(dim=1, keepdim=True).clamp(max=0) * factor
        top = W.amax(dim=1, keepdim=True).clamp(min=0) * factor
        scale = (top - bottom) / quant.codes[1]
        zero = (-bottom / torch.where(scale > 0, scale, 1)).round()
    return Grid(torch.where(scale != 0, scale, 1), zero, quant)


def _exponent_of_two(scale: Tensor) -> Tensor:
    """The exponent of MXFP4's scale where 6 of it should reach 6 of these.

    What would round to 8 doubles the scale, as in compressed-tensors: from 7 on.
    """
    return torch.frexp(scale * (FP4_LARGEST / 7)).exponent


def _in_reach(W: Tensor) -> Tensor:
    """W with rows of extreme size brought to one, by a power of two, which changes no code.

    The power of an error would overflow there, or vanish.
    """
    largest = W.abs().amax(dim=1, keepdim=True)
    extreme = (largest > 0) & ((largest < 1e-8) | (largest > 1e8))
    exponent = torch.where(extreme, torch.frexp(largest).exponent, 0)
    return torch.ldexp(W, -exponent) if extreme.any() else W


def _best_factor(W: Tensor, quant: WeightQuant) -> Float[Tensor, "rows 1"]:
    """The best clip factor of each row, coarse to fine over `CLIP_FACTORS`.

    MXFP4's scales are powers of two: there three factors stand for all.
    """
    halves = quant.grid == "mxfp4"
    factors = W.new_tensor(HALVES) if halves else CLIP_FACTORS.to(W)
    best = torch.zeros(len(W), 1, dtype=torch.long, device=W.device)
    for offsets in (tuple(range(len(HALVES))),) if halves else SEARCH:
        candidates = (best + torch.tensor(offsets, device=W.device)).clamp(0, len(factors) - 1)
        shrunk = (factors[index].unsqueeze(1) for index in candidates.unbind(1))
        errors = [_clip_error(W, quant, factor) for factor in shrunk]
        best = candidates.gather(1, torch.stack(errors, dim=1).argmin(dim=1, keepdim=True))
    return factors[best]


def _clip_error(W: Tensor, quant: WeightQuant, factor: Tensor) -> Float[Tensor, " rows"]:
    return grid_at(W, quant, factor).round(W).sub_(W).abs_().pow_(CLIP_NORM).sum(dim=1)
