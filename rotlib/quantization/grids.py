"""Grids for weights, the search for their scale, and round-to-nearest (RTN).

On an integer grid a weight row (or a group of `group_size` of its entries) is written as
``scale · (code − zero)`` with b-bit codes. The unclipped step is absmax/(2^(b−1)−½) ("half": GPTQ,
compressed-tensors), absmax/(2^(b−1)−1) ("full": QuaRot, SpinQuant) or, with the sign that puts the
largest entry on the lowest code, ±absmax/2^(b−1) ("signed": llama.cpp's Q4_0); asymmetric grids
span [min, max] with a rounded zero point. Clip search looks for the shrink factor among 1.00, 0.99
… 0.21 with the smallest Σ|w − q(w)|^2.4, or to another power, the `clip_norm` (GPTQ's public code
tries all 80; here 20 of them, coarse to fine).

"nvfp4" and "mxfp4" are grids of 4-bit floats (`fp4.py`). Their codes are the floats themselves.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from rotlib.checks import one_of, positive, whole_number, yes_or_no
from rotlib.quantization.fp4 import (
    E4M3,
    FP4,
    FP4_LARGEST,
    HALVES,
    held,
    nearest_fp4_,
    unit_for,
    unit_of,
)

CLIP_NORM = 2.4
HIGH_POWER = 4.0
# 1.00 … 0.21, whatever torch's defaults were when this was imported
CLIP_FACTORS = 1.0 - torch.arange(80, dtype=torch.float32, device="cpu") / 100
# coarse to fine: steps from the best so far
SEARCH = (tuple(range(0, 80, 8)), (-6, -4, -2, 0, 2, 4, 6), (-1, 0, 1))
# entries searched at a time: temporaries stay in a processor's cache, and fill a GPU
_CHUNK = {"cpu": 2**19, "cuda": 2**26}
# how many steps short of the lowest code the largest weight lies
SHORT_OF = {"half": 0.5, "full": 1.0, "signed": 0.0}
CONVENTIONS = (*SHORT_OF,)
GRIDS = ("int", *FP4)


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
    clip_norm: float = CLIP_NORM
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
        positive("clip_norm", self.clip_norm)
        if self.clip_norm > 10:
            raise ValueError(f"clip_norm {self.clip_norm} is beyond 10, where powers overflow")

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
        return nearest_fp4_(x) if self.grid in FP4 else x.round_().clamp_(*self.codes)

    def in_units(self, W: Float[Tensor, "*n"]) -> tuple[Float[Tensor, "*n"], float]:
        """(a tensor over its unit, the power of two that all its scales are multiples of)"""
        if self.grid != "nvfp4":
            return W, 1.0
        unit = unit_for(W.abs().max().item())
        return W / unit, unit

    def unit_of(self, scale: Float[Tensor, "*n"]) -> float:
        """The smallest unit that scales which have one can be stored with."""
        return unit_of(scale) if self.grid == "nvfp4" else 1.0

    def held(self, scale: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The scales that a tensor of unit 1 can have, nearest to these."""
        return held(self.grid, scale) if self.grid in FP4 else scale

    def check_width(self, width: int, name: str) -> None:
        """Raises ValueError where the groups don't divide an input width."""
        if self.group_size and width % self.group_size:
            raise ValueError(
                f"group_size {self.group_size} doesn't divide the {width} inputs of {name}"
            )


