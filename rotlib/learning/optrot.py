"""OptRot: learn R1 and R2 by making the rotated weights' fourth powers small (arXiv 2512.24124).

The objective is ``Σ_W ‖R_outᵀ W R_in‖₄⁴`` over q, k, v, o, gate, up and down with the norms folded
in. Rotations leave ‖W‖_F alone, so per matrix this is kurtosis: a smooth stand-in for the largest
weight, which sets the step of an absmax grid. No data and no forward pass are needed, and the
gradient is closed: ``∂‖X R‖₄⁴/∂R = 4 Xᵀ (X R)^∘3``.

`kurtail` learns on activations instead (KurTail, arXiv 2503.01483), `mixed` on both;
`objectives.py` has the matrices. The paper runs Cayley SGD on all weights. Here, by default, R1
sees drawn rows (`sampling.py`); R2's share is small and is descended in full, between draws.
"""

import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from rotlib.checks import inner_share, one_of, token_ids, whole_number
from rotlib.learning.descent import Descent, cayley_sgd_step
from rotlib.learning.grouped import GroupR2Rows, GroupSampler, check_group, sum_of_group_norms
from rotlib.learning.objectives import (
    TOKENS,
    Matrix,
    blended,
    sum_of_fourth_powers,
    token_matrices,
    weight_matrices,
)
from rotlib.learning.sampling import STEPS_A_DRAW, R2Rows, RowSampler, fourth_power
from rotlib.learning.start import finished, original, starting_point
from rotlib.precision import coarse_products, exact_products, slope_dtype
from rotlib.rotations.rotation import Rotation

PASSES = 2  # times that a draw is used
R1_LENGTH = 2.0  # Frobenius norm of R1's first step; a cosine takes it to zero
R2_LENGTH = 1.0
R2_EVERY = 16  # steps between R2's turns
R2_STEPS = 4  # steps in one turn
PAPER_LR = 1.0


@torch.no_grad()
def optrot(
    model: PreTrainedModel,
    seed: int = 0,
    method: str = "sampled",
    steps: int | None = None,
    R3: bool = False,
    R4: bool = False,
    start: Rotation | None = None,
    local: bool = False,
    group_size: int | None = None,
) -> Rotation:
    """Learn R1 and R2 on the model's weights, which stay as they are; `fuse` takes the result.

    `method` is "sampled" or "cayley-sgd", the paper's (1000 full gradients, lr 1); `steps`
    overrides the method's own number; R3 and R4 turn the online rotations on, and down's weight is
    seen behind R4. `start` is where to begin instead of a random Hadamard rotation, such as
    `gsr_rotation`; `local` keeps R1 in the start's blocks, each learned in its own orthogonal
    group. `group_size` learns on the objective for scales of such groups (`grouped.py`). Where R1
    doesn't fit the model (a norm ends its blocks), R2 is learned alone, in either way. `history`
    holds the objective: for "sampled" an unbiased estimate at every draw of rows, for "cayley-sgd"
    the exact value at every step; the last entry is exact. Raises ValueError for an unknown choice,
    a rotated model, non-finite weights, or an online rotation that the model can't carry.

    >>> rotation = optrot(model, seed=0, steps=50)
    >>> rotation.history[-1] < rotation.history[0]
    True
    """
    family = original(model)
    rotation = starting_point(family, seed, R3, R4, start, local)
    if group_size is not None:
        check_group(family, group_size)
        if method != "sampled":
            raise ValueError("the objective for groups is descended by the method 'sampled'")
    return _learn(weight_matrices(family, R4), rotation, seed, method, steps, group_size)


@torch.no_grad()
def kurtail(
    model: PreTrainedModel,
    calibration: Int[Tensor, "windows length"],
    seed: int = 0,
    tokens: int = TOKENS,
    R3: bool = False,
    R4: bool = False,
) -> Rotation:
    """Learn R1 and R2 on a sample of activations: `tokens` of the calibration text at every input.

    Raises like `optrot`.

    >>> kurtail(model, tokens, tokens=64).orthogonality_error() < 1e-6
    True
    """
    family = original(model, needs_R1="KurTail")
    token_ids("calibration", calibration, 2, model)
    whole_number("tokens", tokens, 1)
    rotation = starting_point(family, seed, R3, R4)
    matrices = token_matrices(family, calibration, seed, tokens)
    if not any(matrix.values.any() for matrix in matrices):
        raise ValueError("what the weights read is all zero on these tokens: nothing to learn on")
    return _learn(matrices, rotation, seed)


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
    """Learn R1 and R2 on (1 − share) · weights + share · activations.

    Each side counts in units of its value under a random rotation. Raises like `optrot`.

    >>> mixed(model, tokens, share=0.5, tokens=64).orthogonality_error() < 1e-6
    True
    """
    family = original(model, needs_R1="mixed")
    token_ids("calibration", calibration, 2, model)
    inner_share("share", share)
    whole_number("tokens", tokens, 1)
    rotation = starting_point(family, seed, R3, R4)
    weights = weight_matrices(family, R4)
    samples = token_matrices(family, calibration, seed, tokens)
    return _learn(blended(weights, samples, share, rotation), rotation, seed)


