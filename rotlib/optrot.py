"""OptRot: learn R1 and R2 by making the rotated weights' fourth powers small (Gadhikar et al., arXiv 2512.24124).

The objective is ``Σ_W ‖R_outᵀ W R_in‖₄⁴`` over q, k, v, o, gate, up and down with the norms folded in. Rotations leave
‖W‖_F alone, so per matrix this is kurtosis: a smooth stand-in for the largest weight, which sets the step of an absmax
grid. No data and no forward pass are needed, and the gradient is closed: ``∂‖X R‖₄⁴/∂R = 4 Xᵀ (X R)^∘3``.

`kurtail` learns on activations instead (KurTail, arXiv 2503.01483), `mixed` on both; `objective.py` has the matrices.
The paper runs Cayley SGD on all weights. Here, by default, R1 sees drawn rows (`sampling.py`); R2's share is small and is descended
in full, between draws.
"""

import math
from contextlib import contextmanager
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from rotlib.checks import inner_share, one_of, token_ids, whole_number, yes_or_no
from rotlib.families import Family, adapt, check_finite
from rotlib.fixed import hadamard_rotation, random_rotation
from rotlib.fuse import check_not_rounding, check_rotation, is_quantized, is_rotated
from rotlib.grouped import GroupR2Rows, GroupSampler, check_group, sum_of_group_norms
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
from rotlib.rotation import Rotation, as_blocks, as_matrix
from rotlib.sampling import DRAW, R2Rows, RowSampler, fourth_power

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
    start: Rotation | None = None,
    local: bool = False,
    group_size: int | None = None,
) -> Rotation:
    """Learn R1 and R2 on the model's weights, which stay as they are; fuse the result with `fuse`.

    `method` is "sampled" or "cayley-sgd", the paper's (1000 full gradients, lr 1); `normalisation` is a key of
    `NORMALISATIONS`; `steps` overrides the method's own number; R3 and R4 turn the online rotations on, and down's weight
    is seen behind R4. `start` is where to begin instead of a random Hadamard rotation, such as `gsr_rotation`; `local` keeps R1 in the
    start's blocks, each learned in its own orthogonal group. `group_size` learns on the objective for scales of such groups
    (`grouped.py`). `history` holds the objective: for "sampled" an unbiased estimate at every draw of rows, for
    "cayley-sgd" the exact value at every step; the last entry is exact. Raises ValueError for an unknown choice, a
    rotated model, non-finite weights, or an online rotation that the model can't carry.
    """
    one_of("normalisation", normalisation, NORMALISATIONS)
    family, rotation = starting_point(model, seed, R3, R4, start, local)
    if group_size is not None:
        check_group(family, group_size)
        if method != "sampled" or normalisation != "plain":
            raise ValueError("the objective for groups is descended by the method 'sampled' with the normalisation 'plain'")
    return _learn(weight_matrices(family, normalisation, R4), rotation, seed, method, steps, group_size)


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
    family, rotation = starting_point(model, seed, R3, R4)
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
    family, rotation = starting_point(model, seed, R3, R4)
    sides = weight_matrices(family, "plain", R4), token_matrices(family, calibration, seed, tokens)
    return _learn(blended(*sides, share, rotation), rotation, seed)


def _learn(
    matrices: list[Matrix], rotation: Rotation, seed: int, method: str = "sampled", steps: int | None = None, group: int | None = None
) -> Rotation:
    """Descend from `rotation` and hand over the nearest exactly orthogonal one, with its exact objective."""
    one_of("method", method, METHODS)
    if steps is not None:
        whole_number("steps", steps, 1)
    learn, default_steps = METHODS[method]
    learn(matrices, rotation, steps or default_steps, seed, **({"group": group} if group else {}))
    rotation = finished(rotation)  # before the objective is taken: drift would flatter it
    rotation.history.append(sum_of_group_norms(matrices, rotation, group) if group else sum_of_fourth_powers(matrices, rotation))
    return rotation.to("cpu", torch.float64)


def finished(rotation: Rotation) -> Rotation:
    """The nearest exactly orthogonal rotation to one learned in float32; raises RuntimeError where it has drifted away."""
    if not (drift := rotation.orthogonality_error()) < _DRIFT:
        raise RuntimeError(f"learning lost orthogonality: max|R Rᵀ − I| is {drift:.1e} in float32")
    return rotation.projected(rotation.R1.device)


