"""SpinQuant: learn R1 and R2 through the fake-quantized network (Liu et al., arXiv 2405.16406).

From a random Hadamard start, Cayley SGD (lr 1.5, cosine) descends the next-token cross-entropy of
the network whose weights or activations are rounded, straight through. What is rounded while
learning: the activations, with 16-bit weights, where GPTQ will take care of the weights (the
authors' advice); for weights alone there would be no signal, so the weights, to nearest.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from rotlib.learning.descent import cayley_sgd_step
from rotlib.learning.network import Preset, Student, chosen, learn_through, prepare
from rotlib.quantization.activations import ActivationQuant
from rotlib.quantization.grids import WeightQuant
from rotlib.rotations.rotation import Rotation

# the authors' own is for 800 windows of 2048 tokens
SPINQUANT_PRESETS = {"paper": Preset(100, 8, 1.5, True), "laptop": Preset(32, 2, 1.5, False)}


def spinquant(
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
    """Learn R1 and R2 through the network, rounded as `quant` and `activations` say.

    Either may be left out. `preset` is a key of `SPINQUANT_PRESETS`; `steps` and `lr` override its
    own; `start` and `local` are `optrot`'s. The model stays as it is, and a copy of its layers and
    their gradients is held meanwhile. `history` holds the loss of every step, in nats. Raises
    ValueError for what can't be learned so, LearningFailed where the loss stops being finite.

    >>> rotation = spinquant(model, tokens, quant=WeightQuant(bits=3), steps=2)
    >>> len(rotation.history)
    2
    """
    settings = chosen(SPINQUANT_PRESETS, preset, steps, lr)
    activations = activations or ActivationQuant()
    family, rotation = prepare(
        model, calibration, quant, activations, settings, seed, R3, R4, start, local
    )
    student = Student(family, quant, rotation.online, settings.checkpointing)
    optimizer = CayleySGD(rotation, settings.lr)

    def cross_entropy(logits: Tensor, numbers: list[int]) -> Tensor:
        following = calibration[numbers][:, 1:].to(logits.device)
        return F.cross_entropy(logits.float().flatten(0, 1), following.flatten())

    return learn_through(
        student, optimizer, calibration, activations, cross_entropy, settings, seed
    )


class CayleySGD:
    """The authors' optimiser, on R1 and on every R2."""

    def __init__(self, rotation: Rotation, lr: float):
        self.rotation, self._lr = rotation, lr
        rotation.R1.requires_grad_()
        rotation.R2.requires_grad_()

    @torch.no_grad()
    def step(self, anneal: float) -> None:
        both = (self.rotation.R1, self.rotation.R2)
        R1, R2 = (cayley_sgd_step(R, R.grad, self._lr * anneal).requires_grad_() for R in both)
        self.rotation = Rotation(R1, R2, self.rotation.R3, self.rotation.R4)