@exact_products()
def _learn(
    matrices: list[Matrix],
    rotation: Rotation,
    seed: int,
    method: str = "sampled",
    steps: int | None = None,
    group_size: int | None = None,
) -> Rotation:
    """Descend from `rotation` to the nearest exactly orthogonal one, with its exact objective."""
    one_of("method", method, METHODS)
    if steps is not None:
        whole_number("steps", steps, 1)
    learn, default_steps = METHODS[method]
    grouped = {"group_size": group_size} if group_size else {}
    objective = sum_of_group_norms if group_size else sum_of_fourth_powers
    if rotation.R1 is None:
        learn = _learn_R2_alone
        rotation.history.append(objective(matrices, rotation, **grouped))
    learn(matrices, rotation, steps or default_steps, seed, **grouped)
    rotation = finished(rotation)  # before the objective is taken: drift would flatter it
    rotation.history.append(objective(matrices, rotation, **grouped))
    return rotation.to("cpu", torch.float64)


@runtime_checkable
class Extra(Protocol):
    """What a method adds to the fourth powers: slopes, and factors that follow the rotation."""

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
    length: float = R1_LENGTH,
    group_size: int | None = None,
) -> None:
    """Momentum descent: R1 on drawn rows, R2 on all of its rows at its turns.

    With `group_size`, of the objective for groups.
    """
    if extra:
        extra.refresh(rotation)
    rows = (
        GroupSampler(matrices, rotation, seed, group_size)
        if group_size
        else RowSampler(matrices, rotation, seed)
    )
    if rotation.R1.ndim == 3:  # blocks move together as far as one matrix would
        length /= math.sqrt(len(rotation.R1))
    R1, R2 = Descent(rotation.R1), Descent(rotation.R2)
    for step in tqdm(range(steps), desc="OptRot", unit="step"):
        anneal = 0.5 * (1 + math.cos(math.pi * step / steps))
        if step % R2_EVERY == 0:
            _turn_of_R2(R2, matrices, rotation, extra, anneal, group_size)
        fresh = step % (STEPS_A_DRAW * PASSES) == 0
        if fresh:
            if extra and step:
                extra.refresh(rotation)
                rows.reweigh()
            rows.draw(rotation)
            R1.project()
        with coarse_products():
            value, gradient = rows.slope(step % STEPS_A_DRAW, R1.R, exactly=fresh)
        if extra:
            # both slopes in one unit; a slope alone needs none, since the step's length is given
            gradient = rows.scale * gradient + extra.R1_slope(R1.R)
        R1.step(gradient, length * anneal)
        rotation.R1 = R1.R
        if fresh:  # later in a draw its rows have been seen, and flatter the objective
            rotation.history.append(rows.scale * value.item())


def _turn_of_R2(
    R2: Descent,
    matrices: list[Matrix],
    rotation: Rotation,
    extra: Extra | None,
    anneal: float,
    group_size: int | None,
) -> None:
    """Some steps of R2 on all of its rows at the present R1."""
    with coarse_products():
        rows = (
            GroupR2Rows(matrices, rotation, group_size)
            if group_size
            else R2Rows(matrices, rotation, slope_dtype(rotation.R2.device))
        )
    constant = extra.R2_slope(R2.R) if extra else 0.0
    for _ in range(R2_STEPS):
        R2.step(rows.gradient(R2.R) + constant, R2_LENGTH * anneal)
    R2.project()
    rotation.R2 = R2.R


def _learn_R2_alone(
    matrices: list[Matrix], rotation: Rotation, steps: int, seed: int, group_size: int | None = None
) -> None:
    """R2's turns, without R1's steps between them."""
    R2 = Descent(rotation.R2)
    for step in tqdm(range(0, steps, R2_EVERY), desc="OptRot, R2", unit="turn"):
        anneal = 0.5 * (1 + math.cos(math.pi * step / steps))
        _turn_of_R2(R2, matrices, rotation, None, anneal, group_size)


def _learn_cayley_sgd(matrices: list[Matrix], rotation: Rotation, steps: int, seed: int) -> None:
    """The paper's optimiser: Cayley SGD on the whole objective."""
    for _ in tqdm(range(steps), desc="OptRot, Cayley SGD", unit="step"):
        value, slope1 = 0.0, torch.zeros_like(rotation.R1)
        for matrix in matrices:
            part, slope = fourth_power(matrix.rows("R1", rotation), rotation.R1)
            value += part.item()
            slope1 += slope
        slope2 = R2Rows(matrices, rotation).gradient(rotation.R2)
        rotation.R1 = cayley_sgd_step(rotation.R1, slope1, PAPER_LR)
        rotation.R2 = cayley_sgd_step(rotation.R2, slope2, PAPER_LR)
        rotation.history.append(value)


METHODS = {"sampled": (learn_sampled, 850), "cayley-sgd": (_learn_cayley_sgd, 1000)}
