"""What the original model computes, kept while the model itself is rotated and quantized."""

import warnings
from copy import deepcopy

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from rotlib.checks import all_finite, token_ids
from rotlib.models.marks import is_quantized
from rotlib.models.sound import check_can_be_copied, check_not_rounding, check_sound
from rotlib.models.supported import adapt
from rotlib.models.walk import NOT_FINITE, final_hidden


class Reference:
    """A model's hidden states over some windows, from which its logits are one product away.

    Comparing many quantized models with one original then runs the original once; raises like
    `adapt`.

    >>> import rotlib as rl
    >>> rl.evaluate(model, tokens, Reference(model, tokens)).kl_divergence < 1e-6
    True
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, windows: Int[Tensor, "windows length"]):
        family = adapt(model)
        check_not_rounding(model)
        check_sound(model)
        check_can_be_copied(family.lm_head, "lm_head")
        token_ids("windows", windows, 2, model)
        if is_quantized(model):
            warnings.warn(
                "this reference is of a quantized model: how far one is from the original shows "
                "beside the original's",
                stacklevel=2,
            )
        self.windows = windows.clone()
        self.lm_head = deepcopy(family.lm_head)  # the model may be rotated in place later on
        self.hidden = final_hidden(family, windows)
        check_finite(self.hidden)


def check_reference(reference: object, model: PreTrainedModel) -> None:
    """Raises ValueError for what is no reference, or one of another vocabulary than the model's."""
    if not isinstance(reference, Reference):
        raise ValueError(
            "the reference must be a rl.Reference(model, windows), "
            f"not a {type(reference).__name__}"
        )
    if reference.lm_head.out_features != model.config.vocab_size:
        raise ValueError(
            f"the reference has {reference.lm_head.out_features} tokens and the model "
            f"{model.config.vocab_size}: compare models of one vocabulary"
        )


def check_finite(hidden: list[Tensor]) -> None:
    """Raises ValueError for states that a sound model doesn't have."""
    if not all(map(all_finite, hidden)):
        raise ValueError(NOT_FINITE)
