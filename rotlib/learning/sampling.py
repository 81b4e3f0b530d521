"""What a step of OptRot's descent sees: drawn rows for R1, all of R2's, their fourth powers' slope.

Rows are drawn with probability ∝ ‖row‖⁴ and scaled to unit norm, which keeps the gradient unbiased;
the draw is systematic, and it is used up before the next one, so that momentum averages the
sampling noise away. `grouped.py` draws groups of rows likewise, ∝ their energy.
"""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from rotlib.learning.objectives import Matrix
from rotlib.precision import slope_dtype
from rotlib.rotations.rotation import Rotation, times

BATCH = 8192  # rows per step, or all there are
STEPS_A_DRAW = 8


def fourth_power(rows: Float[Tensor, "m n"], R: Tensor) -> tuple[Tensor, Tensor]:
    """(‖rows R‖₄⁴, its gradient with respect to R), multiplied in the rows' dtype.

    The value is a quarter of ⟨R, gradient⟩, by Euler's theorem.
    """
    rotated = times(rows, R.to(rows.dtype))
    gradient = 4 * pull_back(rows, rotated.square().mul_(rotated), R)
    return (R * gradient).sum() / 4, gradient


def pull_back(rows: Float[Tensor, "m n"], slope: Float[Tensor, "m n"], R: Tensor) -> Tensor:
    """From the slope with respect to ``rows R`` to that with respect to R: a matrix, or blocks."""
    slope = slope.to(rows.dtype)
    if R.ndim == 2:
        return (rows.mT @ slope).to(R.dtype)
    by_block = (part.unflatten(1, (len(R), -1)) for part in (rows, slope))
    return torch.einsum("mka,mkb->kab", *by_block).to(R.dtype)


class RowSampler:
    """Rows for R1, or runs of `unit` rows, at unit norm, drawn ∝ factor · norm^power at the start.

    `scale` turns the sum over a batch into an estimate of the objective.
    """

    def __init__(
        self,
        matrices: list[Matrix],
        rotation: Rotation,
        seed: int,
        unit: int = 1,
        power: int = 4,
        batch: int = BATCH,
    ):
        self._matrices = [matrix for matrix in matrices if matrix.touched_by("R1")]
        self._device = rotation.R1.device
        self._generator = torch.Generator().manual_seed(seed)
        self._unit, self._power = unit, power
        self._norms = [
            self._units(matrix, rotation, slice(None)).flatten(1).norm(dim=1).cpu()
            for matrix in self._matrices
        ]
        self._starts = torch.tensor([0] + [len(norm) for norm in self._norms]).cumsum(0)
        self._size = min(batch // unit, int(self._starts[-1]))
        self.reweigh()

    @property
    def scale(self) -> float:
        return self._total / self._size

    def reweigh(self) -> None:
        """Take up the matrices' factors as they are now."""
        paired = zip(self._norms, self._matrices, strict=True)
        shares = torch.cat(
            [norm.double() ** self._power * matrix.factor for norm, matrix in paired]
        )
        self._total = shares.sum().item()
        self._cumulative = shares.cumsum(0) / self._total

    def draw(self, rotation: Rotation) -> None:
        """Rows for the next `STEPS_A_DRAW` steps, by systematic sampling.

        Every row comes as often as it should, to within one.
        """
        count = STEPS_A_DRAW * self._size
        offset = torch.rand(1, generator=self._generator, dtype=torch.float64, device="cpu")
        points = (torch.arange(count) + offset) / count
        chosen = torch.searchsorted(self._cumulative, points).clamp_(max=len(self._cumulative) - 1)
        bounds = torch.searchsorted(chosen, self._starts).tolist()
        place = torch.randperm(count, generator=self._generator, device="cpu").to(self._device)
        width = rotation.R1.shape[-1] * (len(rotation.R1) if rotation.R1.ndim == 3 else 1)
        dtype = slope_dtype(self._device)
        self._rows = torch.empty(count, self._unit, width, device=self._device, dtype=dtype)
        for which, (begin, end) in enumerate(pairwise(bounds)):
            index = chosen[begin:end] - self._starts[which]
            norm = self._norms[which][index].clamp_min(1e-30).view(-1, 1, 1)
            rows = self._units(self._matrices[which], rotation, index)
            self._rows[place[begin:end]] = rows.div_(norm.to(rows)).to(dtype)

    def batch(self, number: int, exactly: bool = False) -> Float[Tensor, "batch d"]:
        """One step's rows of the current draw.

        R1 is rounded as they are, which a Hadamard matrix's equal entries show in the objective's
        value, unless they are asked for `exactly`.
        """
        rows = self._rows[number * self._size : (number + 1) * self._size].flatten(0, 1)
        return rows.float() if exactly else rows

    def slope(self, number: int, R1: Tensor, exactly: bool = False) -> tuple[Tensor, Tensor]:
        """(value, gradient) of one step's rows, to be scaled by `scale`."""
        return fourth_power(self.batch(number, exactly), R1)

    def _units(
        self, matrix: Matrix, rotation: Rotation, index: Tensor | slice
    ) -> Float[Tensor, "units unit d"]:
        if self._unit == 1:
            return matrix.rows("R1", rotation, index).unsqueeze(1)
        return matrix.rows("R1", rotation).unflatten(0, (-1, self._unit))[index]


class R2Rows:
    """Everything R2 acts on at the present R1, stacked by layer and KV head, in a dtype."""

    def __init__(
        self, matrices: list[Matrix], rotation: Rotation, dtype: torch.dtype = torch.float32
    ):
        by_layer = [[] for _ in range(len(rotation.R2))]
        for matrix in matrices:
            if matrix.touched_by("R2"):
                by_layer[matrix.layer].append(rows_by_head(matrix, rotation) * matrix.factor**0.25)
        # (layers, heads, m, b)
        self._rows = torch.stack([torch.cat(rows, dim=1).to(dtype) for rows in by_layer])

    def gradient(self, R2: Float[Tensor, "layers heads b b"]) -> Float[Tensor, "layers heads b b"]:
        rotated = self._rows @ R2.to(self._rows.dtype)
        return 4 * (self._rows.mT @ rotated.square().mul_(rotated)).to(R2.dtype)


def rows_by_head(matrix: Matrix, rotation: Rotation) -> Float[Tensor, "heads m b"]:
    """What R2 acts on in one weight, a KV head at a time."""
    _, heads, b, _ = rotation.R2.shape
    return matrix.rows("R2", rotation).unflatten(1, (heads, -1, b)).movedim(1, 0).flatten(1, 2)
