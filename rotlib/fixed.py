"""Rotations that are drawn, not learned: random orthogonal, random Hadamard (QuaRot's), and GSR's four arms.

A random Hadamard rotation is ``diag(±1) H``: the signs mix with the weights, and make the expected energy of every rotated coordinate
the same. GSR (Choi et al., arXiv 2505.03810) puts a Hadamard matrix on every block of coordinates instead of one on all ("local"
instead of "global"), and orders its columns by sequency, their number of sign changes ("Walsh"), without signs. Order alone changes
nothing per channel: it says which coordinates share a weight group, and in which order GPTQ visits them.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from rotlib.checks import one_of, whole_number, yes_or_no
from rotlib.families import adapt
from rotlib.hadamard import BlockHadamard, block_sizes, walsh_order
from rotlib.rotation import Rotation

R1_ORDERS = ("walsh", "hadamard")  # of the columns of a Hadamard R1: by sequency, or as constructed


def hadamard_rotation(model: PreTrainedModel, seed: int = 0, R3: bool = False, R4: bool = False) -> Rotation:
    """Randomised Hadamard R1 and R2 (with R3 and R4: QuaRot): random signs on the input side, then the Hadamard matrix.

    Raises ValueError where the width or head_dim has no Hadamard matrix.
    """
    return replace(draw(model, seed, random_hadamard, _signed_hadamard), R3=R3, R4=R4)


def random_rotation(model: PreTrainedModel, seed: int = 0, R3: bool = False, R4: bool = False) -> Rotation:
    """R1 and R2 drawn uniformly from the orthogonal group."""
    return replace(draw(model, seed, random_orthogonal, random_orthogonal), R3=R3, R4=R4)


def gsr_rotation(
    model: PreTrainedModel,
    order: str = "walsh",
    block: int | None = None,
    signs: bool = False,
    seed: int = 0,
    R3: bool = False,
    R4: bool = False,
) -> Rotation:
    """GSR's four arms (Choi et al., arXiv 2505.03810, §3): a Hadamard matrix on every block of R1, its columns ordered or not.

    With a `block`, the paper's weight group, LH ("hadamard") and GSR ("walsh"); with None, one block of the whole width, GH and GW.
    R2 is a Hadamard matrix on every head, the same in all arms. `signs` draws random signs on the input side of R1 and R2 from the seed,
    which nothing else reads; the paper uses none, and GH with signs is `hadamard_rotation`. Raises ValueError, naming the sizes that fit,
    where the block doesn't divide the width or has no Hadamard matrix, and where the width or head_dim has none.
    """
    family = adapt(model)
    one_of("order", order, R1_ORDERS)
    yes_or_no("signs", signs)
    whole_number("seed", seed, 0)
    n = family.width
    if block is not None and whole_number("block (unless it is None)", block, 1) not in (sizes := block_sizes(n)):
        fault = "don't divide" if n % block else "have no Hadamard matrix, though they divide"
        raise ValueError(f"blocks of {block} {fault} the width {n}: choose one of {', '.join(map(str, sizes))}")
    columns = walsh_order(block or n) if order == "walsh" else None

    def turn(width: int, generator: torch.Generator) -> BlockHadamard:
        return BlockHadamard(width, block or width, random_signs(width, generator) if signs else None, columns)

    def head(width: int, generator: torch.Generator) -> Tensor:
        return random_hadamard(width, generator) if signs else BlockHadamard(width, width).dense()

    return replace(draw(model, seed, head, turn), R3=R3, R4=R4)


# what a recipe names besides "gsr": a rotation that `own.py` adds can be run, swept and compared like these
DRAWN: dict[str, Callable[..., Rotation]] = {"random": random_rotation, "hadamard": hadamard_rotation}


def random_hadamard(n: int, generator: torch.Generator) -> Float[Tensor, "n n"]:
    """``diag(±1) H``. In ``W R`` the signs mix with the weights; ``H diag(±1)`` would only flip rotated coordinates."""
    return _signed_hadamard(n, generator).dense()


def random_orthogonal(n: int, generator: torch.Generator) -> Float[Tensor, "n n"]:
    """Haar-distributed: QR of a Gaussian with the signs of diag(R) fixed (Mezzadri, math-ph/0609050)."""
    Q, R = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return Q * R.diagonal().sign()


def _signed_hadamard(n: int, generator: torch.Generator) -> BlockHadamard:
    return BlockHadamard(n, n, random_signs(n, generator))


def random_signs(n: int, generator: torch.Generator) -> Float[Tensor, " n"]:
    """±1, evenly."""
    return torch.randint(0, 2, (n,), generator=generator, dtype=torch.float64) * 2 - 1


def draw(model: PreTrainedModel, seed: int, sample: Callable, sample_R1: Callable) -> Rotation:
    """R1 and every head's R2, each drawn by a function of its size and a generator that starts from the seed."""
    family = adapt(model)
    whole_number("seed", seed, 0)
    generator = torch.Generator().manual_seed(seed)
    R1 = sample_R1(family.width, generator)
    heads = [sample(family.head_dim, generator) for _ in range(len(family.layers) * family.kv_heads)]
    return Rotation(R1, torch.stack(heads).unflatten(0, (len(family.layers), family.kv_heads)))
