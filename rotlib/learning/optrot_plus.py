"""OptRot+: OptRot's objective with the covariance of what each weight reads (arXiv 2512.24124).

The paper's formula was not available when this was written; the forms here are **inferred** from
its bound on GPTQ's layer error, ``μ² ‖W‖²_F tr(D) / (n (2^b − 1)²)``, with μ² ∝ max W² / ‖W‖²_F
softened to a fourth moment. `bound` is the sum of the bounds themselves, ``Σ_W √(m/n) ‖W_R‖₄² ·
tr(D_W(R))``, which has the units of an error; `product` weighs OptRot's own proxy, ``Σ_W ‖W_R‖₄⁴ ·
tr(D_W(R))``; `relative` takes every bound over its weight's energy tr(W H Wᵀ). Hessians are
collected once, on the folded un-rotated model, and rotated analytically; only what R1 and R2 turn
is kept, one d×d matrix an input, and of what down reads, which no learned rotation turns, tr(D)
alone.

The descent is OptRot's. A product's slope has two parts: the fourth powers', with a factor for
every matrix that is taken anew before each draw of rows, and tr(D)'s in closed form
(`hessian.py`), for a few inputs at every step.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from rotlib.checks import one_of, token_ids, whole_number
from rotlib.learning.objectives import Matrix, fourth_powers, weight_matrices
from rotlib.learning.optrot import learn_sampled
from rotlib.learning.start import finished, original, starting_point
from rotlib.models.families import READERS, Family
from rotlib.models.supported import check_no_experts
from rotlib.precision import exact_products
from rotlib.quantization.hessian import damped, hessians, pivots, pivots_and_slope
from rotlib.rotations.hadamard import apply_hadamard
from rotlib.rotations.rotation import Rotation, placed_in_layer, times

FORMS = ("bound", "product", "relative")
STEPS = 400
# of its first step: tr(D) is steeper than the fourth powers, longer steps climb before they descend
R1_LENGTH = 0.5
INPUTS = 4  # inputs of R1 whose tr(D) is descended at a step
REFRESH = 4  # draws of rows between two passes over all weights
TOKENS_PER_INPUT = 2  # fewer tokens than this for every input leave the covariance to the damping


@torch.no_grad()
@exact_products()
def optrot_plus(
    model: PreTrainedModel,
    calibration: Int[Tensor, "windows length"],
    seed: int = 0,
    form: str = "bound",
    steps: int | None = None,
    R3: bool = False,
    R4: bool = False,
) -> Rotation:
    """Learn R1 and R2 on the weights and on the covariance of what they read.

    The model stays as it is. `form` is one of `FORMS`. `history` holds the objective at every pass
    over all weights; the last entry is the result's. Raises ValueError for an unknown choice, fewer
    calibration tokens than twice the widest rotated input, a covariance that no damping makes
    positive definite (naming what reads it), or a model that `optrot` would refuse.

    >>> rotation = optrot_plus(model, tokens, steps=2)
    >>> rotation.orthogonality_error() < 1e-6
    True
    """
    one_of("form", form, FORMS)
    steps = whole_number("steps", STEPS if steps is None else steps, 1)
    token_ids("calibration", calibration, 2, model)
    family = original(model, needs_R1="OptRot+")
    check_no_experts(family, "OptRot+")
    widest = max(family.width, family.linears(0)["o"].in_features)
    if calibration.numel() < TOKENS_PER_INPUT * widest:
        raise ValueError(
            f"{calibration.numel()} calibration tokens are too few for a stable covariance of "
            f"{widest} inputs: give at least {TOKENS_PER_INPUT * widest}"
        )
    rotation = starting_point(family, seed, R3, R4)
    matrices = weight_matrices(family, R4)
    bound = _Bound(matrices, _collect(family, calibration, R4), form)
    learn_sampled(matrices, rotation, steps, seed, bound, R1_LENGTH)
    rotation = finished(rotation)
    rotation.history = [*bound.history, bound.value(rotation)]
    return rotation.to("cpu", torch.float64)


@dataclass
class Covariances:
    """What the objective knows of the inputs.

    Damped H of what R1 turns (q,k,v then gate,up of every layer) and R2 turns (o's), tr(D) of what
    down reads, and every weight's tr(W H Wᵀ) in the model's order.
    """

    R1: Float[Tensor, "inputs d d"]
    R2: Float[Tensor, "layers n n"]
    down: Float[Tensor, " layers"]
    energies: list[float]


def _collect(family: Family, calibration: Tensor, R4: bool) -> Covariances:
    """One walk through the model; Hessians wider than R1 and R2 are dropped layer by layer."""
    R1, R2, down, energies = [], [], [], []
    for layer, H in enumerate(hessians(family, calibration)):
        reads = {site: H[sites[0]] for sites in READERS for site in sites}
        folded = {
            weight.site: weight.folded(torch.float32, family.device)
            for weight in placed_in_layer(family, layer)
        }
        energies += [(W @ reads[site] * W).sum().item() for site, W in folded.items()]
        safe = {site: damped(matrix, f"layers.{layer}.{site}") for site, matrix in H.items()}
        R1 += [safe["q"], safe["gate"]]
        R2.append(safe["o"])
        read_by_down = safe["down"]
        if R4:
            read_by_down = times(times(read_by_down, apply_hadamard).mT, apply_hadamard)
        down.append(pivots(read_by_down.double()).sum().float())
    return Covariances(torch.stack(R1), torch.stack(R2), torch.stack(down), energies)


@dataclass
class _Bound:
    """The objective as `learn_sampled` asks for it: the fourth powers' factors, tr(D)'s slopes."""

    matrices: list[Matrix]
    H: Covariances
    form: str
    history: list[float] = field(default_factory=list)
    _calls: int = 0
    _next: int = 0

    def refresh(self, rotation: Rotation) -> None:
        """Every `REFRESH` calls, take ‖·‖₄⁴ and tr(D) anew: they are each other's factors."""
        self._calls += 1
        if (self._calls - 1) % REFRESH:
            return
        products = self._products(rotation)
        self._slopes1, self._slopes2 = torch.zeros(len(self.H.R1)), torch.zeros(len(self.H.R2))
        for matrix, fourth, proxy, trace in products:
            matrix.factor = (
                trace if self.form == "product" else trace * proxy / (2 * max(fourth, 1e-300))
            )
            which, place = self._place(matrix)
            if which != "down":
                (self._slopes1 if which == "R1" else self._slopes2)[place] += proxy
        self.history.append(sum(proxy * trace for _, _, proxy, trace in products))

    def value(self, rotation: Rotation) -> float:
        """The objective of a rotation, exactly."""
        return sum(proxy * trace for _, _, proxy, trace in self._products(rotation))

    def R1_slope(self, R1: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
        """An unbiased estimate of ∂/∂R1 of Σ proxy · tr(D): a few inputs in turn."""
        inputs = len(self.H.R1)
        chosen = torch.arange(self._next, self._next + min(INPUTS, inputs)) % inputs
        self._next = int(chosen[-1]) + 1
        HR = self.H.R1[chosen] @ R1
        _, slope = pivots_and_slope(R1.mT @ HR)
        weights = self._slopes1[chosen].to(HR) * (inputs / len(chosen))
        return 2 * torch.einsum("i,iab,ibc->ac", weights, HR, slope)

    def R2_slope(self, R2: Float[Tensor, "layers heads b b"]) -> Float[Tensor, "layers heads b b"]:
        """∂/∂R2 of Σ proxy · tr(D) of what o reads: diagonal blocks, summed over query heads."""
        slopes = []
        for H, R, weight in zip(self.H.R2, R2, self._slopes2.tolist(), strict=True):
            heads, b, _ = R.shape
            HR = times(H, R)
            _, slope = pivots_and_slope(times(HR.mT, R))
            rows, columns = HR.unflatten(0, (heads, -1, b)), slope.unflatten(1, (heads, -1, b))
            slopes.append(2 * weight * torch.einsum("kgan,nkgb->kab", rows, columns))
        return torch.stack(slopes)

    def _products(self, rotation: Rotation) -> list[tuple[Matrix, float, float, float]]:
        """(matrix, ‖·‖₄⁴, its proxy, tr(D) of what it reads) of every weight."""
        traces = self._traces(rotation)
        products = []
        for matrix, energy in zip(self.matrices, self.H.energies, strict=True):
            which, place = self._place(matrix)
            fourth, (m, n) = fourth_powers(matrix, rotation), matrix.values.shape
            proxy = fourth if self.form == "product" else (m / n * fourth) ** 0.5
            if self.form == "relative" and energy > 0:
                proxy /= energy
            products.append((matrix, fourth, proxy, traces[which][place].item()))
        return products

    def _traces(self, rotation: Rotation) -> dict[str, Tensor]:
        R1, R2 = rotation.R1.float(), rotation.R2.float()
        turned = (R1.mT @ H @ R1 for H in self.H.R1.split(INPUTS))
        by_head = (times(times(H, R).mT, R) for H, R in zip(self.H.R2, R2, strict=True))
        return {
            "R1": torch.cat([pivots(H).sum(-1) for H in turned]),
            "R2": torch.stack([pivots(H).sum() for H in by_head]),
            "down": self.H.down,
        }

    def _place(self, matrix: Matrix) -> tuple[str, int]:
        """Which covariance a weight reads."""
        if matrix.site.reads == "R1":
            return "R1", 2 * matrix.layer + (matrix.site.norm == "mlp_norm")
        return ("R2", matrix.layer) if matrix.site.reads == "R2" else ("down", matrix.layer)
