"""OptRot: learn R1 and R2 by making the rotated weights' fourth powers small (Gadhikar et al., arXiv 2512.24124).

The objective is ``Σ_W ‖R_outᵀ W R_in‖₄⁴`` over q, k, v, o, gate, up and down with the norms folded in. Rotations leave
‖W‖_F alone, so per matrix this is kurtosis: a smooth stand-in for the largest weight, which sets the step of an absmax
grid. No data and no forward pass are needed, and the gradient is closed: ``∂‖X R‖₄⁴/∂R = 4 Xᵀ (X R)^∘3``.

`kurtail` learns on activations instead (KurTail, arXiv 2503.01483), `mixed` on both; `objective.py` has the matrices.
The paper runs Cayley SGD on all weights. Here, by default, rows are drawn with probability ∝ ‖row‖⁴ and scaled to unit
norm, which keeps the gradient unbiased; the draw is systematic and used up before the next, so that momentum averages
the sampling noise away. R2's share is small and is descended in full, between draws.
"""

import math
from contextlib import contextmanager
from itertools import pairwise
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from rotlib.checks import inner_share, one_of, token_ids, whole_number
from rotlib.families import Family, adapt, check_finite
from rotlib.fuse import check_not_rounding, is_quantized, is_rotated
from rotlib.manifold import Descent, cayley_sgd_step
from rotlib.objective import (
    NORMALISATIONS,
    TOKENS,
    Matrix,
    blended,
    sum_of_fourth_powers,
    token_matrices,
    weight_matrices,
)
from rotlib.online import check_online
from rotlib.rotation import Rotation, hadamard_rotation, random_rotation

_BATCH = 8192  # rows per step, or all there are
_DRAW = 8  # steps that use up one draw
_PASSES = 2  # times that a draw is used
_R1_LENGTH = 2.0  # Frobenius norm of R1's first step; a cosine takes it to zero
_R2_LENGTH = 1.0
_R2_EVERY = 16  # steps between R2's turns
_R2_STEPS = 4  # steps in one turn
_PAPER_LR = 1.0
_DRIFT = 1e-4  # what float32 may add up to before the projection in float64


@torch.no_grad()
def optrot(
    model: PreTrainedModel,
    seed: int = 0,
    method: str = "sampled",
    normalisation: str = "plain",
    steps: int | None = None,
    R3: bool = False,
    R4: bool = False,
) -> Rotation:
    """Learn R1 and R2 on the model's weights, which stay as they are; fuse the result with `fuse`.

    `method` is "sampled" or "cayley-sgd", the paper's (1000 full gradients, lr 1); `normalisation` is a key of
    `NORMALISATIONS`; `steps` overrides the method's own number; R3 and R4 turn the online rotations on, and down's weight
    is seen behind R4. `history` holds the objective: for "sampled" an unbiased estimate at every draw of rows, for
    "cayley-sgd" the exact value at every step; the last entry is exact. Raises ValueError for an unknown choice, a
    rotated model, non-finite weights, or an online rotation that the model can't carry.
    """
    one_of("normalisation", normalisation, NORMALISATIONS)
    family, rotation = start(model, seed, R3, R4)
    return _learn(weight_matrices(family, normalisation, R4), rotation, seed, method, steps)


@torch.no_grad()
def kurtail(
    model: PreTrainedModel,
    calibration: Int[Tensor, "windows length"],
    seed: int = 0,
    tokens: int = TOKENS,
    R3: bool = False,
    R4: bool = False,
) -> Rotation:
    """Learn R1 and R2 on a sample of activations: `tokens` of the calibration text at every input. Raises like `optrot`."""
    adapt(model)
    token_ids("calibration", calibration, 2, model)
    whole_number("tokens", tokens, 1)
    family, rotation = start(model, seed, R3, R4)
    return _learn(token_matrices(family, calibration, seed, tokens), rotation, seed)


@torch.no_grad()
def mixed(
    model: PreTrainedModel,
    calibration: Int[Tensor, "windows length"],
    share: float,
    seed: int = 0,
    tokens: int = TOKENS,
    R3: bool = False,
    R4: bool = False,
) -> Rotation:
    """Learn R1 and R2 on (1 − share) · weights + share · activations, each in units of its value under a random rotation.

    `share` (λ) lies between 0 (`optrot`) and 1 (`kurtail`). Raises like `optrot`.
    """
    adapt(model)
    inner_share("share", share)
    token_ids("calibration", calibration, 2, model)
    whole_number("tokens", tokens, 1)
    family, rotation = start(model, seed, R3, R4)
    sides = weight_matrices(family, "plain", R4), token_matrices(family, calibration, seed, tokens)
    return _learn(blended(*sides, share, rotation), rotation, seed)


