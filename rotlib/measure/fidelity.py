"""Perplexity and KL divergence: how far a quantized model is from the model it came from.

Perplexity follows the WikiText-2 protocol: disjoint windows, the tail dropped, exp of the mean over
windows of the mean cross-entropy of each window's next tokens. The KL divergence KL(reference ‖
model) is the mean over the same tokens, in nats; it compares whole distributions with the
reference's and is far less noisy than perplexity. Logits exist for a few positions at a time.
"""

from dataclasses import dataclass, field
from math import exp, inf
from statistics import fmean

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from rotlib.checks import token_ids, whole_number
from rotlib.models.marks import is_quantized
from rotlib.models.reference import Reference, check_finite, check_reference
from rotlib.models.sound import check_sound
from rotlib.models.supported import adapt
from rotlib.models.text import windows as cut
from rotlib.models.walk import final_hidden
from rotlib.precision import model_products

CHUNK = 128  # positions whose logits exist at a time


@dataclass
class Evaluation:
    """Per window, in nats per token: cross-entropy, and beside a reference its own and the KL.

    >>> Evaluation(cross_entropy=[0.0, 0.0]).perplexity
    1.0
    """

    cross_entropy: list[float] = field(default_factory=list)
    reference_cross_entropy: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        return _perplexity(self.cross_entropy)

    @property
    def reference_perplexity(self) -> float:
        return _perplexity(self._beside(self.reference_cross_entropy))

    @property
    def kl_divergence(self) -> float:
        return fmean(self._beside(self.kl))

    def _beside(self, values: list[float]) -> list[float]:
        if not values:
            raise ValueError(
                "this was evaluated without a reference: evaluate(model, …, reference)"
            )
        return values


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows length"],
    reference: Reference | None = None,
) -> Evaluation:
    """Cross-entropy window by window, and KL divergence from a reference over the same windows.

    >>> len(evaluate(model, tokens).cross_entropy) == len(tokens)
    True
    """
    family = adapt(model)
    check_sound(model)
    token_ids("windows", windows, 2, model)
    if reference is not None:
        check_reference(reference, model)
        if not torch.equal(reference.windows, windows):
            raise ValueError(
                "the reference was taken over other tokens: build it from the same windows"
            )
    result = Evaluation()
    hidden = final_hidden(family, windows)
    if not is_quantized(model) and not getattr(model, "rotlib_rounding", False):
        check_finite(hidden)  # what rounding has broken is measured as it is
    sides = [(family.lm_head, hidden)]
    if reference is not None:
        sides.append((reference.lm_head, reference.hidden))
    heads = [head for head, _ in sides]
    with family.on_device(*heads), model_products(family.device):
        for number, ids in enumerate(windows):
            labels = ids[1:].to(family.device)
            streams = [hidden[number].to(family.device).split(CHUNK) for _, hidden in sides]
            sums = torch.zeros(3, dtype=torch.float64)
            for next_ids, *read in zip(labels.split(CHUNK), *streams, strict=True):
                both = zip(heads, read, strict=True)
                logprobs, *truth = (head(x).float().log_softmax(-1) for head, x in both)
                sums[0] += F.nll_loss(logprobs, next_ids, reduction="sum").item()
                for target in truth:
                    sums[1] += F.nll_loss(target, next_ids, reduction="sum").item()
                    sums[2] += F.kl_div(logprobs, target, reduction="sum", log_target=True).item()
            means = (sums / len(labels)).tolist()
            result.cross_entropy.append(means[0])
            if reference is not None:
                result.reference_cross_entropy.append(means[1])
                result.kl.append(means[2])
    return result


def perplexity(model: PreTrainedModel, tokens: Int[Tensor, " n"], window: int = 1024) -> float:
    """Perplexity over the disjoint windows of a token stream.

    Raises ValueError where it holds no whole window.

    >>> perplexity(model, tokens.flatten(), window=32) > 1
    True
    """
    return evaluate(model, _all_windows(tokens, window)).perplexity


def kl_divergence(
    reference: PreTrainedModel,
    model: PreTrainedModel,
    tokens: Int[Tensor, " n"],
    window: int = 1024,
) -> float:
    """KL(reference ‖ model) in nats per token over the disjoint windows of a token stream.

    Raises like `perplexity`, and where the reference is the quantized model itself.

    >>> kl_divergence(model, model, tokens.flatten(), window=32) < 1e-6
    True
    """
    ids = _all_windows(tokens, window)
    layers, of_reference = (adapt(one).layers for one in (model, reference))
    held = {parameter.data_ptr() for parameter in layers.parameters()}
    shared = any(parameter.data_ptr() in held for parameter in of_reference.parameters())
    if is_quantized(model) and shared:
        raise ValueError(
            "the reference is the quantized model itself, or shares its layers: load the original "
            "again, or take a copy.deepcopy of it before it is quantized"
        )
    return evaluate(model, ids, Reference(reference, ids)).kl_divergence


def _perplexity(cross_entropy: list[float]) -> float:
    """Infinite where it is beyond what a float holds: the model is broken, and the run isn't."""
    try:
        return exp(fmean(cross_entropy))
    except OverflowError:
        return inf


def _all_windows(tokens: Tensor, window: int) -> Int[Tensor, "windows length"]:
    token_ids("tokens", tokens, 1)
    return cut(tokens, window, max(1, len(tokens) // whole_number("window", window, 2)))
