"""Rotations that are drawn, not learned: random orthogonal, random Hadamard (QuaRot's), GSR's arms.

A random Hadamard rotation is ``diag(±1) H``: the signs mix with the weights, and make the expected
energy of every rotated coordinate the same. GSR (Choi et al., arXiv 2505.03810) puts a Hadamard
matrix on every block of coordinates instead of one on all ("local" instead of "global"), and orders
its columns by sequency, their number of sign changes ("Walsh"), without signs. Order alone changes
nothing per channel: it says which coordinates share a weight group, and in which order GPTQ visits
them.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from transformers import PreTrainedModel

from rotlib.checks import one_of, whole_number, yes_or_no
from rotlib.models.families import Family
from rotlib.models.sound import check_surroundings
from rotlib.models.supported import adapt, check_has_R1
from rotlib.rotations.hadamard import BlockHadamard, block_sizes, walsh_order
from rotlib.rotations.rotation import Rotation

R1_ORDERS = ("walsh", "hadamard")  # of the columns of a Hadamard R1: by sequency, or as constructed

# draws a matrix of a given size
Sampler = Callable[[int, Generator], Tensor | BlockHadamard]


def hadamard_rotation(
    model: PreTrainedModel, seed: int = 0, R3: bool = False, R4: bool = False
) -> Rotation:
    """Randomised Hadamard R1 and R2: random signs on the input side, then the Hadamard matrix.

    With R3 and R4 it is QuaRot's (arXiv 2404.00456). Raises ValueError where the width or head_dim
    has no Hadamard matrix.

    >>> rotation = hadamard_rotation(model, seed=1, R4=True)
    >>> rotation.R1.n == model.config.hidden_size, rotation.online
    (True, ['R4'])
    """
    return sampled(adapt(model), seed, signed_hadamard, random_hadamard, R3, R4)


def random_rotation(
    model: PreTrainedModel, seed: int = 0, R3: bool = False, R4: bool = False
) -> Rotation:
    """R1 and R2 drawn uniformly from the orthogonal group.

    >>> random_rotation(model, seed=1).orthogonality_error() < 1e-12
    True
    """
    return sampled(adapt(model), seed, random_orthogonal, random_orthogonal, R3, R4)


def gsr_rotation(
    model: PreTrainedModel,
    order: str = "walsh",
    block: int | None = None,
    signs: bool = False,
    seed: int = 0,
    R3: bool = False,
    R4: bool = False,
) -> Rotation:
    """GSR's four arms (Choi et al., arXiv 2505.03810, §3): Hadamard blocks in R1, ordered or not.

    With a `block`, the paper's weight group, LH ("hadamard") and GSR ("walsh"); with None, one
    block of the whole width, GH and GW. R2 is a Hadamard matrix on every head, the same in all
    arms. `signs` draws random signs on the input side of R1 and R2 from the seed, which nothing
    else reads; the paper uses none, and GH with signs is `hadamard_rotation`. Raises ValueError,
    naming the sizes that fit, where the block doesn't divide the width or has no Hadamard matrix,
    and where the width or head_dim has none.

    >>> gsr_rotation(model, block=16).R1.block
    16
    """
    family = adapt(model)
    check_has_R1(family, "GSR")
    one_of("order", order, R1_ORDERS)
    yes_or_no("signs", signs)
    n = family.width
    if block is not None:
        whole_number("block (unless it is None)", block, 1)
        if block not in (sizes := block_sizes(n)):
            fault = "don't divide" if n % block else "have no Hadamard matrix, though they divide"
            fitting = ", ".join(map(str, sizes))
            raise ValueError(f"blocks of {block} {fault} the width {n}: choose one of {fitting}")
    columns = walsh_order(block or n) if order == "walsh" else None

    def in_blocks(width: int, generator: Generator) -> BlockHadamard:
        drawn_signs = random_signs(width, generator) if signs else None
        return BlockHadamard(width, block or width, drawn_signs, columns)

    def head(width: int, generator: Generator) -> Tensor:
        return random_hadamard(width, generator) if signs else BlockHadamard(width, width).dense()

    return sampled(family, seed, in_blocks, head, R3, R4)


# what a recipe names besides "gsr"
DRAWN: dict[str, Callable[..., Rotation]] = {
    "random": random_rotation,
    "hadamard": hadamard_rotation,
}


def sampled(
    family: Family,
    seed: int,
    sample_R1: Sampler,
    sample_R2: Sampler,
    R3: bool = False,
    R4: bool = False,
) -> Rotation:
    """R1, then R2 of every head: each sampler draws from one generator that the seed starts.

    R1 is left out where the residual stream can't be turned.
    """
    whole_number("seed", seed, 0)
    check_surroundings()
    generator = Generator().manual_seed(seed)
    R1 = sample_R1(family.width, generator) if family.has_R1 else None
    layers, heads = len(family.layers), family.kv_heads
    R2 = torch.stack([sample_R2(family.head_dim, generator) for _ in range(layers * heads)])
    return Rotation(R1, R2.unflatten(0, (layers, heads)), R3, R4)


def signed_hadamard(n: int, generator: Generator) -> BlockHadamard:
    """``diag(±1) H``, kept as its factors.

    In ``W R`` the signs mix with the weights; ``H diag(±1)`` would only flip rotated coordinates.
    """
    return BlockHadamard(n, n, random_signs(n, generator))


def random_hadamard(n: int, generator: Generator) -> Float[Tensor, "n n"]:
    """``diag(±1) H`` as a matrix."""
    return signed_hadamard(n, generator).dense()


def random_orthogonal(n: int, generator: Generator) -> Float[Tensor, "n n"]:
    """Haar-distributed: QR of a Gaussian with the signs of diag(R) fixed (math-ph/0609050)."""
    Q, R = torch.linalg.qr(
        torch.randn(n, n, generator=generator, dtype=torch.float64, device="cpu")
    )
    return Q * R.diagonal().sign()


def random_signs(n: int, generator: Generator) -> Float[Tensor, " n"]:
    """±1, evenly."""
    return torch.randint(0, 2, (n,), generator=generator, dtype=torch.float64, device="cpu") * 2 - 1
