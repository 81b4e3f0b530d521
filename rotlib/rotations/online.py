"""The rotations that can't be fused: R3 on queries and keys after RoPE, R4 on what down_proj reads.

RoPE stands between q_proj, k_proj and their product, and a gate between up_proj and down_proj, so
these two are applied while the model runs, as exact Hadamard products through their factors
(QuaRot, arXiv 2404.00456, §4). R4 is a hook on down_proj, whose weight holds the inverse. R3
cancels between queries and keys, ``(q H)(k H)ᵀ = q kᵀ``; it lives in an attention function
registered with transformers under the name "rotlib", which hands over to "sdpa". Keys are cached as
they came from RoPE and pass R3, and their quantizer, at every reading: the same numbers as a cache
of rounded keys. On a GPU models of float32 run through it as well, R3 or not: where query heads
share keys, sdpa has no kernel for them but the one that writes out all scores.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rotlib.models.families import Family, kind_of
from rotlib.models.marks import is_rotated, online_of
from rotlib.models.supported import adapt
from rotlib.models.zoo import open_model
from rotlib.rotations.hadamard import apply_hadamard, hadamard_factors

ATTENTION = "rotlib"
# the attribute of an attention module that holds what its heads pass, in order
_HEADS = "rotlib_heads"

# what happens to (query, key, value), each (batch, heads, tokens, head_dim)
HeadStep = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def load(
    name: str, device: str = "auto", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model, in evaluation mode without gradients, and its tokenizer.

    `name` is a packaged alias, a folder with a config.json, a GGUF file (here, or
    `repository/file.gguf` on the Hub) or a Hugging Face id; `device` "auto" takes CUDA where there
    is one. A model that doesn't fit on the device stays on the host, and is
    sent there a layer at a time. One that was saved with R3 or R4 on gets them back. Raises
    ValueError for a name that leads nowhere, ImportError where a packaged model isn't installed.

    >>> model, tokenizer = load("smollm2-135m")
    >>> model.config.hidden_size
    576
    """
    model, tokenizer = open_model(name, device, dtype)
    write_no_scores(model)
    online, told = online_of(model), getattr(model.config, "rotation", None)
    at_runtime = told.get("at_runtime") if isinstance(told, dict) else None
    if isinstance(at_runtime, dict) and {*online} != at_runtime.keys():
        raise ValueError(
            f"the config.json of {name!r} contradicts itself: its rotlib_online is "
            f"{', '.join(online) or 'empty'}, and its rotation has at_runtime "
            f"{', '.join(at_runtime) or 'empty'}; export or save the model again"
        )
    if online:
        if not is_rotated(model):
            raise ValueError(
                f"{name!r} asks for the online rotations {', '.join(online)}, but no rotation was "
                "fused into it: its config.json is of another model"
            )
        # `adapt` refuses a model whose config asks for more than it does
        model.rotlib_online = online
        attach(adapt(model), online)
    return model, tokenizer


def write_no_scores(model: PreTrainedModel) -> None:
    """Let a model that computes on a GPU run its attention without holding all scores."""
    if getattr(model, "rotlib_device", model.device).type == "cuda":
        model.set_attn_implementation(ATTENTION)


def check_online(family: Family, rotations: list[str]) -> None:
    """Raises ValueError where the model can't carry these online rotations.

    Its widths need a Hadamard matrix, its attention must be sdpa, and R3 needs RoPE.
    """
    if "R4" in rotations:
        width = family.inner_width
        _check_order(width, f"R4 turns the {width} inputs of down_proj")
    if "R3" in rotations:
        if not hasattr(family.decoder, "rotary_emb"):
            raise ValueError(
                "R3 turns queries and keys behind rotary embeddings, and this model has none: "
                "leave R3 out, its job can be fused"
            )
        _check_order(family.head_dim, f"R3 turns the {family.head_dim} coordinates of a head")
        check_attention(family.model)


def attach(family: Family, rotations: list[str]) -> None:
    """Apply these online rotations whenever the model runs; R4 needs a down weight that undoes it.

    Raises like `check_online`.
    """
    if not rotations:
        return
    check_online(family, rotations)
    family.model.rotlib_online = family.config.rotlib_online = rotations
    for layer in range(len(family.layers)):
        if "R4" in rotations:
            for name, linear in family.linears(layer).items():
                if kind_of(name) == "down":
                    linear.R4_hook = linear.register_forward_pre_hook(_apply_R4).id
        if "R3" in rotations:
            insert_head_step(family, layer, _apply_R3)
    family.model.rotlib_attached = True


def insert_head_step(family: Family, layer: int, step: HeadStep) -> None:
    """Let the heads of one layer pass `step`, behind those that are there, before attention."""
    attention = family.attention(layer)
    if not hasattr(attention, _HEADS):
        setattr(attention, _HEADS, [])
        attention.register_forward_pre_hook(_check_not_bypassed)
    if family.config._attn_implementation != ATTENTION:
        family.model.set_attn_implementation(ATTENTION)
    getattr(attention, _HEADS).append(step)


@contextmanager
def head_steps(family: Family, step: HeadStep) -> Iterator[None]:
    """Let the heads of every layer pass `step` while open."""
    check_attention(family.model)
    before = family.config._attn_implementation
    for layer in range(len(family.layers)):
        insert_head_step(family, layer, step)
    try:
        yield
    finally:
        for layer in range(len(family.layers)):
            getattr(family.attention(layer), _HEADS).remove(step)
        family.model.set_attn_implementation(before)


def check_attention(model: PreTrainedModel) -> None:
    """Raises ValueError unless the attention goes where ours can stand in for it."""
    found = model.config._attn_implementation
    if found not in ("sdpa", ATTENTION):
        raise ValueError(
            f"keys can't be rotated or quantized inside the attention implementation {found!r}: "
            "load the model with attn_implementation='sdpa'"
        )


def _check_order(n: int, where: str) -> None:
    try:
        hadamard_factors(n)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _apply_R4(module: nn.Module, args: tuple) -> tuple:
    return (apply_hadamard(args[0]), *args[1:])


def _apply_R3(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return apply_hadamard(query), apply_hadamard(key), value


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs,
):
    if not hasattr(module, _HEADS):
        online = getattr(module.config, "rotlib_online", None) or ()
        if "R3" in online:
            raise RuntimeError(
                "this model was saved with the online rotation R3 on: "
                "load it with rl.load, which restores it"
            )
    for step in getattr(module, _HEADS, ()):
        query, key, value = step(query, key, value)
    if query.is_cuda and query.dtype == torch.float32:
        module, key, value = _keys_of_their_own(module, query, key, value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _keys_of_their_own(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor
) -> tuple[SimpleNamespace, Tensor, Tensor]:
    """Keys and values of every query head, and what sdpa asks of a module that has no groups."""
    heads = query.shape[1] // key.shape[1]
    key, value = (shared.repeat_interleave(heads, dim=1) for shared in (key, value))
    return SimpleNamespace(is_causal=getattr(module, "is_causal", True)), key, value


def _check_not_bypassed(module: nn.Module, args: tuple) -> None:
    """Raises RuntimeError where a later `set_attn_implementation` has replaced ours.

    It would leave the keys un-rotated and un-quantized in silence.
    """
    found = module.config._attn_implementation
    if getattr(module, _HEADS) and found != ATTENTION:
        raise RuntimeError(
            "this model's keys are rotated or quantized in the attention implementation "
            f"{ATTENTION!r}, but {found!r} was set since: "
            f"call model.set_attn_implementation({ATTENTION!r})"
        )


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
