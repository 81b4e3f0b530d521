"""Perplexity, KL divergence and incoherence: how far a quantized model is from the model it came from.

Perplexity follows the WikiText-2 protocol: disjoint windows, the tail dropped, exp of the mean over windows of the mean
cross-entropy of each window's next tokens. The KL divergence KL(reference ‖ model) is the mean over the same tokens, in
nats; it compares whole distributions with the reference's and is far less noisy than perplexity. Logits exist for a
few positions at a time.
"""

from copy import deepcopy
from dataclasses import dataclass, field
from math import exp
from statistics import fmean

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from rotlib.checks import token_ids, whole_number
from rotlib.covariance import layer_inputs, walk_layer
from rotlib.families import Family, adapt
from rotlib.text import windows as cut

CHUNK = 128  # positions whose logits exist at a time


@dataclass
class Evaluation:
    """Per window, in nats per token: cross-entropy and, where there was a reference, its own and KL(reference ‖ model)."""

    cross_entropy: list[float] = field(default_factory=list)
    reference_cross_entropy: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        return exp(fmean(self.cross_entropy))

    @property
    def reference_perplexity(self) -> float:
        return exp(fmean(self.reference_cross_entropy))

    @property
    def kl_divergence(self) -> float:
        return fmean(self.kl)


class Reference:
    """A model's hidden states over some windows, from which its logits are one product away.

    Comparing many quantized models with one original then runs the original once; raises like `adapt`.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, windows: Int[Tensor, "windows length"]):
        family = adapt(model)
        token_ids("windows", windows, 2, model)
        self.windows = windows
        self.lm_head = deepcopy(family.lm_head)  # the model may be rotated or quantized in place later on
        self.hidden = _hidden(family, windows)


@torch.no_grad()
def evaluate(model: PreTrainedModel, windows: Int[Tensor, "windows length"], reference: Reference | None = None) -> Evaluation:
    """Cross-entropy and, where a reference over the same windows is given, KL divergence, window by window."""
    family = adapt(model)
    token_ids("windows", windows, 2, model)
    if reference is not None and not isinstance(reference, Reference):
        raise ValueError(f"the reference must be a rl.Reference(model, windows), not a {type(reference).__name__}")
    if reference is not None and not torch.equal(reference.windows, windows):
        raise ValueError("the reference was taken over other tokens: build it from the same windows")
    result = Evaluation()
    hidden = _hidden(family, windows)
    heads = [family.lm_head] if reference is None else [family.lm_head, reference.lm_head]
    with family.on_device(*heads):
        for number, ids in enumerate(windows):
            streams = [x[number].to(family.device).split(CHUNK) for x in (hidden, *([reference.hidden] if reference else []))]
            sums = torch.zeros(3, dtype=torch.float64)
            for labels, *read in zip(ids[1:].to(family.device).split(CHUNK), *streams, strict=True):
                logprobs, *truth = (head(x).float().log_softmax(-1) for head, x in zip(heads, read, strict=True))
                sums[0] += F.nll_loss(logprobs, labels, reduction="sum").item()
                for target in truth:
                    sums[1] += F.nll_loss(target, labels, reduction="sum").item()
                    sums[2] += F.kl_div(logprobs, target, reduction="sum", log_target=True).item()
            means = (sums / (len(ids) - 1)).tolist()
            result.cross_entropy.append(means[0])
            if reference is not None:
                result.reference_cross_entropy.append(means[1])
                result.kl.append(means[2])
    return result


def _hidden(family: Family, windows: Int[Tensor, "windows length"]) -> list[Float[Tensor, "length-1 d"]]:
    """What lm_head reads at every position of every window that has a next token; a layer at a time, kept on the host."""
    batches = layer_inputs(family, windows, at_a_time=1)
    for layer in range(len(family.layers)):
        batches = walk_layer(family, layer, batches)
    with family.on_device(family.final_norm):
        return [family.final_norm(x.to(family.device))[0, :-1].cpu() for x, _ in batches]


def perplexity(model: PreTrainedModel, tokens: Int[Tensor, " n"], window: int = 1024) -> float:
    """Perplexity over the disjoint windows of a token stream; raises ValueError where it holds no whole window."""
    return evaluate(model, _all_windows(tokens, window)).perplexity


def kl_divergence(reference: PreTrainedModel, model: PreTrainedModel, tokens: Int[Tensor, " n"], window: int = 1024) -> float:
    """KL(reference ‖ model) in nats per token over the disjoint windows of a token stream; raises like `perplexity`."""
    ids = _all_windows(tokens, window)
    return evaluate(model, ids, Reference(reference, ids)).kl_divergence


def incoherence(W: Float[Tensor, "out in"]) -> float:
    """The smallest μ with max|W_ij| ≤ μ ‖W‖_F / √(mn) (QuIP, arXiv 2307.13304, Definition 1)."""
    W = W.double()
    return (W.abs().max() / W.square().mean().sqrt()).item()


def kurtosis(W: Float[Tensor, "out in"]) -> float:
    """E w⁴ / (E w²)² of each row, averaged over the rows: what a grid with one scale an output channel sees.

    3 for a Gaussian, 1 where all magnitudes in a row are equal, and for a row with a single entry its length.
    """
    W = W.double()
    return (W.pow(4).mean(dim=1) / W.square().mean(dim=1).square().clamp_min(1e-300)).mean().item()


def _all_windows(tokens: Tensor, window: int) -> Tensor:
    token_ids("tokens", tokens, 1)
    return cut(tokens, window, max(1, len(tokens) // whole_number("window", window, 2)))
