"""Scales fitted anew to codes that stay, in closed form.

With the codes fixed a row's weights are linear in the scales of its groups, so its error
(`coordinate.row_errors`) has its least value where a small system of equations says.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rotlib.quantization.coordinate import row_errors
from rotlib.quantization.grids import QuantizedWeight

RIDGE = 1e-6  # of the system's mean diagonal: a group whose codes are all zero keeps its scale


def refitted(
    Q: QuantizedWeight,
    W: Float[Tensor, "out in"],
    H: Float[Tensor, "in in"],
    C: Float[Tensor, "in in"] | None = None,
) -> QuantizedWeight:
    """The same codes and zero points with the scales of least error.

    A row that is no better so stays as it was, as does one whose scales would change their signs.

    >>> codes = torch.tensor([[1, -2]], dtype=torch.int8)
    >>> Q = QuantizedWeight(codes, torch.tensor([[1.0]]), torch.zeros(1, 1))
    >>> refitted(Q, torch.tensor([[0.5, -1.0]]), torch.eye(2)).scale
    tensor([[0.5000]])
    """
    groups = Q.scale.shape[1]
    unit = Q._replace(scale=torch.ones_like(Q.scale)).dense()  # the weights at scale one
    V = unit.unflatten(1, (groups, -1))
    wanted = W @ H if C is None else W @ (H + C)
    right = (V * wanted.unflatten(1, (groups, -1))).sum(2)
    left = torch.empty(len(W), groups, groups, dtype=W.dtype, device=W.device)
    for g, rows in enumerate(H.split(V.shape[2])):
        left[:, g] = ((V[:, g] @ rows).unflatten(1, (groups, -1)) * V).sum(2)
    left, right, old = left.double(), right.double(), Q.scale.double()
    ridge = RIDGE * left.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp_min(1e-30)
    left.diagonal(dim1=1, dim2=2).add_(ridge)
    scale = torch.linalg.solve(left, right + ridge * old).to(Q.scale.dtype)
    found = Q._replace(scale=scale)
    better = row_errors(found, W, H, C) < row_errors(Q, W, H, C)
    better &= (scale * Q.scale > 0).all(1)
    return Q._replace(scale=torch.where(better.unsqueeze(1), scale, Q.scale))
