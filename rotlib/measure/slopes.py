"""How much of a slope is signal: do windows of text agree on where R1 should go?

Learning through the fake-quantized network follows the straight-through slope of the loss on a few
windows of text. Rounded weights err alike on every window; rounded activations err anew with every
token. The correlation of the windows' slopes, along rotations of R1 and at the random Hadamard
start, says how many windows a step needs before it sees more than that noise.
"""

from itertools import combinations
from statistics import fmean

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from rotlib.checks import token_ids
from rotlib.learning.network import Student, check_learnable, check_rounds
from rotlib.learning.start import original, starting_point
from rotlib.models.families import Family
from rotlib.models.sound import check_not_hooked
from rotlib.models.supported import check_no_experts
from rotlib.precision import exact_products
from rotlib.quantization.activations import ActivationQuant, quantized_activations
from rotlib.quantization.grids import WeightQuant


@exact_products()
def slope_agreement(
    model: PreTrainedModel,
    calibration: Int[Tensor, "windows length"],
    quant: WeightQuant | None = None,
    activations: ActivationQuant | None = None,
    seed: int = 0,
    R4: bool = False,
) -> float:
    """Mean correlation between the slopes of every two windows; 1: they agree, 0: they are noise.

    Raises ValueError for fewer than two windows, tokens that the model can't take, a mixture of
    experts, or where nothing is rounded.

    >>> -1 <= slope_agreement(model, tokens, quant=WeightQuant(bits=3)) <= 1
    True
    """
    token_ids("calibration", calibration, 2, model)
    if len(calibration) < 2:
        raise ValueError("the agreement of slopes is between windows: give at least two")
    check_learnable(model)
    family = original(model, needs_R1="the agreement of slopes")
    check_no_experts(family, "the agreement of slopes")
    check_not_hooked(model)
    check_rounds(family, quant, activations or ActivationQuant())
    found = slopes(family, calibration, quant, activations, seed, R4)
    if not all(slope.norm() > 0 for slope in found):
        raise ValueError(
            "a window has no slope, or one that is no number: there's nothing to agree"
        )
    return fmean(
        torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].item()
        for one, other in combinations(found, 2)
    )


def slopes(
    family: Family,
    calibration: Int[Tensor, "windows length"],
    quant: WeightQuant | None,
    activations: ActivationQuant | None,
    seed: int = 0,
    R4: bool = False,
) -> list[Float[Tensor, "d d"]]:
    """R1ᵀG − GᵀR1 of the next-token cross-entropy of each window, at the random Hadamard start."""
    rotation = starting_point(family, seed, R4=R4)
    student = Student(family, quant, rotation.online, checkpointing=False)
    activations = activations or ActivationQuant()
    found = []
    for ids in calibration:
        rotation.R1 = rotation.R1.detach().requires_grad_()
        student.show(rotation)
        with torch.enable_grad(), quantized_activations(student.model, activations):
            logits = student.logits(ids, rotation).float()
            F.cross_entropy(logits, ids[1:].to(logits.device)).backward()
        student.carry_back(rotation)
        S = rotation.R1.detach().mT @ rotation.R1.grad
        found.append(S - S.mT)
    return found
