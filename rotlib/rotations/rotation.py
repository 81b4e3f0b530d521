"""What a rotation is, and where it touches the model: the one table, `SITES`.

A linear layer is ``y = x Wᵀ``. Once the gains of the norms are folded into the weights that read
them, the residual stream can be turned by an orthogonal R1 and every head's values by an R2, at no
cost: readers become ``W R``, writers ``Rᵀ W`` and the model computes what it did before (QuaRot,
arXiv 2404.00456, §4; SpinQuant, arXiv 2405.16406, §3). R3 and R4 are exact Hadamard matrices
applied while the model runs (`online.py`): R3 to queries and keys behind RoPE, R4 to what down
reads, undone in its weight. OSTQuant's diagonal scales (arXiv 2501.13987) multiply what one weight
puts out and divide what the next one reads. Learning, fusing and tests read `SITES` and call
`rotate_weight`; nobody else knows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rotlib.checks import FLOATS, all_finite, floats, shown, yes_or_no
from rotlib.models.families import Family, kind_of
from rotlib.rotations.hadamard import BlockHadamard, apply_hadamard


class Site(NamedTuple):
    """How one weight meets the rotations, and which norm it reads.

    `reads` names the R on its input side, `writes` that on its output side, `after_rope` that
    behind RoPE. Scales are named with the side they stand on and the power they have there:
    `row_scale` multiplies the outputs by s (or, as ("query_key", -1), by 1/s) before the rotation,
    `column_scale` the inputs before it. The scale of a norm's output, named like the norm, comes
    behind R1: its readers' rotated columns are multiplied, the norm's gain divides.
    """

    reads: str | None
    writes: str | None
    norm: str | None = None
    after_rope: str | None = None
    row_scale: tuple[str, int] | None = None
    column_scale: tuple[str, int] | None = None

    def without_R1(self) -> "Site":
        """The same where the residual stream isn't turned, and no norm folded."""
        reads, writes = (None if R == "R1" else R for R in (self.reads, self.writes))
        return self._replace(reads=reads, writes=writes, norm=None)


SITES = {
    "embedding": Site(reads=None, writes="R1"),
    "q": Site(
        reads="R1", writes=None, norm="attention_norm", after_rope="R3", row_scale=("query_key", 1)
    ),
    "k": Site(
        reads="R1", writes=None, norm="attention_norm", after_rope="R3", row_scale=("query_key", -1)
    ),
    "v": Site(reads="R1", writes="R2", norm="attention_norm", row_scale=("value", 1)),
    "o": Site(reads="R2", writes="R1", column_scale=("value", -1)),
    "gate": Site(reads="R1", writes=None, norm="mlp_norm"),
    "up": Site(reads="R1", writes=None, norm="mlp_norm", row_scale=("up", 1)),
    "down": Site(reads="R4", writes="R1", column_scale=("up", -1)),
    "lm_head": Site(reads="R1", writes=None, norm="final_norm"),
}


# how many axes a matrix may have, and what they are
_AXES = {"R1": ((2, 3), "n x n, or blocks x b x b"), "R2": ((4,), "layers x heads x n x n")}

# a rotation as `times` takes it: a matrix, the blocks on its diagonal (each for all query heads of
# a KV head), a function, or none
Turn = Tensor | Callable[[Tensor], Tensor] | None


