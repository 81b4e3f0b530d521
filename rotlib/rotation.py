"""What a rotation is, and where it touches the model: the one table, `SITES`.

A linear layer is ``y = x Wᵀ``. Once the gains of the norms are folded into the weights that read them, the residual
stream can be turned by an orthogonal R1 and every head's values by an R2, at no cost: readers become ``W R``, writers
``Rᵀ W`` and the model computes what it did before (QuaRot, arXiv 2404.00456, §4; SpinQuant, arXiv 2405.16406, §3).
R3 and R4 are exact Hadamard matrices applied while the model runs (`online.py`): R3 to queries and keys behind RoPE, R4 to
what down reads, undone in its weight. Learning, fusing and tests read `SITES` and call `rotate_weight`; nobody else knows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from rotlib.checks import whole_number, yes_or_no
from rotlib.families import Family, adapt
from rotlib.hadamard import apply_hadamard


class Site(NamedTuple):
    """How one weight meets the rotations: R on its input side, on its output side, behind RoPE; the norm it reads."""

    reads: str | None
    writes: str | None
    norm: str | None = None
    after_rope: str | None = None


SITES = {
    "embedding": Site(reads=None, writes="R1"),
    "q": Site(reads="R1", writes=None, norm="attention_norm", after_rope="R3"),
    "k": Site(reads="R1", writes=None, norm="attention_norm", after_rope="R3"),
    "v": Site(reads="R1", writes="R2", norm="attention_norm"),
    "o": Site(reads="R2", writes="R1"),
    "gate": Site(reads="R1", writes=None, norm="mlp_norm"),
    "up": Site(reads="R1", writes=None, norm="mlp_norm"),
    "down": Site(reads="R4", writes="R1"),
    "lm_head": Site(reads="R1", writes=None, norm="final_norm"),
}


# a rotation as `times` takes it: a matrix, one block per KV head, a function that applies it, or none
Turn = Tensor | Callable[[Tensor], Tensor] | None


@dataclass
class Rotation:
    """R1 turns the residual stream, R2[layer, kv_head] the values of one KV head; None leaves that side alone.

    Both are float64 and orthogonal. R3 and R4 say whether these online Hadamard rotations are on. `history` holds the
    objective while the rotation was learned, if it was.
    """

    R1: Float[Tensor, "d d"] | None
    R2: Float[Tensor, "layers kv_heads head_dim head_dim"] | None
    R3: bool = False
    R4: bool = False
    history: list[float] = field(default_factory=list)

    def __post_init__(self):
        for name in ("R3", "R4"):
            yes_or_no(name, getattr(self, name))

    @property
    def online(self) -> list[str]:
        """The online rotations that are on."""
        return [name for name in ("R3", "R4") if getattr(self, name)]

    def at(self, site: Site, layer: int | None) -> tuple[Turn, Turn]:
        """The pair (R on the input side, R on the output side) of a site in one layer."""
        R2 = None if layer is None or self.R2 is None else self.R2[layer]
        sides = {"R1": self.R1, "R2": R2, "R4": apply_hadamard if self.R4 else None, None: None}
        return sides[site.reads], sides[site.writes]

    def projected(self, device: torch.device | str = "cpu") -> "Rotation":
        """The nearest exactly orthogonal rotation (polar factor) in float64, on one device."""
        R1, R2 = (None if R is None else polar(R.to(device, torch.float64)) for R in (self.R1, self.R2))
        return replace(self, R1=R1, R2=R2)

    def orthogonality_error(self) -> float:
        """The largest entry of |R Rᵀ − I| over R1 and all R2."""
        return max((_defect(R) for R in (self.R1, self.R2) if R is not None), default=0.0)


class PlacedWeight(NamedTuple):
    """One weight of the model with its site: `gain` is the gain of the norm it reads."""

    site: str
    layer: int | None
    module: nn.Module
    gain: Tensor | None

    @property
    def name(self) -> str:
        """Such as "layers.0.q"."""
        return self.site if self.layer is None else f"layers.{self.layer}.{self.site}"

    def folded(self, dtype: torch.dtype = torch.float64) -> Float[Tensor, "out in"]:
        """The weight with the norm's gain folded in; the embedding is turned so that its rows are outputs."""
        weight = self.module.weight.detach().to(dtype)
        if self.site == "embedding":
            weight = weight.mT
        return weight if self.gain is None else weight * self.gain.detach().to(dtype)


