"""Coordinate descent on codes: what GPTQ leaves, visited again with all other columns in place.

GPTQ rounds a column before it knows how those behind it fall. Afterwards every code can be chosen
anew with all others as they are, which never makes the error larger. With H = E[x xᵀ] and GPTAQ's
C = α E[(x̃ − x) xᵀ] a row's error is, up to a constant, (q − w) H (q − w)ᵀ − 2 (q − w)(w C)ᵀ, and
half its slope G = (q − w) H − w C. The best code of column j alone is the nearest to q_j − G_j /
H_jj (quantease, arXiv 2309.01885, §3).
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from rotlib.quantization.grids import QuantizedWeight, WeightQuant
from rotlib.quantization.replayed import Replayed

_STRIP = 32  # columns whose changes reach the rest in one product
MOST_SWEEPS = 100  # codes stop changing long before


def row_errors(
    Q: QuantizedWeight,
    W: Float[Tensor, "out in"],
    H: Float[Tensor, "in in"],
    C: Float[Tensor, "in in"] | None,
) -> Float[Tensor, " out"]:
    """Every row's error (q − w) H (q − w)ᵀ − 2 (q − w)(w C)ᵀ."""
    difference = Q.dense() - W
    off = difference @ H if C is None else difference @ H - 2 * W @ C
    return (off * difference).sum(dim=1)


class CoordinateDescent:
    """Visits every column of weights on one grid, `sweeps` times."""

    def __init__(self, quant: WeightQuant, sweeps: int):
        self._quant, self._sweeps = quant, sweeps
        self._strip = Replayed(partial(visit_strip, quant))

    def __call__(
        self,
        Q: QuantizedWeight,
        W: Float[Tensor, "out in"],
        H: Float[Tensor, "in in"],
        C: Float[Tensor, "in in"] | None = None,
    ) -> QuantizedWeight:
        """The same scales and zero points with better codes; H is positive definite."""
        if not self._sweeps:
            return Q
        n = W.shape[1]
        codes = Q.codes.T.to(W.dtype).contiguous()  # columns laid out as rows
        scale = Q.scale.repeat_interleave(n // Q.scale.shape[1], dim=1).T.contiguous()
        G = (Q.dense() - W) @ H
        if C is not None:
            G -= W @ C
        G = G.T.contiguous()
        for _ in range(self._sweeps):
            before = codes.clone()
            for start in range(0, n, _STRIP):
                here = slice(start, start + _STRIP)
                codes[here], change = self._strip(G[here], codes[here], scale[here], H[here, here])
                G += H[:, here] @ change
            if torch.equal(codes, before):
                break
        return QuantizedWeight(codes.T.contiguous().to(Q.codes.dtype), Q.scale, Q.zero)


def visit_strip(
    quant: WeightQuant,
    G: Float[Tensor, "k out"],
    codes: Float[Tensor, "k out"],
    scale: Float[Tensor, "k out"],
    H: Float[Tensor, "k k"],
) -> tuple[Tensor, Tensor]:
    """(codes of a few columns, visited one after the other; how that changed their weights)"""
    G, codes, change = G.clone(), codes.clone(), torch.empty_like(G)
    for j in range(len(G)):
        best = quant.nearest_(codes[j] - G[j] / (H[j, j] * scale[j]))
        change[j] = (best - codes[j]) * scale[j]
        codes[j] = best
        G[j + 1 :] += H[j + 1 :, j, None] * change[j]
    return codes, change