class QuantizedWeight(NamedTuple):
    """A weight as it is stored: codes, and scale and zero point of every group of inputs.

    A single group is a scale an output channel. What quantizes a model adds a sketch of the weight
    that they were made from, by which they are known again.

    >>> codes = torch.tensor([[-1, 2]], dtype=torch.int8)
    >>> QuantizedWeight(codes, scale=torch.tensor([[0.5]]), zero=torch.zeros(1, 1)).dense()
    tensor([[-0.5000,  1.0000]])
    """

    codes: Shaped[Tensor, "out in"]  # int8; uint8 on an asymmetric grid; float8_e4m3fn of FP4
    scale: Float[Tensor, "out groups"]
    zero: Float[Tensor, "out groups"]
    sketch: Float[Tensor, "out 1"] | None = None

    @property
    def stored(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a checkpoint holds: codes, scale and zero."""
        return self[:3]

    def dense(self) -> Float[Tensor, "out in"]:
        """The weight that the codes stand for; raises ValueError for parts that don't fit."""
        codes, scale, zero = (tuple(part.shape) for part in self.stored)
        if scale != zero or len(codes) != 2 or scale[:1] != codes[:1] or codes[1] % scale[-1]:
            raise ValueError(f"codes {codes} don't have scales {scale} and zero points {zero}")
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
    factors = torch.cat([_best_factor(_in_reach(part, quant), quant) for part in W.split(rows)])
    return grid_at(W, quant, factors)


def round_to_nearest(W: Float[Tensor, "out in"], quant: WeightQuant) -> QuantizedWeight:
    """W on its grid, per output channel or per group."""
    in_units, unit = quant.in_units(W)
    grouped = in_units.reshape(-1, quant.group_size or W.shape[1])
    grid = fit_grid(grouped, quant)
    scale, zero = (part.view(len(W), -1) for part in (grid.scale, grid.zero))
    codes = grid.codes(grouped).view_as(W).to(quant.storage)
    return QuantizedWeight(codes, scale * unit, zero)


def grid_at(W: Float[Tensor, "rows n"], quant: WeightQuant, factor: Tensor | float) -> Grid:
    """The grid of each row whose range is `factor` times the unclipped one.

    A row of zeros gets step 1.
    """
    return _grid_between(*W.aminmax(dim=1, keepdim=True), quant, factor)


def _grid_between(
    lowest: Float[Tensor, "rows 1"],
    highest: Float[Tensor, "rows 1"],
    quant: WeightQuant,
    factor: Tensor | float,
) -> Grid:
    """The grid of rows with these smallest and largest entries."""
    largest = torch.maximum(-lowest, highest)
    zero = torch.zeros_like(largest)
    if quant.grid in FP4:
        scale = quant.held(largest * factor / FP4_LARGEST)
    elif quant.symmetric:
        steps = 2 ** (quant.bits - 1) - SHORT_OF[quant.convention]
        if quant.convention == "signed":  # a scale's sign puts the largest entry on the lowest code
            largest = torch.where(lowest > -largest, -largest, largest)
        scale = largest * factor / steps
    else:
        bottom = lowest.clamp(max=0) * factor
        top = highest.clamp(min=0) * factor
        scale = (top - bottom) / quant.codes[1]
        zero = (-bottom / torch.where(scale > 0, scale, 1)).round()
    return Grid(torch.where(scale != 0, scale, 1), zero, quant)


def _in_reach(W: Tensor, quant: WeightQuant) -> Tensor:
    """W with rows of extreme size brought to one, by a power of two, which changes no code.

    The power of an error would overflow there, or vanish, as a high power does anywhere.
    """
    largest = W.abs().amax(dim=1, keepdim=True)
    extreme = (largest > 0) & ((largest < 1e-8) | (largest > 1e8))
    extreme |= (largest > 0) & (quant.clip_norm > HIGH_POWER)
    exponent = torch.where(extreme, torch.frexp(largest).exponent, 0)
    return torch.ldexp(W, -exponent) if extreme.any() else W


def _best_factor(W: Tensor, quant: WeightQuant) -> Float[Tensor, "rows 1"]:
    """The best clip factor of each row, coarse to fine over `CLIP_FACTORS`.

    MXFP4's scales are powers of two: there three factors stand for all.
    """
    ends = W.aminmax(dim=1, keepdim=True)
    unclipped = _grid_between(*ends, quant, 1.0).scale
    halves = quant.grid == "mxfp4"
    factors = W.new_tensor(HALVES) if halves else CLIP_FACTORS.to(W)
    best = torch.zeros(len(W), 1, dtype=torch.long, device=W.device)
    for offsets in (tuple(range(len(HALVES))),) if halves else SEARCH:
        candidates = (best + torch.tensor(offsets, device=W.device)).clamp(0, len(factors) - 1)
        shrunk = (factors[index].unsqueeze(1) for index in candidates.unbind(1))
        grids = (_grid_between(*ends, quant, factor) for factor in shrunk)
        errors = [_clip_error(W, grid, unclipped) for grid in grids]
        best = candidates.gather(1, torch.stack(errors, dim=1).argmin(dim=1, keepdim=True))
    return factors[best]


def _clip_error(
    W: Float[Tensor, "rows n"], grid: Grid, unit: Float[Tensor, "rows 1"]
) -> Float[Tensor, " rows"]:
    """Σ|w − q(w)| of each row to the power of the clip norm, in units of a scale of it."""
    power = grid.quant.clip_norm
    steps = (W / grid.scale).add_(grid.zero)
    off = grid.quant.nearest_(steps.clone()).sub_(steps).abs_()
    return _to_power_(off, power).sum(dim=1) * (grid.scale / unit).abs().pow(power).squeeze(1)


def _to_power_(x: Float[Tensor, "*n"], power: float) -> Float[Tensor, "*n"]:
    """Numbers of at least 0 to a power, in their place; a CPU's pow takes four times as long."""
    return x.log_().mul_(power).exp_() if x.device.type == "cpu" else x.pow_(power)