@dataclass(eq=False)
class Rotation:
    """R1 turns the residual stream, R2[layer, kv_head] the values of one KV head.

    None leaves that side alone. Both are float64 and orthogonal. R1 is one matrix, or the blocks of
    a block-diagonal one, or a Hadamard matrix kept as its factors, and is applied as what it is. R3
    and R4 say whether these online Hadamard rotations are on. `scales` holds OSTQuant's positive
    diagonal scales, a row a layer, by the names and shapes of `scale_shapes`; a missing one is all
    ones. `history` holds the objective while the rotation was learned, if it was.

    >>> rotation = Rotation(R1=torch.eye(48), R2=None, R4=True)
    >>> rotation.online, rotation.orthogonality_error()
    (['R4'], 0.0)
    """

    R1: Float[Tensor, "d d"] | Float[Tensor, "blocks b b"] | BlockHadamard | None
    R2: Float[Tensor, "layers kv_heads head_dim head_dim"] | None
    R3: bool = False
    R4: bool = False
    history: list[float] = field(default_factory=list)
    scales: dict[str, Float[Tensor, "layers ..."]] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("R3", "R4"):
            yes_or_no(name, getattr(self, name))

    @property
    def online(self) -> list[str]:
        """The online rotations that are on."""
        return [name for name in ("R3", "R4") if getattr(self, name)]

    def at(self, site: Site, layer: int | None) -> tuple[Turn, Turn]:
        """(R on the input side, R on the output side) of a site in one layer.

        Each comes with the scales around it. Raises ValueError for what is no site.
        """
        if not isinstance(site, Site):
            raise ValueError(f"a site is one of SITES, such as SITES['q'], not {shown(site)}")
        R2 = None if layer is None or self.R2 is None else self.R2[layer]
        sides = {"R1": self.R1, "R2": R2, "R4": apply_hadamard if self.R4 else None, None: None}
        before, behind = self.scale(site.column_scale, layer), self.scale((site.norm, 1), layer)
        reads = _between(before, sides[site.reads], behind)
        return reads, _between(self.scale(site.row_scale, layer), sides[site.writes], None)

    def on_inputs(self, site: Site, layer: int) -> Turn:
        """What happens to the inputs x that a site reads: they are rotated, and the scales undone.

        The rotated weight then puts out what the weight did (rotated).
        """
        undone = replace(self, scales={name: 1 / scale for name, scale in self.scales.items()})
        return undone.at(site, layer)[0]

    def scale(self, named: tuple[str | None, int] | None, layer: int | None) -> Tensor | None:
        """One layer's scale, named as (name, power), where there is one.

        A scale of RoPE's pairs is spelled out for both coordinates of each.
        """
        name, power = named or (None, 0)
        if layer is None or name not in self.scales:
            return None
        scale = self.scales[name][layer] ** power
        return scale.repeat(1, 2) if name == "query_key" else scale

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Rotation":
        """Its matrices and scales on a device, in a dtype; raises ValueError for integers."""
        if dtype not in FLOATS:
            raise ValueError(f"a rotation's dtype must be floating-point, not {shown(dtype)}")
        matrices = {name: R.to(device, dtype) for name, R in self._matrices().items()}
        scales = {name: scale.to(device, dtype) for name, scale in self.scales.items()}
        return replace(self, **matrices, scales=scales)

    def projected(self, device: torch.device | str = "cpu") -> "Rotation":
        """The nearest exactly orthogonal rotation (polar factor) in float64, on one device."""
        rotation = self.to(device, torch.float64)
        return replace(rotation, **{name: polar(R) for name, R in rotation._matrices().items()})

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that weights are rotated in: its matrices', float64 where it has none."""
        return next((R.dtype for R in self._matrices().values()), torch.float64)

    def orthogonality_error(self) -> float:
        """The largest entry of |R Rᵀ − I| over R1 and all R2.

        A Hadamard matrix that is kept as its factors has none. Raises ValueError for other factors.
        """
        if isinstance(self.R1, BlockHadamard):
            replace(self.R1)  # looks at them: they may have been changed in place
        return max((_defect(R) for R in self._matrices().values()), default=0.0)

    def tensors(self) -> Iterator[Tensor]:
        """Everything it holds, such as a digest of it reads."""
        if isinstance(self.R1, BlockHadamard):
            parts = (torch.tensor([self.R1.n, self.R1.block]), self.R1.signs, self.R1.order)
            yield from (part for part in parts if part is not None)
        yield from (*self._matrices().values(), *self.scales.values())

    def digest(self) -> str:
        """Of all its numbers: a rotation that is learned again needn't be the same to the last bit.

        >>> Rotation(torch.eye(4), None).digest() == Rotation(torch.eye(4), None).digest()
        True
        """
        if any(tensor.is_meta for tensor in self.tensors()):
            raise ValueError("this rotation lies on the device 'meta', where it has no numbers")
        whole = (tensor.detach().cpu().contiguous() for tensor in self.tensors())
        parts = (tensor.view(torch.uint8).numpy().tobytes() for tensor in whole)
        return sha256(b"".join(parts)).hexdigest()[:12]

    def told(self) -> dict:
        """What a model's config says of the rotation that was fused into it, as plain data.

        `folded` is in the weights, `at_runtime` is what whoever runs them has to do.

        >>> Rotation(R1=torch.eye(48), R2=None, R4=True).told()["at_runtime"]
        {'R4': 'Hadamard, on the inputs of down_proj'}
        """
        folded = {}
        if isinstance(self.R1, BlockHadamard):
            kind, whole, block = "Hadamard", self.R1.n == self.R1.block, self.R1.block
        elif self.R1 is not None:
            kind, whole, block = "matrix", self.R1.ndim == 2, self.R1.shape[-1]
        if self.R1 is not None:
            folded["R1"] = kind if whole else f"{kind}, blocks of {block}"
        if self.R2 is not None:
            folded["R2"] = f"matrix of {self.R2.shape[-1]}, one a layer and KV head"
        if self.scales:
            folded["scales"] = ", ".join(self.scales)
        at_runtime = {
            "R3": "Hadamard, on queries and keys behind RoPE",
            "R4": "Hadamard, on the inputs of down_proj",
        }
        return {
            "folded": folded,
            "at_runtime": {name: at_runtime[name] for name in self.online},
            "objective": self.history[-1] if self.history else None,
            "digest": self.digest(),
        }

    def _matrices(self) -> dict[str, Tensor]:
        """R1 and R2 where they are matrices; raises ValueError where they are something else."""
        found = {
            name: R
            for name, R in (("R1", self.R1), ("R2", self.R2))
            if R is not None and not isinstance(R, BlockHadamard)
        }
        for name, R in found.items():
            floats(name, R)
            axes, shape = _AXES[name]
            if R.ndim not in axes or R.shape[-1] != R.shape[-2]:
                raise ValueError(f"{name} must be a tensor of {shape}, not {tuple(R.shape)}")
        return found


