"""Is a model one that can be rotated? The public door: what lies inside takes the checked Family.

A model is refused by the name of the module that stands in a rotation's way, and where it computes
something else than its weights and its config say.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import Module
from transformers import PreTrainedModel

from rotlib.models.families import FAMILIES, Family, kind_of
from rotlib.models.joined import OPENED
from rotlib.models.marks import is_quantized, is_rotated, online_of


def adapt(model: PreTrainedModel) -> Family:
    """The family of a model.

    Raises ValueError with one sentence for an architecture that rotlib doesn't know, naming the
    first module that stands in the way.
    """
    if not isinstance(model, PreTrainedModel):
        inside = [name for name in ("_orig_mod", "module") if hasattr(model, name)]
        how = "rl.load returns (model, tokenizer)"
        if inside:
            how = f"give what it wraps, its .{inside[0]}"
        raise ValueError(
            f"a transformers model is needed, not something of type {type(model).__name__}: {how}"
        )
    model_type = model.config.model_type
    if getattr(model, "hf_quantizer", None) is not None:
        how = type(model.hf_quantizer).__name__
        raise ValueError(f"this model's weights are packed ({how}): load the original")
    if getattr(model.config, "final_logit_softcapping", None) is not None:  # as of Gemma-2
        reason = "puts out logits that are capped behind it, which nothing here measures"
        raise ValueError(_refusal(model, "lm_head", reason))
    for family in FAMILIES:
        if model_type in family.model_types:
            if not hasattr(model, "lm_head"):
                raise ValueError(
                    f"this {type(model).__name__} has no head that foretells tokens: load it with "
                    "rl.load, or as an AutoModelForCausalLM"
                )
            if stranger := _stranger(model, family):
                reason = f"has no place in the {model_type} layout"
                if stranger.endswith(OPENED):
                    reason = "isn't opened into its parts: load the model with rl.load"
                raise ValueError(_refusal(model, stranger, reason))
            _check_one_meaning(model)
            _check_code(model)
            _check_shapes(found := family(model))
            _check_still_folded(found)
            _check_still_online(found)
            return found
    if stranger := _stranger(model, Family):
        raise ValueError(_refusal(model, stranger, "has no place in the layouts it knows"))
    if not len(model.model.layers):
        raise ValueError(_refusal(model, "model.layers", "holds no layer"))
    norm = type(model.model.layers[0].get_submodule(Family.norm_paths["attention_norm"])).__name__
    reason = f"is a {norm}, whose gain it doesn't know how to fold"
    raise ValueError(_refusal(model, "model.layers.0.input_layernorm", reason))


def _check_code(model: PreTrainedModel) -> None:
    """Raises ValueError for a module whose class computes something that nobody here has read."""
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            raise ValueError(
                f"{name or 'the model'} is moved about by accelerate: load the model without "
                "device_map (rl.load sends its layers to a device that is too small for all)"
            )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{name or 'the model'} was compiled in place (module.compile()), and compiled "
                "code passes by hooks that come later: load the model without"
            )
        forward = type(module).forward
        # where its code was written: functools.wraps copies the module's name
        written = getattr(forward, "__globals__", {}).get("__name__", forward.__module__)
        if not str(written).startswith(("transformers.", "torch.", "rotlib.")):
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__} with a forward of its own, "
                f"{forward.__qualname__}, that isn't transformers': load the original model"
            )


def _check_still_folded(family: Family) -> None:
    """Raises ValueError for a rotated model that original weights have been loaded into."""
    gain = family.final_norm.weight
    rotated = is_rotated(family.model) and not is_quantized(family.model) and family.has_R1
    if rotated and not gain.is_meta and not (gain == 1).all():
        raise ValueError(
            "this model is marked as rotated, and its final norm isn't folded: other weights were "
            "loaded into it (load the model anew), or it was trained since (take rotlib_rotated "
            "out of its config, and it is a model like any other)"
        )


def _check_one_meaning(model: PreTrainedModel) -> None:
    """Raises ValueError for a model that computes something else than its weights say.

    Parts of it are shared, or of a class with a state of its own, or its config asks for online
    rotations that aren't at work, or it was copied while its activations were being rounded, or
    changing it was interrupted.
    """
    if getattr(model.config, "rotlib_unfinished", False):
        raise ValueError(
            "rotating or quantizing this model was interrupted, so it is neither the original nor "
            "done: load the original again"
        )
    if getattr(model, "rotlib_rounding", id(model)) != id(model):
        raise ValueError(
            "this model was copied inside quantized_activations, so nothing stops its rounding: "
            "copy it outside"
        )
    for mark in ("rotlib_rotated", "rotlib_quantized", "rotlib_unfinished"):
        if getattr(model.base_model.config, mark, False) != getattr(model.config, mark, False):
            raise ValueError(
                "this model shares its layers with a copy that was rotated or quantized: copy a "
                "model with copy.deepcopy, and load the original again"
            )
    ends = {"model.embed_tokens.weight", "lm_head.weight"}  # these may be one
    for one, other in pairwise(sorted(_places(model))):
        same = one[:3] == other[:3] and {one.name, other.name} == ends
        if one.storage == other.storage and other.begin < one.end and not same:
            what = "are one weight" if one[:3] == other[:3] else "share memory"
            raise ValueError(
                f"{one.name} and {other.name} {what}, which would be rotated twice: "
                "give each a copy of its own"
            )
    for mark in ("rotlib_rotated", "rotlib_quantized"):
        if not isinstance(getattr(model.config, mark, False), bool):
            raise ValueError(f"the config's {mark} must be true or false: it was changed by hand")
    online = online_of(model)
    if online and not hasattr(model, "rotlib_online"):
        raise ValueError(
            f"this model was saved with the online rotations {', '.join(online)} on: "
            "rl.load restores them"
        )


def _check_still_online(family: Family) -> None:
    """Raises ValueError where a down that R4 was attached to has lost it, by being replaced say."""
    if not getattr(family.model, "rotlib_attached", False):  # by `rotations.online.attach`
        return
    for layer in range(len(family.layers)) if "R4" in online_of(family.model) else ():
        for name, linear in family.linears(layer).items():
            kept = getattr(linear, "R4_hook", None) in linear._forward_pre_hooks
            if kind_of(name) == "down" and not kept:
                raise ValueError(
                    f"layers.{layer}.{name} has lost the online rotation R4 that its weight needs: "
                    "load the model again"
                )


class _Place(NamedTuple):
    """Where a parameter's bytes lie."""

    storage: int
    begin: int
    end: int
    name: str