@contextmanager
def coarse_products():
    """Let matrix products round to bfloat16 or TF32 where the hardware does that fast: far below the sampling noise."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def starting_point(
    model: PreTrainedModel, seed: int, R3: bool, R4: bool, start: Rotation | None = None, local: bool = False
) -> tuple[Family, Rotation]:
    """Where learning starts, in float32: `start`, or a random Hadamard rotation, or a random orthogonal one where no Hadamard matrix fits.

    R1 is a matrix, or where it is to stay `local` the blocks on its diagonal.
    """
    whole_number("seed", seed, 0)
    family = adapt(model)
    if is_rotated(model) or is_quantized(model):
        raise ValueError("this model is already rotated or quantized: learn the rotation on the original")
    check_not_rounding(model)
    check_finite(model)
    check_online(family, Rotation(None, None, R3, R4).online)
    yes_or_no("local", local)
    if start is None:
        try:
            start = hadamard_rotation(model, seed)
        except ValueError:
            start = random_rotation(model, seed)
    elif not isinstance(start, Rotation) or start.R1 is None or start.R2 is None or start.scales:
        raise ValueError("the start must be a Rotation with R1 and R2 and without scales, such as rl.gsr_rotation(model, block=64)")
    check_rotation(family, start)
    if start.online and (start.R3, start.R4) != (R3, R4):
        raise ValueError(f"the start has {' and '.join(start.online)} on: learn with R3={start.R3} and R4={start.R4}, or start without")
    device, R1 = family.device, (as_blocks if local else as_matrix)(start.R1)
    R1, R2 = (R.to(device, torch.float32, copy=True) for R in (R1, start.R2))  # learning may move them in place
    return family, Rotation(R1, R2, R3, R4)


class Extra(Protocol):
    """What a method adds to the fourth powers: slopes, and factors of the matrices that change as the rotation does."""

    def refresh(self, rotation: Rotation) -> None:
        """Called before every draw of rows; may change the matrices' factors."""

    def R1_slope(self, R1: Tensor) -> Tensor: ...

    def R2_slope(self, R2: Tensor) -> Tensor: ...


def learn_sampled(
    matrices: list[Matrix],
    rotation: Rotation,
    steps: int,
    seed: int,
    extra: Extra | None = None,
    length: float = _R1_LENGTH,
    group: int | None = None,
) -> None:
    """Momentum descent: R1 on drawn rows, R2 on all of its rows at its turns; with `group`, of the objective for groups."""
    if extra:
        extra.refresh(rotation)
    rows = GroupSampler(matrices, rotation, seed, group) if group else RowSampler(matrices, rotation, seed)
    if rotation.R1.ndim == 3:  # blocks move together as far as one matrix would
        length /= math.sqrt(len(rotation.R1))
    R1, R2 = Descent(rotation.R1), Descent(rotation.R2)
    for step in tqdm(range(steps), desc="OptRot", unit="step"):
        anneal = 0.5 * (1 + math.cos(math.pi * step / steps))
        if step % _R2_EVERY == 0:
            with coarse_products():
                heads = GroupR2Rows(matrices, rotation, group) if group else R2Rows(matrices, rotation)
            constant = extra.R2_slope(R2.R) if extra else 0.0
            for _ in range(_R2_STEPS):
                R2.step(heads.gradient(R2.R) + constant, _R2_LENGTH * anneal)
            R2.project()
            rotation.R2 = R2.R
        fresh = step % (DRAW * _PASSES) == 0
        if fresh:
            if extra and step:
                extra.refresh(rotation)
                rows.reweigh()
            rows.draw(rotation)
            R1.project()
        with coarse_products():
            value, gradient = rows.slope(step % DRAW, R1.R)
        scale = rows.scale
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
        slope2 = R2Rows(matrices, rotation).gradient(rotation.R2)
        rotation.R1 = cayley_sgd_step(rotation.R1, slope1, _PAPER_LR)
        rotation.R2 = cayley_sgd_step(rotation.R2, slope2, _PAPER_LR)
        rotation.history.append(value)


METHODS = {"sampled": (learn_sampled, 850), "cayley-sgd": (_learn_cayley_sgd, 1000)}