class PlacedWeight(NamedTuple):
    """One weight of the model with the name of its site; `at` is the site itself.

    It is the entry of `SITES`, adjusted where the model needs it. `gain` is that of the norm that
    the weight reads.
    """

    site: str
    layer: int | None
    module: nn.Module
    gain: Tensor | None
    at: Site

    @property
    def name(self) -> str:
        """Such as "layers.0.q"."""
        return self.site if self.layer is None else f"layers.{self.layer}.{self.site}"

    def folded(
        self, dtype: torch.dtype = torch.float64, device: torch.device | None = None
    ) -> Float[Tensor, "out in"]:
        """The weight with the norm's gain folded in, where it is or on a device.

        The embedding is turned so that its rows are outputs.
        """
        weight = self.module.weight.detach().to(device).to(dtype)  # there, not on the host
        if self.site == "embedding":
            weight = weight.mT
        return weight if self.gain is None else weight * self.gain.detach().to(weight)

    def rotated(
        self, rotation: Rotation, device: torch.device | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """("weight", its value as the rotation leaves it), and ("bias", …) where there is one.

        Values are in the rotation's dtype and, like the rotation, on that device.
        """
        reads, writes = rotation.at(self.at, self.layer)
        rotated = rotate_weight(self.folded(rotation.dtype, device), reads, writes)
        yield "weight", rotated.mT if self.site == "embedding" else rotated
        if getattr(self.module, "bias", None) is not None:
            yield "bias", times(self.module.bias.detach().to(device, rotation.dtype), writes)


def check_sizes(family: Family, least: float, most: float, beyond: str) -> None:
    """Raises ValueError for a linear whose largest weight isn't between these, unless it is 0.

    So it does where it isn't once the gain of the norm before it is folded in.
    """
    for placed in placed_weights(family, quantized_only=True):
        largest = placed.module.weight.abs().max().item()
        sizes = {"": largest}
        if placed.gain is not None:
            low, high = (gain.item() for gain in placed.gain.abs().aminmax())
            if not least < largest * low <= largest * high < most:  # else there's no need to fold
                sizes[" with its norm's gain"] = placed.folded().abs().max().item()
        for what, size in sizes.items():
            if size and not least < size < most:
                raise ValueError(
                    f"{placed.name} has weights of size {size:.0e}{what}, beyond what {beyond}: "
                    "scale the model first"
                )


def placed_weights(family: Family, quantized_only: bool = False) -> Iterator[PlacedWeight]:
    """Every weight that a rotation touches, in the model's order.

    `quantized_only` leaves embedding, routers and head out, as does a family without R1.
    """
    ends = family.has_R1 and not quantized_only
    if ends:
        yield PlacedWeight("embedding", None, family.embedding, None, SITES["embedding"])
    for layer in range(len(family.layers)):
        yield from placed_in_layer(family, layer)
        if ends and (router := family.router(layer)) is not None:
            gain = family.norms(layer)["mlp_norm"].weight
            yield PlacedWeight("router", layer, router, gain, SITES["gate"])  # it reads the same
    if ends:
        gain = family.final_norm.weight
        yield PlacedWeight("lm_head", None, family.lm_head, gain, SITES["lm_head"])


def placed_in_layer(family: Family, layer: int) -> Iterator[PlacedWeight]:
    """The linears of one decoder layer."""
    norms = family.norms(layer)
    for name, linear in family.linears(layer).items():
        site = SITES[kind_of(name)]
        if name in ("q", "k") and family.query_key_norms(layer):
            # the scale of queries and keys goes into those norms' gains
            site = site._replace(row_scale=None)
        if not family.has_R1:
            site = site.without_R1()
        gain = norms[site.norm].weight if site.norm else None
        yield PlacedWeight(name, layer, linear, gain, site)


def norm_gains(
    family: Family, rotation: Rotation, layer: int
) -> Iterator[tuple[nn.Module, Float[Tensor, " n"]]]:
    """The norms of one layer whose gain a rotation changes, with the new gain.

    It is ones, or one over the norm's scale. A norm on query or key heads takes up their scale.
    """
    for name, norm in family.norms(layer).items():
        scale = rotation.scale((name, -1), layer)
        yield norm, torch.ones_like(norm.weight) if scale is None else scale
    for norm, power in zip(family.query_key_norms(layer), (1, -1), strict=False):
        if (scale := rotation.scale(("query_key", power), layer)) is not None:
            yield norm, norm.weight.detach() * scale.squeeze(0).to(norm.weight.device)


def scale_shapes(family: Family) -> dict[str, tuple[int, ...]]:
    """The scales that a model can take, and their shapes: OSTQuant's five families.

    attention_norm and mlp_norm lie between a norm and its readers, up between up and down, value
    between v and o for every KV head, query_key between q and k, one for each pair of coordinates
    that RoPE turns, where it turns them all and no norm spans the heads. A family without R1 takes
    up and value, a mixture of experts all but up.
    """
    layers, heads = len(family.layers), family.kv_heads
    shapes = dict.fromkeys(family.norm_paths, (layers, family.width))
    if not family.experts:
        shapes["up"] = (layers, family.inner_width)
    shapes["value"] = (layers, heads, family.head_dim)
    norms = family.query_key_norms(0)
    by_head = all(norm.weight.numel() == family.head_dim for norm in norms)  # OLMoE's span all
    if family.rotary and family.has_R1 and by_head:
        pairs = family.head_dim // 2
        shapes["query_key"] = (layers, 1 if norms else heads, pairs)
    return shapes


def _between(before: Tensor | None, R: Turn, behind: Tensor | None) -> Turn:
    """A rotation with a scale before and one behind it."""
    if before is None and behind is None:
        return R

    def apply(x: Tensor) -> Tensor:
        x = times(x if before is None else _scaled(x, before), R)
        return x if behind is None else _scaled(x, behind)

    return apply


def _scaled(x: Float[Tensor, "... n"], scale: Float[Tensor, "*heads b"]) -> Float[Tensor, "... n"]:
    """x times a scale of every coordinate, or of every coordinate of each KV head.

    A KV head's scale serves all its query heads alike.
    """
    if scale.ndim == 1:
        return x * scale
    heads, b = scale.shape
    return (x.unflatten(-1, (heads, -1, b)) * scale.unsqueeze(1)).flatten(-3)


def times(x: Float[Tensor, "... n"], R: Turn) -> Float[Tensor, "... n"]:
    """``x R`` on the last axis.

    R is (n, n), a function that applies it, or (k, b, b): a block per KV head for all its query
    heads.
    """
    if R is None:
        return x
    if callable(R):
        return R(x)
    if R.ndim == 2:
        return x @ R
    heads, b, _ = R.shape
    return torch.einsum("...kgb,kbc->...kgc", x.unflatten(-1, (heads, -1, b)), R).flatten(-3)


def rotate_weight(W: Float[Tensor, "out in"], reads: Turn, writes: Turn) -> Float[Tensor, "out in"]:
    """``Wᵣ = R_outᵀ W R_in``: what a rotation does to a weight, defined here and nowhere else."""
    return times(times(W, reads).mT, writes).mT


def as_matrix(R1: Tensor | BlockHadamard) -> Float[Tensor, "d d"]:
    """R1 as one matrix, for learning, where no factors survive."""
    if isinstance(R1, BlockHadamard):
        return R1.dense()
    return torch.block_diag(*R1) if R1.ndim == 3 else R1


def as_blocks(R1: Tensor | BlockHadamard) -> Float[Tensor, "blocks b b"]:
    """The blocks on R1's diagonal; raises ValueError where it has a single one."""
    if isinstance(R1, BlockHadamard) and R1.block < R1.n:
        k = R1.n // R1.block
        cut = R1.dense().unflatten(0, (k, -1)).unflatten(2, (k, -1))
        return cut.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    if isinstance(R1, BlockHadamard) or R1.ndim == 2:
        raise ValueError(
            "R1 has no blocks to learn within: start from a block-diagonal one, "
            "such as rl.gsr_rotation(model, block=64)"
        )
    return R1


def polar(R: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """The orthogonal matrix nearest to R."""
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    if torch.linalg.matrix_norm(R.mT @ R - eye).max() < 0.5:  # which six steps take below 1e-16
        return newton_schulz(R, steps=6)
    if not all_finite(R):
        raise ValueError("a rotation must hold finite numbers")
    U, _, Vh = torch.linalg.svd(R)
    return U @ Vh


def newton_schulz(R: Float[Tensor, "*batch n n"], steps: int) -> Float[Tensor, "*batch n n"]:
    """R, nearly orthogonal, nearer to its polar factor.

    A step takes a defect e = ‖RᵀR − I‖ to 3/4 e², by matrix products alone.
    """
    for _ in range(steps):
        R = 1.5 * R - 0.5 * R @ (R.mT @ R)
    return R


def _defect(R: Tensor) -> float:
    R = R.double()
    return (R @ R.mT - torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)).abs().max().item()