def placed_weights(family: Family, quantized_only: bool = False) -> Iterator[PlacedWeight]:
    """Every weight that a rotation touches, in the model's order; `quantized_only` leaves embedding and head out."""
    if not quantized_only:
        yield PlacedWeight("embedding", None, family.embedding, None)
    for layer in range(len(family.layers)):
        norms = family.norms(layer)
        for name, linear in family.linears(layer).items():
            norm = SITES[name].norm
            yield PlacedWeight(name, layer, linear, norms[norm].weight if norm else None)
    if not quantized_only:
        yield PlacedWeight("lm_head", None, family.lm_head, family.final_norm.weight)


def times(x: Float[Tensor, "... n"], R: Turn) -> Float[Tensor, "... n"]:
    """``x R`` on the last axis. R is (n, n), a function that applies it, or (k, b, b): a block per KV head for all its query heads."""
    if R is None:
        return x
    if callable(R):
        return R(x)
    if R.ndim == 2:
        return x @ R
    heads, b, _ = R.shape
    return torch.einsum("...kgb,kbc->...kgc", x.unflatten(-1, (heads, -1, b)), R).flatten(-3)


def rotate_weight(W: Float[Tensor, "out in"], reads: Turn, writes: Turn) -> Float[Tensor, "out in"]:
    """``Wᵣ = R_outᵀ W R_in``: the effect of a rotation on a weight, defined here and nowhere else."""
    return times(times(W, reads).mT, writes).mT


def hadamard_rotation(model: PreTrainedModel, seed: int = 0, R3: bool = False, R4: bool = False) -> Rotation:
    """Randomised Hadamard R1 and R2 (with R3 and R4: QuaRot): random signs on the input side, then the Hadamard matrix.

    Raises ValueError where the width or head_dim has no Hadamard matrix.
    """
    return replace(_draw(model, seed, random_hadamard), R3=R3, R4=R4)


def random_rotation(model: PreTrainedModel, seed: int = 0, R3: bool = False, R4: bool = False) -> Rotation:
    """R1 and R2 drawn uniformly from the orthogonal group."""
    return replace(_draw(model, seed, random_orthogonal), R3=R3, R4=R4)


def random_hadamard(n: int, generator: torch.Generator) -> Float[Tensor, "n n"]:
    """``diag(±1) H``. In ``W R`` the signs mix with the weights; ``H diag(±1)`` would only flip rotated coordinates."""
    signs = torch.randint(0, 2, (n,), generator=generator, dtype=torch.float64) * 2 - 1
    return apply_hadamard(torch.diag(signs))


def random_orthogonal(n: int, generator: torch.Generator) -> Float[Tensor, "n n"]:
    """Haar-distributed: QR of a Gaussian with the signs of diag(R) fixed (Mezzadri, math-ph/0609050)."""
    Q, R = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return Q * R.diagonal().sign()


def polar(R: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """The orthogonal matrix nearest to R."""
    U, _, Vh = torch.linalg.svd(R)
    return U @ Vh


def _draw(model: PreTrainedModel, seed: int, sample) -> Rotation:
    family = adapt(model)
    whole_number("seed", seed, 0)
    generator = torch.Generator().manual_seed(seed)
    R1 = sample(family.width, generator)
    heads = [sample(family.head_dim, generator) for _ in range(len(family.layers) * family.kv_heads)]
    return Rotation(R1, torch.stack(heads).unflatten(0, (len(family.layers), family.kv_heads)))


def _defect(R: Tensor) -> float:
    R = R.double()
    return (R @ R.mT - torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)).abs().max().item()
