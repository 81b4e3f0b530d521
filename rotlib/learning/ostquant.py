"""OSTQuant: learn rotations and diagonal scales through the network (Hu et al., arXiv 2501.13987).

R1 starts at the eigenvectors of what q, k, v, gate and up read, times a random Hadamard matrix; R2
is one rotation a KV head; five families of scales (`rotation.scale_shapes`) start at one.
Riemannian Adam (geoopt's) descends KL-Top: Σ p log(p/q) over the 1000 tokens that the unquantized
model holds likeliest, their probabilities gathered after a softmax over the whole vocabulary. (A
second form in circulation renormalises them; no run of ours showed a use for it.)
"""

import torch
from geoopt import EuclideanStiefel, ManifoldParameter
from geoopt.optim import RiemannianAdam
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from rotlib.checks import token_ids
from rotlib.learning.network import Preset, Student, chosen, learn_through, prepare
from rotlib.learning.start import finished, original, starting_point
from rotlib.models.families import Family
from rotlib.models.sound import check_not_hooked
from rotlib.models.walk import final_hidden
from rotlib.precision import coarse_products
from rotlib.quantization.activations import ActivationQuant
from rotlib.quantization.grids import WeightQuant
from rotlib.quantization.hessian import hessians
from rotlib.rotations.rotation import Rotation, scale_shapes

TOP = 1000
# of the scales' logarithms; Adam's own step, while a rotation's is a length in its Frobenius norm
SCALE_LR = 0.01
# the authors' steps and batches are for 1000 windows of 2048 tokens; the rate is ours, since
# geoopt's is a length
OSTQUANT_PRESETS = {"paper": Preset(150, 8, 0.5, True), "laptop": Preset(32, 2, 0.5, False)}


def ostquant(
    model: PreTrainedModel,
    calibration: Int[Tensor, "windows length"],
    quant: WeightQuant | None = None,
    activations: ActivationQuant | None = None,
    seed: int = 0,
    preset: str = "laptop",
    steps: int | None = None,
    lr: float | None = None,
    R3: bool = False,
    R4: bool = False,
    start: Rotation | None = None,
    local: bool = False,
) -> Rotation:
    """Learn R1, R2 and all scales through the network, rounded as `quant` and `activations` say.

    Either may be left out. `preset` is a key of `OSTQUANT_PRESETS`; the eigenvectors come before
    `start`, block by block where R1 stays `local`. Otherwise like `spinquant`.

    >>> rotation = ostquant(model, tokens, quant=WeightQuant(bits=3), steps=2)
    >>> sorted(rotation.scales)
    ['attention_norm', 'mlp_norm', 'query_key', 'up', 'value']
    """
    settings = chosen(OSTQUANT_PRESETS, preset, steps, lr)
    activations = activations or ActivationQuant()
    family, rotation = prepare(
        model, calibration, quant, activations, settings, seed, R3, R4, start, local
    )
    with coarse_products():
        KLT = eigenvectors(family, calibration, block=rotation.R1.shape[-1])
        hidden = final_hidden(family, calibration)
    rotation.R1 = (KLT @ rotation.R1.double()).float()
    rotation.scales = {
        name: torch.ones(shape, device=rotation.R1.device)
        for name, shape in scale_shapes(family).items()
    }
    student = Student(family, quant, rotation.online, settings.checkpointing)
    optimizer = RotationAdam(rotation, settings.lr)

    def loss(logits: Tensor, numbers: list[int]) -> Tensor:
        with torch.no_grad():
            read = torch.stack([hidden[number] for number in numbers])
            truth = family.lm_head(read.to(logits.device))
        return kl_top_loss(logits, truth)

    return learn_through(student, optimizer, calibration, activations, loss, settings, seed)


@torch.no_grad()
def klt_rotation(
    model: PreTrainedModel,
    calibration: Int[Tensor, "windows length"],
    seed: int = 0,
    R3: bool = False,
    R4: bool = False,
) -> Rotation:
    """Where `ostquant` starts, with nothing learned: the KLT times a random Hadamard matrix.

    R2 is a random Hadamard matrix a KV head. Raises ValueError like `ostquant`.

    >>> rotation = klt_rotation(model, tokens)
    >>> rotation.orthogonality_error() < 1e-6
    True
    """
    token_ids("calibration", calibration, 2, model)
    family = original(model, needs_R1="the KLT")
    check_not_hooked(model)
    rotation = starting_point(family, seed, R3, R4)
    with coarse_products():
        KLT = eigenvectors(family, calibration, block=family.width)
    rotation.R1 = KLT @ rotation.R1.double()
    return finished(rotation).to("cpu", torch.float64)


def kl_top_loss(
    logits: Float[Tensor, "*n vocabulary"], truth: Float[Tensor, "*n vocabulary"], top: int = TOP
) -> Float[Tensor, ""]:
    """Σ p log(p/q) over the teacher's `top` likeliest tokens, in nats, the mean over positions."""
    logits, truth = logits.float(), truth.float()
    likeliest = truth.topk(min(top, truth.shape[-1]), dim=-1).indices
    logp, logq = (values.log_softmax(-1).gather(-1, likeliest) for values in (truth, logits))
    return (logp.exp() * (logp - logq)).sum(-1).mean()


def eigenvectors(
    family: Family, calibration: Int[Tensor, "windows length"], block: int
) -> Float64[Tensor, "*blocks b b"]:
    """The KLT of R1's start: eigenvectors of the mean covariance of what q, k, v, gate, up read.

    Each input counts at unit variance. They are taken block by block; a single block, as wide as
    the model, is a matrix.
    """
    total = 0
    for H in hessians(family, calibration):
        for site in ("q", "gate"):
            size = H[site].diagonal().mean()
            if not size > 0:
                raise ValueError(
                    f"what {site} reads is all zero on these tokens: give other calibration text"
                )
            total = total + H[site] / size
    blocks = [total[i : i + block, i : i + block].double() for i in range(0, len(total), block)]
    return torch.linalg.eigh(blocks[0] if len(blocks) == 1 else torch.stack(blocks)).eigenvectors


class RotationAdam:
    """geoopt's on R1 and every R2, Adam on the scales' logarithms, which keeps scales positive."""

    def __init__(self, rotation: Rotation, lr: float):
        both, manifold = (rotation.R1, rotation.R2), EuclideanStiefel()
        self._R1, self._R2 = (ManifoldParameter(R, manifold=manifold) for R in both)
        self._logs = {name: nn.Parameter(scale.log()) for name, scale in rotation.scales.items()}
        groups = [
            {"params": [self._R1, self._R2], "lr": lr},
            {"params": list(self._logs.values()), "lr": SCALE_LR},
        ]
        self._adam = RiemannianAdam(groups, stabilize=None)
        self._rates = [group["lr"] for group in self._adam.param_groups]
        self._online = rotation.R3, rotation.R4
        self._read()

    def step(self, anneal: float) -> None:
        for name, log in self._logs.items():
            scale = self.rotation.scales[name]
            log.grad = None if scale.grad is None else scale.grad * scale.detach()
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * anneal
        self._adam.step()
        self._adam.zero_grad()
        self._read()

    def _read(self) -> None:
        scales = {name: log.detach().exp().requires_grad_() for name, log in self._logs.items()}
        self.rotation = Rotation(self._R1, self._R2, *self._online, scales=scales)
