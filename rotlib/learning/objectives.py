"""What a rotation is learned on: matrices whose rotated entries' fourth powers are summed.

`weight_matrices` are OptRot's: q, k, v, o, gate, up, down with the norms folded in (arXiv
2512.24124). `token_matrices` are KurTail's side (arXiv 2503.01483; its loss is a distance of
kurtosis from a uniform's, ours the plain fourth power): a bounded sample of the tokens that q,k,v,
then o, then gate,up read, each scaled to unit root mean square, as a scale for each token would. A
token x meets ``x R`` just as a weight's row does, so both sides share `rotate_weight`, and
`blended` weighs them, each in units of its value under a random rotation, into one sum of fourth
powers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rotlib.models.families import Family
from rotlib.models.reference import check_finite
from rotlib.models.walk import hooks, run_decoder
from rotlib.rotations.rotation import (
    SITES,
    PlacedWeight,
    Rotation,
    Site,
    placed_weights,
    rotate_weight,
)

# tokens kept at every input: with half of them R1 fits the sample visibly better than other text
TOKENS = 2048


@dataclass
class Matrix:
    """A weight with its norm and R4 folded in, or a sample of tokens (tokens, n), with its site.

    `factor` weighs its fourth powers in the sum that is descended.
    """

    site: Site
    layer: int
    values: Float[Tensor, "m n"]
    factor: float = 1.0

    def rows(
        self, name: str, rotation: Rotation, index: Tensor | slice = slice(None)
    ) -> Float[Tensor, "m n"]:
        """The matrix with every rotation but `name` applied, laid out so that it acts on its rows.

        A model kept on the host sends one matrix, or the rows asked for, at a time.
        """
        device = getattr(rotation, name).device
        both = replace(rotation, **{name: None}).at(self.site, self.layer)
        others = [None if R is None else R.float() for R in both]
        values = self.values
        if any(R is not None for R in others):
            values = rotate_weight(values.to(device).float(), *others)
        return (values if self.site.reads == name else values.mT)[index].to(device).float()

    def touched_by(self, name: str) -> bool:
        return name in (self.site.reads, self.site.writes)

    def as_random(self, rotation: Rotation) -> float:
        """The sum of fourth powers to expect of a random rotation: 3 Σ‖row‖⁴/(n + 2), n wide."""
        name = "R1" if self.touched_by("R1") else "R2"
        b = getattr(rotation, name).shape[-1]
        rows = (self.values if self.site.reads == name else self.values.mT).float()
        return 3 / (b + 2) * rows.unflatten(1, (-1, b)).square().sum(-1).square().sum().item()


def weight_matrices(family: Family, R4: bool) -> list[Matrix]:
    """The weights that get quantized, copied once in the model's dtype."""
    return [_weight(placed, R4) for placed in placed_weights(family, quantized_only=True)]


@torch.no_grad()
def token_matrices(
    family: Family, calibration: Int[Tensor, "windows length"], seed: int, tokens: int = TOKENS
) -> list[Matrix]:
    """A sample of what q,k,v and gate,up read, norms' gains left out, and of what o reads.

    The same `tokens` positions of the calibration text everywhere: the first of every window, which
    attention uses as its sink and no other token is like, and others drawn by the seed. The model
    runs once, as it is.
    """
    length = calibration.shape[1]
    order = torch.randperm(
        calibration.numel(), generator=torch.Generator().manual_seed(seed), device="cpu"
    )
    order = torch.cat([torch.arange(0, calibration.numel(), length), order[order % length > 0]])
    chosen = order[:tokens].sort().values
    samples: dict[tuple[str, int], list[Tensor]] = {}
    here = torch.empty(0, dtype=torch.long)  # the positions to keep of the window that runs

    def keep(site: str, layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0][0, here.to(args[0].device)].float()
            unit = x / x.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-12)
            samples.setdefault((site, layer), []).append(unit.to(args[0].dtype))

        return hook

    kept = []
    for layer in range(len(family.layers)):
        norms, o = family.norms(layer), family.linears(layer)["o"]
        kept.append((norms["attention_norm"], keep("q", layer)))
        kept.append((o, keep("o", layer)))
        kept.append((norms["mlp_norm"], keep("gate", layer)))
    with hooks(kept):
        for number, ids in enumerate(calibration):
            here = chosen[chosen // length == number] % length
            if len(here):
                run_decoder(family, ids[None])
    check_finite([one for sample in samples.values() for one in sample])
    return [
        Matrix(SITES[site]._replace(writes=None), layer, torch.cat(sample))
        for (site, layer), sample in samples.items()
    ]


def blended(
    weights: list[Matrix], tokens: list[Matrix], share: float, rotation: Rotation
) -> list[Matrix]:
    """(1 − share) · weights + share · tokens, scaled in place.

    Each side is in units of its value under a random rotation.
    """
    for matrices, part in ((weights, 1 - share), (tokens, share)):
        total = sum(matrix.as_random(rotation) for matrix in matrices)
        if not total > 0:
            raise ValueError("these weights, or what they read, are all zero: nothing to learn on")
        factor = (part / total) ** 0.25
        for matrix in matrices:
            matrix.values *= factor
    return weights + tokens


def sum_of_fourth_powers(matrices: list[Matrix], rotation: Rotation) -> float:
    """The objective, in full: Σ ‖rotated matrix‖₄⁴, each with its factor."""
    return sum(matrix.factor * fourth_powers(matrix, rotation) for matrix in matrices)


def fourth_powers(matrix: Matrix, rotation: Rotation) -> float:
    """‖rotated matrix‖₄⁴, whatever its factor."""
    return rotated_values(matrix, rotation).square().square_().sum().item()


def rotated_values(matrix: Matrix, rotation: Rotation) -> Float[Tensor, "m n"]:
    """The matrix under the whole rotation, in float32, where the rotation is."""
    device = next((R.device for R in rotation.tensors()), matrix.values.device)
    both = rotation.to(device, torch.float32).at(matrix.site, matrix.layer)
    return rotate_weight(matrix.values.to(device).float(), *both)


def _weight(placed: PlacedWeight, R4: bool) -> Matrix:
    """A copy of one weight; R4 is fixed, so it is applied once and leaves the site."""
    site = placed.at
    W = placed.folded(torch.float32)
    if site.reads == "R4":
        reads, _ = Rotation(None, None, R4=R4).at(site, placed.layer)
        W, site = rotate_weight(W, reads, None), site._replace(reads=None)
    return Matrix(site, placed.layer, W.to(placed.module.weight.dtype, copy=True))
