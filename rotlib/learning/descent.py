"""Descent on the orthogonal group, with orthogonality kept exactly.

A rotation moves as ``R ← R Q`` with Q the Cayley transform of a skew matrix, so every iterate is
orthogonal up to rounding. `Descent` follows the momentum of the Riemannian gradient with steps of a
chosen length. `cayley_sgd_step` is the step of SpinQuant and OptRot (Li et al., arXiv 2002.01113,
Algorithm 1): five fixed-point iterations, whose truncation drifts, followed here by the nearest
orthogonal matrix.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rotlib.rotations.rotation import newton_schulz

MOMENTUM = 0.9
FIXED_POINT_ITERATIONS = 5
STEPS_TO_POLAR = 3  # what those iterations leave, 2 % at most, becomes 1e-15


class Descent:
    """Momentum along the skew gradient RᵀG − GᵀR.

    R may be a batch of matrices, each moved by the same length.
    """

    def __init__(self, R: Float[Tensor, "*batch n n"]):
        self.R = R
        self._momentum = torch.zeros_like(R)

    def step(self, gradient: Float[Tensor, "*batch n n"], length: float) -> None:
        """Move R by a rotation that a skew matrix of Frobenius norm `length` generates.

        `gradient` is dL/dR.
        """
        S = self.R.mT @ gradient
        self._momentum = MOMENTUM * self._momentum + (S - S.mT)
        least = torch.finfo(S.dtype).tiny
        norm = torch.linalg.matrix_norm(self._momentum, keepdim=True).clamp_min(least)
        self.R = self.R @ cayley(length / norm * self._momentum)

    def project(self) -> None:
        """Undo the rounding that has gathered, by one Newton–Schulz step to the polar factor."""
        self.R = newton_schulz(self.R, steps=1)


def cayley(S: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """``(I + S/2)⁻¹ (I − S/2)``: orthogonal for skew S, and exp(−S) to second order."""
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    return torch.linalg.solve(eye + S / 2, eye - S / 2)


def cayley_sgd_step(
    X: Float[Tensor, "*batch n n"], gradient: Float[Tensor, "*batch n n"], lr: float
) -> Float[Tensor, "*batch n n"]:
    """One step of Cayley SGD on matrices with orthonormal rows, its length clipped to 1/‖W‖₁."""
    X, V = X.mT, -gradient.mT
    MX = V @ X.mT
    W = MX - 0.5 * X @ (X.mT @ MX)
    W = W - W.mT
    alpha = (1 / torch.linalg.matrix_norm(W, ord=1, keepdim=True)).clamp(max=lr)
    Y = X + alpha * V
    for _ in range(FIXED_POINT_ITERATIONS):
        Y = X + alpha / 2 * W @ (X + Y)
    return newton_schulz(Y.mT, STEPS_TO_POLAR)
