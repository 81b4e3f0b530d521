"""OptRot for group scales: a group's step is set by its own largest weight, which has to be small.

With one scale for `group_size` inputs, a group's rounding error is its squared step, ∝ max w². The
fourth moment softens the maximum: ``L = Σ_groups (Σ_{w in group} w⁴)^{1/2}``. This form is
**inferred** from the bound behind OptRot (arXiv 2512.24124): the paper's own objective, Σ w⁴, is
separable and knows nothing of where a group ends, and it counts a group by its squared energy, this
one by its energy. What a group is depends on the side: R1 mixes the inputs of q, k, v, gate and up,
so their groups lie within a rotated row; it mixes the outputs of o and down, whose groups are runs
of inputs, one for every rotated output.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rotlib.checks import whole_number
from rotlib.learning.objectives import Matrix, rotated_values
from rotlib.learning.sampling import BATCH, RowSampler, pull_back, rows_by_head
from rotlib.models.families import Family
from rotlib.quantization.grids import WeightQuant
from rotlib.rotations.rotation import Rotation, times


def check_group(family: Family, group_size: int) -> None:
    """Raises ValueError where the groups don't divide a quantized weight's inputs."""
    grid = WeightQuant(group_size=whole_number("group_size", group_size, 1))
    for name, linear in family.linears(0).items():
        grid.check_width(linear.in_features, f"{name}_proj")


def group_norms(
    rotated: Float[Tensor, "*batch m n"], group_size: int, across: bool
) -> tuple[Tensor, Float[Tensor, "*batch m n"]]:
    """(Σ over groups of (Σ w⁴)^{1/2}, its slope).

    Groups are of columns within a row, or `across` rows within a column.
    """
    axis = -2 if across else -1
    cut = rotated.unflatten(axis, (-1, group_size))
    square = cut.square()
    norms = square.square().sum(axis, keepdim=True).sqrt()
    least = torch.finfo(norms.dtype).tiny ** 0.5  # below, w⁴ has vanished and w³ has not
    slope = 2 * cut * square / norms.clamp_min(least)
    return norms.sum(), slope.flatten(axis - 1, axis)


def sum_of_group_norms(matrices: list[Matrix], rotation: Rotation, group_size: int) -> float:
    """The objective, in full."""
    return sum(
        group_norms(rotated_values(matrix, rotation), group_size, across=False)[0].item()
        for matrix in matrices
    )


class GroupSampler:
    """What `RowSampler` is to single rows: rows of readers, runs of rows of writers, ∝ energy."""

    scale = 1.0  # its slopes are estimates of the objective's already

    def __init__(self, matrices: list[Matrix], rotation: Rotation, seed: int, group_size: int):
        self._group_size = group_size
        readers = [matrix for matrix in matrices if matrix.site.reads == "R1"]
        writers = [matrix for matrix in matrices if matrix.site.writes == "R1"]
        self._sides = (
            (RowSampler(readers, rotation, seed, 1, 2, BATCH // 2), False),
            (RowSampler(writers, rotation, seed, group_size, 2, BATCH // 2), True),
        )

    def draw(self, rotation: Rotation) -> None:
        """Rows for the next steps."""
        for sampler, _ in self._sides:
            sampler.draw(rotation)

    def slope(self, number: int, R1: Tensor, exactly: bool = False) -> tuple[Tensor, Tensor]:
        """(value, gradient) of one step's rows, as `RowSampler`'s."""
        sides = [self._slope(*side, number, R1, exactly) for side in self._sides]
        return sum(value for value, _ in sides), sum(slope for _, slope in sides)

    def _slope(
        self, sampler: RowSampler, across: bool, number: int, R1: Tensor, exactly: bool
    ) -> tuple[Tensor, Tensor]:
        rows = sampler.batch(number, exactly)
        rotated = times(rows, R1.to(rows.dtype)).to(R1.dtype)
        value, slope = group_norms(rotated, self._group_size, across)
        return sampler.scale * value, sampler.scale * pull_back(rows, slope, R1)


class GroupR2Rows:
    """What `R2Rows` is to single weights.

    Groups of o that don't divide a head are taken as the whole head, where R2 ends too.
    """

    def __init__(self, matrices: list[Matrix], rotation: Rotation, group_size: int):
        b = rotation.R2.shape[-1]
        readers = [matrix for matrix in matrices if matrix.site.reads == "R2"]
        writers = [matrix for matrix in matrices if matrix.site.writes == "R2"]
        within = group_size if b % group_size == 0 else b
        self._sides = [
            (torch.stack([rows_by_head(matrix, rotation) for matrix in side]), size, across)
            for side, size, across in ((readers, within, False), (writers, group_size, True))
        ]

    def gradient(self, R2: Float[Tensor, "layers heads b b"]) -> Float[Tensor, "layers heads b b"]:
        return sum(
            rows.mT @ group_norms(rows @ R2, size, across)[1] for rows, size, across in self._sides
        )