def _places(model: PreTrainedModel) -> Iterator[_Place]:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.layout != torch.strided:
            raise ValueError(f"{name} is sparse: make it dense first (to_dense)")
        # an outline holds no numbers: there the parameter itself tells
        storage = parameter.untyped_storage().data_ptr() or id(parameter)
        begin = parameter.storage_offset() * parameter.itemsize
        yield _Place(storage, begin, begin + parameter.nbytes, name)


def check_has_R1(family: Family, what: str) -> None:
    """Raises ValueError for a model whose residual stream can't be turned."""
    if not family.has_R1:
        raise ValueError(
            f"{what} needs R1, and in {family.config.model_type} model.layers.0."
            f"{family.against_R1} puts a gain between a writer and the residual stream: choose "
            "rl.optrot, rl.hadamard_rotation or rl.random_rotation, which leave R1 out there"
        )


def check_no_experts(family: Family, what: str) -> None:
    """Raises ValueError for a mixture of experts."""
    if family.experts:
        raise ValueError(
            f"{what} doesn't know mixtures of experts such as {family.config.model_type}: "
            "of rotations OptRot, KurTail and what is drawn do"
        )


def _check_shapes(family: Family) -> None:
    """Raises ValueError for a linear that isn't one, or of another shape than the config says."""
    config, width = family.config, family.width
    if not len(family.layers) == config.num_hidden_layers > 0:
        raise ValueError(
            f"this model has {len(family.layers)} decoder layers, and its config says "
            f"{config.num_hidden_layers}: load it again"
        )
    for name in ("num_attention_heads", "num_key_value_heads", "vocab_size"):
        count = getattr(config, name, 1)
        if type(count) is not int or count < 1:
            raise ValueError(f"the config's {name} is {count!r}, no number above 0")
    types = getattr(config, "layer_types", None)
    if types is not None and len(types) != len(family.layers):
        raise ValueError(
            f"the config's layer_types are {len(types)}, and there are {len(family.layers)} "
            "layers: give it one a layer"
        )
    if config.num_attention_heads % family.kv_heads:
        raise ValueError(
            f"the config has {config.num_attention_heads} heads of queries and {family.kv_heads} "
            "of keys, which doesn't divide them: it is of another model"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and window < 1:
        raise ValueError(f"the config's sliding_window is {window}, in which no token is seen")
    if window is None and "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(
            "the config has layers of sliding attention and no sliding_window for them"
        )
    ahead = getattr(config, "use_bidirectional_attention", None)
    layers = (family.attention(layer) for layer in range(len(family.layers)))
    if ahead or not all(getattr(part, "is_causal", True) for part in (config, *layers)):
        raise ValueError(
            "this model lets tokens see those behind them, and what is measured here is how the "
            "next one is foretold: it is of an embedding model"
        )
    scalar = getattr(config, "query_pre_attn_scalar", 1)
    if not isinstance(scalar, int | float) or not scalar > 0:
        raise ValueError(f"the config's query_pre_attn_scalar is {scalar!r}, no number above 0")
    if family.experts:
        _check_experts(family)
    heads, keys = (
        count * family.head_dim for count in (config.num_attention_heads, family.kv_heads)
    )
    wide = family.inner_width
    shapes = {"q": (heads, width), "k": (keys, width), "v": (keys, width), "o": (width, heads)}
    shapes |= {"gate": (wide, width), "up": (wide, width), "down": (width, wide)}
    for layer in range(len(family.layers)):
        for name, linear in family.linears(layer).items():
            _check_shape(f"layers.{layer}.{name}", linear, nn.Linear, shapes[kind_of(name)])
        for name, norm in family.norms(layer).items():
            _check_norm(f"layers.{layer}.{name}", norm, family)
        if (place := family.attention(layer).layer_idx) != layer:
            raise ValueError(
                f"layers.{layer} takes itself for layer {place}: layers were taken out or moved; "
                "give each self_attn.layer_idx its place"
            )
        if family.attention(layer).head_dim != family.head_dim:
            raise ValueError(
                f"layers.{layer} has heads of {family.attention(layer).head_dim}, and the config "
                f"says {family.head_dim}: it was changed since the model was loaded"
            )
    _check_norm("the final norm", family.final_norm, family)
    if getattr(family.embedding, "max_norm", None) is not None:
        raise ValueError("the embedding has a max_norm, by which reading it changes it: unset that")
    words = (config.vocab_size, width)
    kind = nn.Embedding if family.has_R1 else type(family.embedding)  # which then stays as it is
    _check_shape("the embedding", family.embedding, kind, words)
    _check_shape("lm_head", family.lm_head, nn.Linear, words)


