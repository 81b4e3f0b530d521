"""Hadamard matrices of every order that language models use, generated, never tabulated.

A Hadamard matrix has entries ±1 and orthogonal rows: ``H Hᵀ = n I``. Three constructions suffice:
Sylvester (powers of two), Paley I (order q+1, q ≡ 3 mod 4) and Paley II (order 2(q+1), q ≡ 1 mod
4), q a prime power; the Kronecker product of two Hadamard matrices is again one, so 11008 = 344 ·
32 is Paley(7³) ⊗ Sylvester(32). The factors are kept: multiplying by ``A ⊗ B`` costs n(a + b) per
row instead of n². A Walsh matrix is a Hadamard matrix whose rows come by sequency, their number of
sign changes; Sylvester's have 0, 1, 2 … of them (GSR, arXiv 2505.03810, §3). Source: R. E. A. C.
Paley, "On orthogonal matrices" (1933); the symbols follow Hedayat & Wallis, "Hadamard matrices and
their applications" (1978).
"""

from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import product
from math import prod, sqrt

import torch
from jaxtyping import Float, Int, Int8, Num
from sympy import ZZ, factorint
from sympy.polys.galoistools import gf_irreducible_p, gf_rem, gf_sqr
from torch import Tensor

from rotlib.checks import floats, whole_number

LARGEST = 2**20  # far above any width; the search for neighbours of an impossible order stays short
MOST_ROWS = 2**16  # of a matrix that is written out
_SYLVESTER = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8, device="cpu")
_ONE = _SYLVESTER[:1, :1]
_INDICES = (torch.int32, torch.int64)
_SIGNS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int64)


def hadamard(n: int) -> Float[Tensor, "n n"]:
    """The orthogonal Hadamard matrix of order n: float64, entries ±1/√n.

    Raises ValueError where none of the constructions reaches n, naming the nearest orders that
    exist, and above 65536, where it wouldn't fit: `apply_hadamard` needs no matrix.

    >>> H = hadamard(12)
    >>> torch.allclose(H @ H.T, torch.eye(12, dtype=torch.float64))
    True
    """
    factors = hadamard_factors(whole_number("a Hadamard matrix's order", n, 1, LARGEST))
    if n > MOST_ROWS:
        gigabytes = 8 * n * n / 1e9
        raise ValueError(f"a matrix of order {n} takes {gigabytes:.0f} GB: use apply_hadamard")
    return reduce(torch.kron, factors, _ONE).double().div_(sqrt(n))


