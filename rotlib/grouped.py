"""OptRot for group scales: the step of a group is set by its own largest weight, so that is what has to be small.

With one scale for `group_size` inputs, a group's rounding error is its squared step, ∝ max w². The fourth moment softens the maximum:
``L = Σ_groups (Σ_{w in group} w⁴)^{1/2}``. This form is **inferred** from the bound behind OptRot (arXiv 2512.24124): the paper's
own objective, Σ w⁴, is separable and knows nothing of where a group ends, and it counts a group by its squared energy, this one by its
energy. What a group is depends on the side: R1 mixes the inputs of q, k, v, gate and up, so their groups lie within a rotated row; it
mixes the outputs of o and down, whose groups are runs of inputs, one for every rotated output.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rotlib.checks import whole_number
from rotlib.families import Family
from rotlib.objective import Matrix, rotated_values
from rotlib.quant import WeightQuant
from rotlib.rotation import Rotation, times
from rotlib.sampling import BATCH, RowSampler, pull_back, rows_by_head


def check_group(family: Family, group: int) -> None:
    """Raises ValueError where the groups don't divide a quantized weight's inputs."""
    grid = WeightQuant(group_size=whole_number("group_size", group, 1))
    for name, linear in family.linears(0).items():
        grid.check_width(linear.in_features, f"{name}_proj")


def group_norms(rotated: Float[Tensor, "*batch m n"], group: int, across: bool) -> tuple[Tensor, Float[Tensor, "*batch m n"]]:
    """(Σ over groups of (Σ w⁴)^{1/2}, its slope): groups of columns within a row, or `across` rows within a column."""
    axis = -2 if across else -1
    cut = rotated.unflatten(axis, (-1, group))
    square = cut.square()
    norms = square.square().sum(axis, keepdim=True).sqrt()
    slope = 2 * cut * square / norms.clamp_min(torch.finfo(norms.dtype).tiny ** 0.5)  # below, w⁴ has vanished and w³ has not
    return norms.sum(), slope.flatten(axis - 1, axis)


def sum_of_group_norms(matrices: list[Matrix], rotation: Rotation, group: int) -> float:
    """The objective, in full."""
    return sum(group_norms(rotated_values(matrix, rotation), group, across=False)[0].item() for matrix in matrices)


class GroupSampler:
    """What `RowSampler` is to single rows: rows of the readers and runs of rows of the writers, drawn ∝ their energy."""

    scale = 1.0  # its slopes are estimates of the objective's already

    def __init__(self, matrices: list[Matrix], rotation: Rotation, seed: int, group: int):
        self._group = group
        readers = [matrix for matrix in matrices if matrix.site.reads == "R1"]
        writers = [matrix for matrix in matrices if matrix.site.writes == "R1"]
        self._sides = (
            (RowSampler(readers, rotation, seed, 1, 2, BATCH // 2), False),
            (RowSampler(writers, rotation, seed, group, 2, BATCH // 2), True),
        )

    def draw(self, rotation: Rotation) -> None:
        """Rows for the next steps."""
        for sampler, _ in self._sides:
            sampler.draw(rotation)

    def slope(self, number: int, R1: Tensor) -> tuple[Tensor, Tensor]:
        """(value, gradient) of one step's rows."""
        values, slopes = zip(*(self._slope(sampler, across, number, R1) for sampler, across in self._sides), strict=True)
        return sum(values), sum(slopes)

    def _slope(self, sampler: RowSampler, across: bool, number: int, R1: Tensor) -> tuple[Tensor, Tensor]:
        rows = sampler.batch(number)
        value, slope = group_norms(times(rows, R1), self._group, across)
        return sampler.scale * value, sampler.scale * pull_back(rows, slope, R1)


class GroupR2Rows:
    """What `R2Rows` is to single weights. Groups of o that don't divide a head are taken as the whole head, where R2 ends too."""

    def __init__(self, matrices: list[Matrix], rotation: Rotation, group: int):
        b = rotation.R2.shape[-1]
        within = group if b % group == 0 else b
        touched = [matrix for matrix in matrices if matrix.touched_by("R2")]
        self._sides = [
            (torch.stack([rows_by_head(matrix, rotation) for matrix in touched if matrix.site.reads == "R2"]), within, False),
            (torch.stack([rows_by_head(matrix, rotation) for matrix in touched if matrix.site.writes == "R2"]), group, True),
        ]

    def gradient(self, R2: Float[Tensor, "layers heads b b"]) -> Float[Tensor, "layers heads b b"]:
        return sum(rows.mT @ group_norms(rows @ R2, group, across)[1] for rows, group, across in self._sides)