def _learn(matrices: list[Matrix], rotation: Rotation, seed: int, method: str = "sampled", steps: int | None = None) -> Rotation:
    """Descend from `rotation` and hand over the nearest exactly orthogonal one, with its exact objective."""
    one_of("method", method, METHODS)
    if steps is not None:
        whole_number("steps", steps, 1)
    learn, default_steps = METHODS[method]
    learn(matrices, rotation, steps or default_steps, seed)
    rotation = finished(rotation)  # before the objective is taken: drift would flatter it
    rotation.history.append(sum_of_fourth_powers(matrices, rotation))
    return rotation.to("cpu", torch.float64)


def finished(rotation: Rotation) -> Rotation:
    """The nearest exactly orthogonal rotation to one learned in float32; raises RuntimeError where it has drifted away."""
    if not (drift := rotation.orthogonality_error()) < _DRIFT:
        raise RuntimeError(f"learning lost orthogonality: max|R Rᵀ − I| is {drift:.1e} in float32")
    return rotation.projected(rotation.R1.device)


def fourth_power(rows: Float[Tensor, "m n"], R: Tensor) -> tuple[Tensor, Tensor]:
    """(‖rows R‖₄⁴, its gradient with respect to R); the value is a quarter of ⟨R, gradient⟩, by Euler's theorem."""
    rotated = rows @ R
    gradient = 4 * (rows.mT @ rotated.square().mul_(rotated))
    return (R * gradient).sum() / 4, gradient


@contextmanager
def coarse_products():
    """Let matrix products round to bfloat16 or TF32 where the hardware does that fast: far below the sampling noise."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def start(model: PreTrainedModel, seed: int, R3: bool, R4: bool) -> tuple[Family, Rotation]:
    """Where learning starts: a random Hadamard rotation, or a random orthogonal one where no Hadamard matrix fits."""
    whole_number("seed", seed, 0)
    family = adapt(model)
    if is_rotated(model) or is_quantized(model):
        raise ValueError("this model is already rotated or quantized: learn the rotation on the original")
    check_not_rounding(model)
    check_finite(model)
    check_online(family, Rotation(None, None, R3, R4).online)
    try:
        rotation = hadamard_rotation(model, seed)
    except ValueError:
        rotation = random_rotation(model, seed)
    device = family.embedding.weight.device
    return family, Rotation(rotation.R1.to(device, torch.float32), rotation.R2.to(device, torch.float32), R3, R4)


class Extra(Protocol):
    """What a method adds to the fourth powers: slopes, and factors of the matrices that change as the rotation does."""

    def refresh(self, rotation: Rotation) -> None:
        """Called before every draw of rows; may change the matrices' factors."""

    def R1_slope(self, R1: Tensor) -> Tensor: ...

    def R2_slope(self, R2: Tensor) -> Tensor: ...


def learn_sampled(
    matrices: list[Matrix], rotation: Rotation, steps: int, seed: int, extra: Extra | None = None, length: float = _R1_LENGTH
) -> None:
    """Momentum descent: R1 on drawn rows, R2 on all of its rows at its turns."""
    if extra:
        extra.refresh(rotation)
    rows = _RowSampler(matrices, rotation, seed)
    R1, R2 = Descent(rotation.R1), Descent(rotation.R2)
    for step in tqdm(range(steps), desc="OptRot", unit="step"):
        anneal = 0.5 * (1 + math.cos(math.pi * step / steps))
        if step % _R2_EVERY == 0:
            with coarse_products():
                heads = _R2Rows(matrices, rotation)
            constant = extra.R2_slope(R2.R) if extra else 0.0
            for _ in range(_R2_STEPS):
                R2.step(heads.gradient(R2.R) + constant, _R2_LENGTH * anneal)
            R2.project()
            rotation.R2 = R2.R
        fresh = step % (_DRAW * _PASSES) == 0
        if fresh:
            if extra and step:
                extra.refresh(rotation)
                rows.reweigh()
            rows.draw(rotation)
            R1.project()
        with coarse_products():
            value, gradient = fourth_power(rows.batch(step % _DRAW), R1.R)
        scale = rows.total / rows.size
        R1.step(scale * gradient + extra.R1_slope(R1.R) if extra else gradient, length * anneal)
        rotation.R1 = R1.R
        if fresh:  # later in a draw its rows have been seen, and flatter the objective
            rotation.history.append(scale * value.item())