def apply_hadamard(x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
    """``x @ hadamard(n)`` along the last axis as two small products, n(a + b) per row.

    Raises like `hadamard`.

    >>> apply_hadamard(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    floats("x", x)
    if x.dtype == torch.float16:  # whose range the sums before the division leave
        return apply_hadamard(x.float()).half()
    n = x.shape[-1]
    left, right = _balanced_on(n, x.dtype, x.device)
    # dividing by √n apart keeps the factors ±1: rounded to bfloat16, 1/√n would be a gain that
    # every entry shares
    with torch.autocast(x.device.type, enabled=False):
        y = (x.reshape(-1, len(right)) @ right / sqrt(n)).view(-1, len(left), len(right))
        return torch.matmul(left.mT, y).view(x.shape)


@dataclass(frozen=True, eq=False)
class BlockHadamard:
    """``x diag(signs) (I ⊗ H)``: a Hadamard matrix on every block, applied through its factors.

    The n coordinates are cut into blocks. `signs` are ±1, None for none; `order` says which of H's
    columns comes where in every block, None leaves them as they are. Raises ValueError for anything
    else, since fusing trusts it to be orthogonal.

    >>> BlockHadamard(n=4, block=2)(torch.tensor([3.0, 0.0, 0.0, 4.0]))
    tensor([ 2.1213,  2.1213,  2.8284, -2.8284])
    """

    n: int
    block: int
    signs: Float[Tensor, " n"] | None = None
    order: Int[Tensor, " block"] | None = None

    def __post_init__(self):
        whole_number("n", self.n, 1)
        if self.n % whole_number("block", self.block, 1):
            raise ValueError(f"blocks of {self.block} don't divide {self.n} coordinates")
        hadamard_factors(self.block)
        for name in ("signs", "order"):
            if not isinstance(getattr(self, name), Tensor | None):
                raise ValueError(f"{name} must be a tensor or None, not {getattr(self, name)!r}")
        if self.signs is not None and (
            self.signs.shape != (self.n,)
            or self.signs.is_meta
            or self.signs.layout != torch.strided
            or self.signs.dtype not in _SIGNS
            or not self.signs.abs().eq(1).all()
        ):
            raise ValueError(f"signs must be real, {self.n} numbers that are 1 or -1")
        if self.order is not None and (self.order.is_meta or self.order.dtype not in _INDICES):
            raise ValueError("the order must hold whole numbers (torch.int64)")
        if self.order is not None and self.order.sort().values.tolist() != list(range(self.block)):
            raise ValueError(f"the order must name each of the {self.block} columns once")
        for name in ("signs", "order"):  # a copy, which nobody changes later
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, given.detach().clone())

    def __call__(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        floats("x", x, self.n)
        x = x if self.signs is None else x * self.signs.to(x)
        rotated = apply_hadamard(x.unflatten(-1, (-1, self.block)))
        if self.order is not None:
            rotated = rotated[..., self.order.to(x.device)]
        return rotated.flatten(-2)

    def dense(self) -> Float[Tensor, "n n"]:
        """The one matrix that this is, in float64: to look at, or to learn from."""
        return self(torch.eye(self.n, dtype=torch.float64))


def walsh(n: int) -> Float[Tensor, "n n"]:
    """The orthogonal Walsh matrix: the columns of `hadamard(n)` as rows, by rising sequency.

    For a power of two row s has s sign changes. Elsewhere the constructed matrix has no such
    ladder; columns of equal sequency then keep their order, which is a convention of ours. Raises
    like `hadamard`.

    >>> sequency(walsh(8)).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    return hadamard(n)[:, walsh_order(n)].mT


def walsh_order(n: int) -> Int[Tensor, " n"]:
    """The columns of `hadamard(n)` by rising sequency.

    For a power of two, column s is the bit-reversed Gray code of s.
    """
    if n & (n - 1) == 0:
        bits = n.bit_length() - 1
        columns = [int(f"{s ^ s >> 1:0{bits}b}"[::-1], 2) if bits else 0 for s in range(n)]
        return torch.tensor(columns, device="cpu")
    return sequency(reduce(torch.kron, hadamard_factors(n), _ONE).mT).argsort(stable=True)


def sequency(H: Num[Tensor, "m n"]) -> Int[Tensor, " m"]:
    """The number of sign changes along every row."""
    return (H[:, 1:] * H[:, :-1] < 0).sum(dim=1)


def block_sizes(n: int) -> list[int]:
    """The sizes above 1 of blocks that divide n and have a Hadamard matrix."""
    return [
        block
        for block in range(2, n + 1)
        if n % block == 0 and (block == 2 or block % 4 == 0) and _orders(block) is not None
    ]


@lru_cache
def hadamard_factors(n: int) -> tuple[Int8[Tensor, "m m"], ...]:
    """±1 matrices whose Kronecker product is the Hadamard matrix of order n.

    Raises like `hadamard`.
    """
    whole_number("a Hadamard matrix's order", n, 1, LARGEST)
    orders = _orders(n)
    if orders is None:
        below = next(m for m in range(n - 1, 0, -1) if _orders(m) is not None)
        above = next(m for m in range(n + 1, 2 * n + 2) if _orders(m) is not None)
        raise ValueError(
            f"no Hadamard matrix of order {n} comes from Sylvester and Paley: "
            f"the nearest orders are {below} and {above}, "
            f"and a block-diagonal rotation with blocks of {n & -n} "
            f"(the largest power of two that divides {n}) would fit"
        )
    return tuple(_paley(order) if order > 2 else _SYLVESTER for order in orders)


def _orders(n: int) -> tuple[int, ...] | None:
    """Orders of the factors of n: Paley orders first, then twos; None where n can't be reached."""
    if n & (n - 1) == 0:
        return (2,) * (n.bit_length() - 1)
    for order in range(12, n + 1, 4):
        paley = n % order == 0 and order & (order - 1) and _paley_field(order)
        if paley and (rest := _orders(n // order)) is not None:
            return (order, *rest)
    return None


@lru_cache
def _balanced(n: int) -> tuple[Int8[Tensor, "a a"], Int8[Tensor, "b b"]]:
    """The factors multiplied together into two of orders a and b, a·b = n.

    a + b is the smallest that the factors allow in their order.
    """
    factors = hadamard_factors(n)
    cuts = range(len(factors) + 1)
    size = [prod(len(factor) for factor in factors[:cut]) for cut in cuts]
    cut = min(cuts, key=lambda cut: size[cut] + n // size[cut])
    return reduce(torch.kron, factors[:cut], _ONE), reduce(torch.kron, factors[cut:], _ONE)


@lru_cache
def _balanced_on(
    n: int, dtype: torch.dtype, device: torch.device
) -> tuple[Float[Tensor, "a a"], Float[Tensor, "b b"]]:
    with torch.inference_mode(False):  # kept for callers of every mode
        left, right = _balanced(n)
        return left.to(device, dtype), right.to(device, dtype)


def _paley_field(order: int) -> tuple[int, int] | None:
    """(p, k) of the field GF(p^k) that Paley's construction of this order uses, None without one.

    It is construction I where that exists, else II.
    """
    for q, residue in ((order - 1, 3), (order // 2 - 1, 1)):
        factors = factorint(q)
        if q % 4 == residue and len(factors) == 1:
            return next(iter(factors.items()))
    return None


def _paley(order: int) -> Int8[Tensor, "order order"]:
    p, k = _paley_field(order)
    q = p**k
    with torch.device("cpu"):  # whatever the default is
        bordered = torch.zeros(q + 1, q + 1, dtype=torch.int8)
        bordered[0, 1:] = 1
        bordered[1:, 1:] = _jacobsthal(p, k)
        eye = torch.eye(q + 1, dtype=torch.int8)
        if q % 4 == 3:  # Paley I: I + S, S skew
            bordered[1:, 0] = -1
            return eye + bordered
        # Paley II: C ⊗ [[1,1],[1,-1]] + I ⊗ [[1,-1],[-1,-1]], C symmetric
        bordered[1:, 0] = 1
        conference, diagonal = torch.tensor(
            [[[1, 1], [1, -1]], [[1, -1], [-1, -1]]], dtype=torch.int8
        )
        return torch.kron(bordered, conference) + torch.kron(eye, diagonal)


def _jacobsthal(p: int, k: int) -> Int8[Tensor, "q q"]:
    """Q[i, j] = χ(aᵢ − aⱼ) over GF(p^k).

    χ is +1 at a non-zero square, −1 where the difference is no square, 0 at zero. Field elements
    are digit vectors in base p, subtracted digit by digit; products are taken modulo the first
    irreducible polynomial, so the matrix is the same on every machine.
    """
    monic = ([1, *tail] for tail in product(range(p), repeat=k))
    modulus = next(polynomial for polynomial in monic if gf_irreducible_p(polynomial, p, ZZ))
    digits = torch.tensor(list(product(range(p), repeat=k)), dtype=torch.int32)  # high first
    place = p ** torch.arange(k - 1, -1, -1)
    character = -torch.ones(p**k, dtype=torch.int8)
    for element in digits.tolist():
        square = gf_rem(gf_sqr(_trim(element), p, ZZ), modulus, p, ZZ)
        character[sum(int(c) * p**i for i, c in enumerate(reversed(square)))] = 1
    character[0] = 0
    some_rows = digits[:, None].split(1024)  # all differences at once would take 16 bytes an entry
    return torch.cat([character[((rows - digits) % p * place).sum(-1)] for rows in some_rows])


def _trim(digits: list[int]) -> list[int]:
    """The digits without leading zeros, as sympy's dense polynomials are."""
    while digits and digits[0] == 0:
        digits = digits[1:]
    return digits
