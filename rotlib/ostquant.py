"""OSTQuant: learn rotations and diagonal scales through the fake-quantized network (Hu et al., arXiv 2501.13987).

R1 starts at the eigenvectors of what q, k, v, gate and up read, times a random Hadamard matrix; R2 is one rotation a KV head; five
families of scales (`rotation.scale_shapes`) start at one. Riemannian Adam (geoopt's) descends KL-Top: Σ p log(p/q) over the
1000 tokens that the unquantized model holds likeliest. Two forms of it are in circulation: the probabilities are "gathered" after
a softmax over the whole vocabulary, or "renormalised" over those tokens.
"""

import torch
from geoopt import EuclideanStiefel, ManifoldParameter
from geoopt.optim import RiemannianAdam
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from rotlib.activations import ActivationQuant
from rotlib.checks import one_of
from rotlib.covariance import hessians
from rotlib.families import adapt
from rotlib.measure import Reference
from rotlib.network import Preset, Student, learn_through, prepare
from rotlib.optrot import coarse_products
from rotlib.quant import WeightQuant
from rotlib.rotation import Rotation, scale_shapes

TOP = 1000
KL_TOP_FORMS = ("gathered", "renormalised")
_SCALE_LR = 0.01  # of the scales' logarithms; Adam's own step, while a rotation's is a length in its Frobenius norm
# "paper": the authors' steps and batches, for 1000 windows of 2048 tokens; "laptop": what 2 CPU cores do in minutes. The rate is ours,
# since geoopt's is a length
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
    kl_top: str = "gathered",
    R3: bool = False,
    R4: bool = False,
    start: Rotation | None = None,
    local: bool = False,
) -> Rotation:
    """Learn R1, R2 and all scales on calibration windows with the weights on `quant`'s grid, or the activations on theirs, or both.

    `preset` is a key of `OSTQUANT_PRESETS`; `steps` and `lr` override its own; `kl_top` is one of `KL_TOP_FORMS`; the KLT comes before
    `start`, block by block where R1 stays `local`. Otherwise like
    `spinquant`.
    """
    one_of("preset", preset, OSTQUANT_PRESETS)
    one_of("kl_top", kl_top, KL_TOP_FORMS)
    settings = OSTQUANT_PRESETS[preset]
    settings = settings._replace(steps=settings.steps if steps is None else steps, lr=settings.lr if lr is None else lr)
    activations = activations or ActivationQuant()
    rotation = prepare(model, calibration, quant, activations, settings, seed, R3, R4, start, local)
    with coarse_products():
        block = rotation.R1.shape[-1]
        KLT, teacher = eigenvectors(model, calibration, block), Reference(model, calibration)
    rotation.R1 = (KLT @ rotation.R1.double()).float()
    rotation.scales = {name: torch.ones(shape, device=rotation.R1.device) for name, shape in scale_shapes(adapt(model)).items()}
    student = Student(model, quant, rotation.online, settings.checkpointing)

    def loss(logits: Tensor, number: int) -> Tensor:
        with torch.no_grad():
            truth = teacher.lm_head(teacher.hidden[number].to(logits.device))
        return kl_top_loss(logits, truth, kl_top)

    return learn_through(student, _RiemannianAdam(rotation, settings.lr), calibration, activations, loss, settings, seed)


def kl_top_loss(
    logits: Float[Tensor, "n vocabulary"], truth: Float[Tensor, "n vocabulary"], form: str, top: int = TOP
) -> Float[Tensor, ""]:
    """Σ p log(p/q) over the teacher's `top` likeliest tokens, in nats, the mean over positions."""
    logits, truth = logits.float(), truth.float()
    likeliest = truth.topk(min(top, truth.shape[-1]), dim=-1).indices
    if form == "gathered":
        logp, logq = (values.log_softmax(-1).gather(-1, likeliest) for values in (truth, logits))
    else:
        logp, logq = (values.gather(-1, likeliest).log_softmax(-1) for values in (truth, logits))
    return (logp.exp() * (logp - logq)).sum(-1).mean()


def eigenvectors(model: PreTrainedModel, calibration: Int[Tensor, "windows length"], block: int) -> Float64[Tensor, "*blocks b b"]:
    """Of the mean covariance of what q, k, v and gate, up read, each input at unit variance: the KLT of R1's start, block by block.

    A single block, as wide as the model, is a matrix.
    """
    total = sum(H[site] / H[site].diagonal().mean() for H in hessians(model, calibration) for site in ("q", "gate"))
    blocks = [total[i : i + block, i : i + block].double() for i in range(0, len(total), block)]
    return torch.linalg.eigh(blocks[0] if len(blocks) == 1 else torch.stack(blocks)).eigenvectors


class _RiemannianAdam:
    """geoopt's on R1 and every R2, Adam on the scales' logarithms, which keeps scales positive."""

    def __init__(self, rotation: Rotation, lr: float):
        self._R1, self._R2 = (ManifoldParameter(R, manifold=EuclideanStiefel()) for R in (rotation.R1, rotation.R2))
        self._logs = {name: nn.Parameter(scale.log()) for name, scale in rotation.scales.items()}
        groups = [{"params": [self._R1, self._R2], "lr": lr}, {"params": list(self._logs.values()), "lr": _SCALE_LR}]
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