def _check_experts(family: Family) -> None:
    """Raises ValueError for a router or a number of experts that isn't the config's."""
    top, count = family.config.num_experts_per_tok, family.experts
    if type(top) is not int or not 0 < top <= count:
        raise ValueError(
            f"the config's num_experts_per_tok is {top!r}, and a layer has {count} experts"
        )
    for layer in range(len(family.layers)):
        router = family.router(layer)
        found = len(router.weight), len(family.layers[layer].mlp.experts)
        if found != (count, count) or router.weight.shape[1] != family.width:
            raise ValueError(
                f"layers.{layer} has {found[1]} experts and a router of "
                f"{tuple(router.weight.shape)}, and the config says {count} of {family.width} "
                "inputs: one of them was changed since the model was loaded"
            )


def _check_norm(name: str, norm: Module, family: Family) -> None:
    """Raises ValueError for a norm that isn't the RMSNorm of the model's own family."""
    own = type(norm).__module__ == type(family.decoder).__module__
    if not own or not type(norm).__name__.endswith("RMSNorm") or "forward" in vars(norm):
        raise ValueError(
            f"{name} is a {type(norm).__name__} that isn't {family.config.model_type}'s own "
            "RMSNorm, so its gain can't be folded: load the original model"
        )


def _check_shape(name: str, module: Module, kind: type, shape: tuple[int, int]) -> None:
    if type(module) is not kind:
        raise ValueError(
            f"{name} is a {type(module).__module__}.{type(module).__name__}, not a plain "
            f"torch.nn.{kind.__name__}: merge "
            "adapters into the weights, or load the original model"
        )
    if "weight" not in module._parameters:
        raise ValueError(
            f"the weight of {name} is computed from other tensors, as pruning and weight "
            "normalization do: make it a plain parameter first (torch.nn.utils.prune.remove)"
        )
    if tuple(module.weight.shape) != shape:
        raise ValueError(
            f"{name} has a weight of {tuple(module.weight.shape)}, and the config says {shape}: "
            "one of them was changed since the model was loaded"
        )
    bias = getattr(module, "bias", None)
    if bias is not None and tuple(bias.shape) != shape[:1]:
        raise ValueError(
            f"{name} has a bias of {tuple(bias.shape)}, and its weight has {shape[0]} rows: load "
            "the model again"
        )


def _stranger(model: PreTrainedModel, family: type[Family]) -> str | None:
    """The first module holding weights that the family's layout has no place for."""
    paths = family.layout(model.config), family.norm_paths
    inside = {path for found in paths for path in found.values()}
    inside |= {family.router_path, *family.other_paths}
    outside = {"model.embed_tokens", "model.norm", "lm_head"}
    for name, _ in _holders(model):
        path = name.split(".", 3)
        in_layer = path[:2] == ["model", "layers"] and len(path) == 4 and path[3] in inside
        if not in_layer and name not in outside:
            return name
    return None


def _holders(model: PreTrainedModel) -> Iterator[tuple[str, Module]]:
    return (
        (name, module)
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    )


def _refusal(model: PreTrainedModel, module: str, reason: str) -> str:
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    return (
        f"rotlib can't rotate {type(model).__name__}: the module {module} {reason} "
        f"(known families: {known})"
    )
