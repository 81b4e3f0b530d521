"""A weight by itself: incoherence, kurtosis, and what a rotation leaves for the scales of groups.

GSR's argument (arXiv 2505.03810, §3) is that columns ordered by sequency bring coordinates of like
energy together, so that a group's own scale fits it better. `group_spread` measures both ends of
it: the spread of energies within groups, and the groups' largest weights.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rotlib.checks import matrix, whole_number

SHOWN_LAYER = 10  # whose coordinates' energies are kept, or the last layer of a smaller model


def incoherence(W: Float[Tensor, "out in"]) -> float:
    """The smallest μ with max|W_ij| ≤ μ ‖W‖_F / √(mn) (QuIP, arXiv 2307.13304, Definition 1).

    >>> incoherence(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))  # two of four entries hold everything
    1.414...
    """
    matrix("W", W)
    W = _in_reach(W)
    return (W.abs().max() / W.square().mean().sqrt().clamp_min(1e-300)).item()


def kurtosis(W: Float[Tensor, "out in"]) -> float:
    """E w⁴ / (E w²)² of each row, averaged over the rows: what one scale a row has to cope with.

    3 for a Gaussian, 1 where all magnitudes in a row are equal, and for a row with a single entry
    its length.

    >>> kurtosis(torch.tensor([[1.0, -1.0, 1.0, 1.0]]))
    1.0
    >>> kurtosis(torch.tensor([[5.0, 0.0, 0.0, 0.0]]))
    4.0
    """
    matrix("W", W)
    W = _in_reach(W, dim=1)
    return (W.pow(4).mean(dim=1) / W.square().mean(dim=1).square().clamp_min(1e-300)).mean().item()


def group_spread(W: Float[Tensor, "out in"], group_size: int) -> dict[str, float]:
    """How unlike the inputs of a group are (`within`), and how large its largest weight (`peak`).

    `within` is the share of the variance of the inputs' log energies, log Σ_i W_ij², that lies
    within groups: 1 where groups are alike, 0 where the inputs of every group are. `peak` is the
    groups' mean squared largest weight over the matrix's mean square, which the error of rounding
    to nearest is proportional to.

    >>> group_spread(torch.tensor([[1.0, 1.0, 4.0, 4.0]]), group_size=2)
    {'within': 0.0, 'peak': 1.0}
    """
    matrix("W", W)
    if W.shape[1] % whole_number("group_size", group_size, 1):
        raise ValueError(f"group_size {group_size} doesn't divide the {W.shape[1]} columns of W")
    W = _in_reach(W)
    log = W.square().sum(0).clamp_min(1e-300).log().view(-1, group_size)
    total = log.var(correction=0)
    within = (log.var(dim=1, correction=0).mean() / total).item() if total > 0 else 1.0
    peaks = W.abs().view(len(W), -1, group_size).amax(2).square()
    return {"within": within, "peak": (peaks.mean() / W.square().mean().clamp_min(1e-300)).item()}


def _in_reach(W: Float[Tensor, "out in"], dim: int | None = None) -> Float[Tensor, "out in"]:
    """W, or each of its rows, by a power of two: its squares neither overflow nor vanish then.

    The measures don't change with a weight's size.
    """
    W = W.double()
    largest = W.abs().amax(dim, keepdim=True) if dim else W.abs().max()
    return torch.ldexp(W, -torch.frexp(largest).exponent)