def _learn_cayley_sgd(matrices: list[Matrix], rotation: Rotation, steps: int, seed: int) -> None:
    """The paper's optimiser: Cayley SGD on the whole objective."""
    for _ in tqdm(range(steps), desc="OptRot, Cayley SGD", unit="step"):
        value, slope1 = 0.0, torch.zeros_like(rotation.R1)
        for matrix in matrices:
            part, slope = fourth_power(matrix.rows("R1", rotation), rotation.R1)
            value += part.item()
            slope1 += slope
        slope2 = _R2Rows(matrices, rotation).gradient(rotation.R2)
        rotation.R1 = cayley_sgd_step(rotation.R1, slope1, _PAPER_LR)
        rotation.R2 = cayley_sgd_step(rotation.R2, slope2, _PAPER_LR)
        rotation.history.append(value)


class _RowSampler:
    """Unit rows for R1, drawn with probability ∝ factor · ‖row‖⁴ at the start; `total` turns their mean into the objective."""

    def __init__(self, matrices: list[Matrix], rotation: Rotation, seed: int):
        self._matrices = [matrix for matrix in matrices if matrix.touched_by("R1")]
        self._device = rotation.R1.device
        self._generator = torch.Generator().manual_seed(seed)
        self._norms = [matrix.rows("R1", rotation).norm(dim=1).cpu() for matrix in self._matrices]
        self._starts = torch.tensor([0] + [len(norm) for norm in self._norms]).cumsum(0)
        self.size = min(_BATCH, int(self._starts[-1]))
        self.reweigh()

    def reweigh(self) -> None:
        """Take up the matrices' factors as they are now."""
        fourth = torch.cat([norm.double() ** 4 * matrix.factor for norm, matrix in zip(self._norms, self._matrices, strict=True)])
        self.total = fourth.sum().item()
        self._cumulative = fourth.cumsum(0) / self.total

    def draw(self, rotation: Rotation) -> None:
        """Rows for the next `_DRAW` steps by systematic sampling: every row as often as it should be, to within one."""
        count = _DRAW * self.size
        offset = torch.rand(1, generator=self._generator, dtype=torch.float64)
        chosen = torch.searchsorted(self._cumulative, (torch.arange(count) + offset) / count).clamp_(max=len(self._cumulative) - 1)
        bounds = torch.searchsorted(chosen, self._starts).tolist()
        place = torch.randperm(count, generator=self._generator).to(self._device)
        self._rows = torch.empty(count, len(rotation.R1), device=self._device)
        for which, (begin, end) in enumerate(pairwise(bounds)):
            index = chosen[begin:end] - self._starts[which]
            norm = self._norms[which][index].clamp_min(1e-30).unsqueeze(1)
            rows = self._matrices[which].rows("R1", rotation, index)
            self._rows[place[begin:end]] = rows.div_(norm.to(rows))

    def batch(self, number: int) -> Float[Tensor, "batch d"]:
        """One step's rows of the current draw."""
        return self._rows[number * self.size : (number + 1) * self.size]


class _R2Rows:
    """Everything R2 acts on at the present R1, stacked by layer and KV head."""

    def __init__(self, matrices: list[Matrix], rotation: Rotation):
        layers, heads, b, _ = rotation.R2.shape
        by_layer = [[] for _ in range(layers)]
        for matrix in matrices:
            if matrix.touched_by("R2"):
                rows = matrix.rows("R2", rotation).unflatten(1, (heads, -1, b))
                by_layer[matrix.layer].append(rows.movedim(1, 0).flatten(1, 2) * matrix.factor**0.25)
        self._rows = torch.stack([torch.cat(rows, dim=1) for rows in by_layer])  # (layers, heads, m, b)

    def gradient(self, R2: Float[Tensor, "layers heads b b"]) -> Float[Tensor, "layers heads b b"]:
        return 4 * (self._rows.mT @ (self._rows @ R2).pow_(3))


METHODS = {"sampled": (learn_sampled, 850), "cayley-sgd": (_learn_cayley_sgd, 1000)}
