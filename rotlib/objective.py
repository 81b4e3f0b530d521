"""What a rotation is learned on: matrices whose rotated entries' fourth powers are summed.

`weight_matrices` are OptRot's: q, k, v, o, gate, up, down with the norms folded in (arXiv 2512.24124). `token_matrices` are
KurTail's side (arXiv 2503.01483; its loss is a distance of kurtosis from a uniform's, ours the plain fourth power): a bounded
sample of the tokens that q,k,v, then o, then gate,up read, each scaled to unit root mean square, as a scale for each token
would. A token x meets ``x R`` just as a weight's row does, so both sides share `rotate_weight`, and `blended` weighs them,
each in units of its value under a random rotation, into one sum of fourth powers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rotlib.families import Family
from rotlib.rotation import SITES, PlacedWeight, Rotation, Site, placed_weights, rotate_weight

TOKENS = 2048  # tokens kept at every input: with half of them R1 fits the sample visibly better than other text

# the weight that R1 acts on, row by row, is scaled by one of these before learning; which one the paper uses is unknown
NORMALISATIONS: dict[str, Callable[[Tensor], Tensor | float]] = {
    "plain": lambda rows: 1.0,
    "per-matrix": lambda rows: 1 / rows.square().mean().sqrt().clamp_min(1e-12),
    "per-row": lambda rows: 1 / rows.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-12),
}


@dataclass
class Matrix:
    """A weight with its norm and R4 folded in, or a sample of tokens (tokens, n), and where R1 and R2 meet it.

    `factor` weighs its fourth powers in the sum that is descended.
    """

    site: Site
    layer: int
    values: Float[Tensor, "m n"]
    factor: float = 1.0

    def rows(self, name: str, rotation: Rotation, index: Tensor | slice = slice(None)) -> Float[Tensor, "m n"]:
        """The matrix with every rotation but `name` applied, laid out so that `name` acts on its rows."""
        device = getattr(rotation, name).device  # a model kept on the host sends one matrix, or the rows asked for, at a time
        others = [None if R is None else R.float() for R in replace(rotation, **{name: None}).at(self.site, self.layer)]
        values = self.values
        if any(R is not None for R in others):
            values = rotate_weight(values.to(device).float(), *others)
        return (values if self.site.reads == name else values.mT)[index].to(device).float()

    def touched_by(self, name: str) -> bool:
        return name in (self.site.reads, self.site.writes)

    def as_random(self, rotation: Rotation) -> float:
        """The sum of fourth powers to expect under a random rotation of rows of width n: 3 Σ‖row‖⁴/(n + 2)."""
        name = "R1" if self.touched_by("R1") else "R2"
        b = getattr(rotation, name).shape[-1]
        rows = (self.values if self.site.reads == name else self.values.mT).float()
        return 3 / (b + 2) * rows.unflatten(1, (-1, b)).square().sum(-1).square().sum().item()


def weight_matrices(family: Family, normalisation: str, R4: bool) -> list[Matrix]:
    """The weights that get quantized, held once in the model's dtype."""
    return [_weight(placed, NORMALISATIONS[normalisation], R4) for placed in placed_weights(family, quantized_only=True)]


@torch.no_grad()
def token_matrices(family: Family, calibration: Int[Tensor, "windows length"], seed: int, tokens: int = TOKENS) -> list[Matrix]:
    """A sample of what q,k,v and gate,up read with the norms' gains left out, and of what o reads, in every layer.

    The same `tokens` positions of the calibration text everywhere: the first of every window, which attention uses as its
    sink and no other token is like, and others drawn by the seed. The model runs once, as it is.
    """
    length = calibration.shape[1]
    order = torch.randperm(calibration.numel(), generator=torch.Generator().manual_seed(seed))
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

    handles = []
    for layer in range(len(family.layers)):
        modules = {"q": family.norms(layer)["attention_norm"], "o": family.linears(layer)["o"], "gate": family.norms(layer)["mlp_norm"]}
        handles += [module.register_forward_pre_hook(keep(site, layer)) for site, module in modules.items()]
    try:
        for number, ids in enumerate(calibration):
            here = chosen[chosen // length == number] % length
            if len(here):
                family.decoder(input_ids=ids[None].to(family.embedding.weight.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [Matrix(SITES[site]._replace(writes=None), layer, torch.cat(kept)) for (site, layer), kept in samples.items()]


def blended(weights: list[Matrix], tokens: list[Matrix], share: float, rotation: Rotation) -> list[Matrix]:
    """(1 − share) · weights + share · tokens, each side in units of its value under a random rotation; scaled in place."""
    for matrices, part in ((weights, 1 - share), (tokens, share)):
        factor = (part / sum(matrix.as_random(rotation) for matrix in matrices)) ** 0.25
        for matrix in matrices:
            matrix.values *= factor
    return weights + tokens


def sum_of_fourth_powers(matrices: list[Matrix], rotation: Rotation) -> float:
    """The objective, in full: Σ ‖rotated matrix‖₄⁴, each with its factor."""
    return sum(matrix.factor * fourth_powers(matrix, rotation) for matrix in matrices)


def fourth_powers(matrix: Matrix, rotation: Rotation) -> float:
    """‖rotated matrix‖₄⁴, whatever its factor."""
    return rotated_values(matrix, rotation).square_().square_().sum().item()


def rotated_values(matrix: Matrix, rotation: Rotation) -> Float[Tensor, "m n"]:
    """The matrix under the whole rotation, in float32, where the rotation is."""
    device = next((R.device for R in rotation.tensors()), matrix.values.device)
    values = matrix.values.to(device).float()
    return rotate_weight(values, *rotation.to(values.device, torch.float32).at(matrix.site, matrix.layer))


def _weight(placed: PlacedWeight, scale: Callable[[Tensor], Tensor | float], R4: bool) -> Matrix:
    """One weight, scaled where R1 meets its rows; R4 is fixed, so it is applied once and leaves the site."""
    site = SITES[placed.site]
    W = placed.folded(torch.float32)
    W = W * scale(W) if site.reads == "R1" else (W.mT * scale(W.mT)).mT
    if site.reads == "R4":
        reads, _ = Rotation(None, None, R4=R4).at(site, placed.layer)
        W, site = rotate_weight(W, reads, None), site._replace(reads=None)
    return Matrix(site, placed.layer, W.to(placed.module.weight.dtype))
