"""What the weights read: H = E[x xᵀ] of every input, and the factor that GPTQ's error is made of.

A model is walked a layer at a time, so that only one layer's inputs and Hessians exist at once.
With H = M Mᵀ, M upper triangular, GPTQ (= LDLQ; QuIP, arXiv 2307.13304, Theorem 6) pays for column
j by D_j = M_jj², the part of x_j's variance that the columns still to come can't explain. A
rotation turns H into Rᵀ H R: it is collected once, on the folded un-rotated model, and rotated
analytically. tr(D) has a closed slope: D_j = min vᵀ H v over v with v_j = 1 and v_i = 0 for i < j,
so by the envelope theorem ∂tr(D)/∂H = Σ_j v_j v_jᵀ = Vᵀ V, V the inverse of M's unit-triangular
part; det(Rᵀ H R) = det(H), so the product of the pivots stays and tr(D) ≥ n·det(H)^{1/n}.
"""

from collections.abc import Callable, Iterator
from math import isfinite

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rotlib.checks import all_finite
from rotlib.models.families import Family
from rotlib.models.walk import NOT_FINITE, hooks, layer_inputs, walk_layer

DAMPING = 0.01  # of the mean of H's diagonal, which no rotation changes
LADDER = (1, 10, 100)  # factors on the damping, tried until the Cholesky factorisation succeeds
_BLOCK = 384
LEAST_INPUT = 1e-15  # of an input's largest entries, below which their squares vanish
_OUT_OF_RANGE = (
    "what a linear reads is of size {:.0e} in the calibration, and float32 can't hold its squares: "
    "scale the weight before it and the one that reads it"
)


class Hessian:
    """H = E[x xᵀ] over the inputs seen so far, in float32.

    Only the lower triangle is summed, in blocks.
    """

    def __init__(self):
        self._sum, self._largest, self.tokens = None, None, 0

    def add(self, x: Float[Tensor, "... n"]) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        n = x.shape[1]
        if self._sum is None:
            self._sum = torch.zeros(n, n, device=x.device)
        for c in range(0, n, _BLOCK):
            self._sum[c:, c : c + _BLOCK].addmm_(x[:, c:].T, x[:, c : c + _BLOCK])
        self.tokens += len(x)
        if len(x):
            lowest, highest = x.aminmax()
            largest = torch.maximum(-lowest, highest)
            known = self._largest
            self._largest = largest if known is None else torch.maximum(known, largest)

    def take(self) -> Float[Tensor, "n n"]:
        """The Hessian of what was seen; the next starts from nothing."""
        largest = self._largest.item()
        overflown = not torch.isfinite(self._sum.diagonal()).all()
        if overflown and not isfinite(largest):
            raise ValueError(NOT_FINITE)
        if overflown or 0 < largest < LEAST_INPUT:
            raise ValueError(_OUT_OF_RANGE.format(largest))
        lower = self._sum.tril()
        H = (lower + lower.tril(-1).T) / self.tokens
        self.__init__()
        return H


LEAST_CAP = 1e-6  # below it all tokens count alike, and float32 has no numbers for how much


def token_weights(x: Float[Tensor, "... n"], cap: float) -> Float[Tensor, "... 1"]:
    """What each token is multiplied by for an energy |x|² of at most `cap` times the median's.

    The median is that of its window, the axis before the last.

    >>> token_weights(torch.tensor([[[1.0], [1.0], [1.0], [8.0]]]), cap=4).flatten()
    tensor([1.0000, 1.0000, 1.0000, 0.2500])
    """
    energy = x.float().square().sum(-1, keepdim=True)
    most = cap * energy.median(-2, keepdim=True).values
    return torch.where(energy > most, most / energy, 1.0).sqrt()


@torch.no_grad()
def hessians(
    family: Family, calibration: Int[Tensor, "windows length"]
) -> Iterator[dict[str, Float[Tensor, "n n"]]]:
    """For each layer in turn, H of what q (k and v), o, gate (and up) and down read.

    Experts' downs, of which each reads something else, have none here. H stays where the model
    computes. The model is the original: it runs as it is, and the norms' gains are left out of H as
    folding leaves them out.
    """
    batches = layer_inputs(family, calibration)
    for layer in range(len(family.layers)):
        norms, linears = family.norms(layer), family.linears(layer)
        read_at = {site: linears[site] for site in ("q", "o", "gate", "down") if site in linears}
        if norms:
            read_at |= {"q": norms["attention_norm"], "gate": norms["mlp_norm"]}
        sums = {site: Hessian() for site in read_at}
        with hooks((module, _sum_into(sums[site])) for site, module in read_at.items()):
            batches = walk_layer(family, layer, batches)
        yield {site: hessian.take() for site, hessian in sums.items()}


def _sum_into(hessian: Hessian) -> Callable:
    def hook(module: nn.Module, args: tuple) -> None:
        x = args[0].float()
        if hasattr(module, "variance_epsilon"):  # a norm: what it puts out before its gain
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
        hessian.add(x)

    return hook


def factorise(
    H: Float[Tensor, "n n"], damping: float = DAMPING
) -> tuple[Float[Tensor, "n n"] | None, float]:
    """(M upper triangular with M Mᵀ = H + damping · mean(diag H) · I, the damping it took).

    It is one Cholesky factor read backwards. M is None where even the last rung of the ladder of
    dampings fails.
    """
    eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
    for factor in LADDER:
        L, info = torch.linalg.cholesky_ex(
            (H + damping * factor * H.diagonal().mean() * eye).flip(0, 1)
        )
        if info == 0 and all_finite(L):
            return L.flip(0, 1), damping * factor
    return None, damping * LADDER[-1]


def damped(H: Float[Tensor, "n n"], name: str, damping: float = DAMPING) -> Float[Tensor, "n n"]:
    """H with the damping that makes it positive definite.

    Raises ValueError, naming what reads it, where none of the ladder's does.
    """
    M, damping = factorise(H.double(), damping)
    if M is None:
        raise ValueError(
            f"the inputs of {name} have no positive definite covariance, even damped by "
            f"{damping:g}: give more or other tokens"
        )
    return H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype, device=H.device)


def pivots(H: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n"]:
    """D of H = (U + I) D (U + I)ᵀ, for a positive definite H."""
    return torch.linalg.cholesky(H.flip(-2, -1)).diagonal(dim1=-2, dim2=-1).flip(-1).square()


def pivots_and_slope(
    H: Float[Tensor, "*batch n n"],
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch n n"]]:
    """(tr(D), ∂tr(D)/∂H) of positive definite matrices, in closed form."""
    M = torch.linalg.cholesky(H.flip(-2, -1)).flip(-2, -1)
    m = M.diagonal(dim1=-2, dim2=-1)
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    V = m.unsqueeze(-1) * torch.linalg.solve_triangular(M, eye.expand_as(M), upper=True)
    return m.square().sum(-1), V.mT @ V
