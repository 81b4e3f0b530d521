"""Where each model family keeps what a rotation touches.

A `Family` names the embedding, the norms, the seven linears of a decoder layer and the head of one
transformers model; nothing else in rotlib knows a module's path. Supporting a new family is one
small class here, if its norms are plain RMSNorms that sit *before* the attention and the MLP. A
norm between a writer (o_proj, down_proj) and the residual stream stands in R1's way; such models
are refused with the module's name.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from hashlib import sha256
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn import Module
from transformers import PreTrainedConfig, PreTrainedModel

# the order in which a decoder layer calls its linears; those of one tuple read the same input
READERS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


class Family:
    """The Llama layout, which Mistral, Qwen2, SmolLM3 and some others share.

    Qwen2's q, k, v biases are read off the linears. A quarter of SmolLM3's layers have no rotary
    embeddings; R3 cancels between their queries and keys all the same.
    """

    model_types = (
        *("llama", "mistral", "ministral", "ministral3", "qwen2", "smollm3", "seed_oss", "cwm"),
    )
    linear_paths: ClassVar = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    norm_paths: ClassVar = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    }
    other_paths: ClassVar[tuple[str, ...]] = ()  # modules with weights that no rotation touches
    head_scale = 1.0  # the head reads so many times what the final norm puts out

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.decoder = model.model
        self.layers = model.model.layers
        self.embedding = model.model.embed_tokens
        self.final_norm = model.model.norm
        self.lm_head = model.lm_head
        self.width = self.config.hidden_size
        self.kv_heads = self.config.num_key_value_heads
        self.head_dim = (
            getattr(self.config, "head_dim", None) or self.width // self.config.num_attention_heads
        )

    @property
    def config(self) -> PreTrainedConfig:
        """The model's, which may be replaced by one of its own."""
        return self.model.config

    @property
    def rotary(self) -> bool:
        """Whether RoPE turns all coordinates of a head, in pairs from its two halves."""
        return (self.config.rope_parameters or {}).get("partial_rotary_factor", 1.0) == 1.0

    @property
    def device(self) -> torch.device:
        """Where the model computes.

        A model that doesn't fit there is kept on the host and sends a layer at a time (`rl.load`).
        """
        return getattr(self.model, "rotlib_device", self.embedding.weight.device)

    @contextmanager
    def on_device(self, *modules: Module, changed: bool = False) -> Iterator[None]:
        """While open, hold these modules where the model computes.

        Then they are on the host again, as they were there, or with what has `changed` meanwhile.
        """
        if self.device == self.embedding.weight.device:
            yield
            return
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        at_home = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(self.device, non_blocking=True)
            yield
        finally:
            for tensor, home in zip(tensors, at_home, strict=True):
                if changed:
                    home.copy_(tensor.data)
                tensor.data = home

    def linears(self, layer: int) -> dict[str, nn.Linear]:
        """q, k, v, o, gate, up and down of one layer, by those names."""
        return {
            name: self.layers[layer].get_submodule(path) for name, path in self.linear_paths.items()
        }

    def norms(self, layer: int) -> dict[str, Module]:
        """The two norms of one layer: q, k and v read attention_norm, gate and up read mlp_norm."""
        return {
            name: self.layers[layer].get_submodule(path) for name, path in self.norm_paths.items()
        }

    def attention(self, layer: int) -> Module:
        """The attention of one layer, as the module that calls the attention function."""
        return self.layers[layer].self_attn

    def query_key_norms(self, layer: int) -> tuple[Module, ...]:
        """The norms on a layer's query and key heads, where the family has them."""
        return ()

    def untie(self) -> None:
        """Give lm_head a weight of its own, and let the config say so.

        Folding the final norm needs it.
        """
        if self.lm_head.weight.data_ptr() == self.embedding.weight.data_ptr():
            self.lm_head.weight = nn.Parameter(
                self.embedding.weight.detach().clone(), requires_grad=False
            )
        self.config.tie_word_embeddings = False


class Qwen3(Family):
    """Llama's layout with a norm on each query and key head, which R1 and R2 pass by."""

    model_types = ("qwen3",)
    other_paths = ("self_attn.q_norm", "self_attn.k_norm")

    def query_key_norms(self, layer: int) -> tuple[Module, ...]:
        return tuple(self.layers[layer].get_submodule(path) for path in self.other_paths)


class Granite(Family):
    """Llama's layout with numbers that multiply embeddings, attention, residuals and logits.

    A rotation passes by all of them.
    """

    model_types = ("granite",)

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        if not self.config.logits_scaling:
            raise ValueError("the config's logits_scaling is 0, and logits are divided by it")

    @property
    def head_scale(self) -> float:
        return 1 / self.config.logits_scaling


class Phi3(Family):
    """Phi-3 and Phi-4: Llama's linears, stored in two joined ones, which `rl.load` opens.

    Of some of them RoPE turns a part of a head's coordinates.
    """

    model_types = ("phi3",)
    linear_paths = Family.linear_paths | {
        "q": "self_attn.qkv_proj.q",
        "k": "self_attn.qkv_proj.k",
        "v": "self_attn.qkv_proj.v",
        "gate": "mlp.gate_up_proj.gate",
        "up": "mlp.gate_up_proj.up",
    }


FAMILIES = (Family, Qwen3, Granite, Phi3)

# families whose blocks end in a norm: its gain sits between a writer and the residual stream
_POST_NORM = {
    "gemma2": "post_attention_layernorm",
    "gemma3_text": "post_attention_layernorm",
    "gemma3": "post_attention_layernorm",
    "olmo2": "post_attention_layernorm",
}


def adapt(model: PreTrainedModel) -> Family:
    """The family of a model.

    Raises ValueError with one sentence for an architecture that rotlib doesn't know or that R1
    can't be fused into, naming the first module that stands in the way.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"a transformers model is needed, not a {type(model).__name__}: "
            "rl.load returns (model, tokenizer)"
        )
    model_type = model.config.model_type
    for family in FAMILIES:
        if model_type in family.model_types:
            if stranger := _stranger(model, family):
                reason = f"has no place in the {model_type} layout"
                if family is Phi3:
                    reason = "isn't opened into its parts: load the model with rl.load"
                raise ValueError(_refusal(model, stranger, reason))
            _check_one_meaning(model)
            _check_shapes(found := family(model))
            _check_code(model)
            return found
    if norm := _POST_NORM.get(model_type):
        path = next(name for name, _ in model.named_modules() if name.endswith(f"layers.0.{norm}"))
        reason = "puts a gain between a writer and the residual stream, so R1 can't be fused"
        raise ValueError(_refusal(model, path, reason))
    if stranger := _stranger(model, Family):
        raise ValueError(_refusal(model, stranger, "has no place in the layouts it knows"))
    norm = type(model.model.layers[0].get_submodule(Family.norm_paths["attention_norm"])).__name__
    reason = f"is a {norm}, whose gain it doesn't know how to fold"
    raise ValueError(_refusal(model, "model.layers.0.input_layernorm", reason))


def _check_code(model: PreTrainedModel) -> None:
    """Raises ValueError for a module whose class computes something that nobody here has read."""
    for name, module in model.named_modules():
        forward = type(module).forward
        if not str(forward.__module__).startswith(("transformers.", "torch.", "rotlib.")):
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__} with a forward of its own, "
                f"{forward.__qualname__}, that isn't transformers': load the original model"
            )


def _check_one_meaning(model: PreTrainedModel) -> None:
    """Raises ValueError for a model that computes something else than its weights say.

    Parts of it are shared, or of a class with a state of its own, or its config asks for online
    rotations that aren't at work, or it was copied while its activations were being rounded.
    """
    if getattr(model, "rotlib_rounding", id(model)) != id(model):
        raise ValueError(
            "this model was copied inside quantized_activations, so nothing stops its rounding: "
            "copy it outside"
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


def online_of(model: PreTrainedModel) -> list[str]:
    """The online rotations that a model's config names; raises ValueError for anything else."""
    online = getattr(model.config, "rotlib_online", None) or []
    if not isinstance(online, list | tuple) or not all(name in ("R3", "R4") for name in online):
        raise ValueError(
            f"the config's rotlib_online must name R3 or R4, not {online!r}: it was changed by hand"
        )
    return online


def _check_shapes(family: Family) -> None:
    """Raises ValueError for a linear that isn't one, or of another shape than the config says."""
    config, width = family.config, family.width
    if not len(family.layers) == config.num_hidden_layers > 0:
        raise ValueError(
            f"this model has {len(family.layers)} decoder layers, and its config says "
            f"{config.num_hidden_layers}: load it again"
        )
    if config.num_attention_heads % family.kv_heads:
        raise ValueError(
            f"the config has {config.num_attention_heads} heads of queries and {family.kv_heads} "
            "of keys, which doesn't divide them: it is of another model"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and window < 1:
        raise ValueError(f"the config's sliding_window is {window}, in which no token is seen")
    heads, keys = (
        count * family.head_dim for count in (config.num_attention_heads, family.kv_heads)
    )
    wide = config.intermediate_size
    shapes = {"q": (heads, width), "k": (keys, width), "v": (keys, width), "o": (width, heads)}
    shapes |= {"gate": (wide, width), "up": (wide, width), "down": (width, wide)}
    for layer in range(len(family.layers)):
        for name, linear in family.linears(layer).items():
            _check_shape(f"layers.{layer}.{name}", linear, nn.Linear, shapes[name])
        for name, norm in family.norms(layer).items():
            _check_norm(f"layers.{layer}.{name}", norm, family)
        if family.attention(layer).head_dim != family.head_dim:
            raise ValueError(
                f"layers.{layer} has heads of {family.attention(layer).head_dim}, and the config "
                f"says {family.head_dim}: it was changed since the model was loaded"
            )
    _check_norm("the final norm", family.final_norm, family)
    _check_shape("the embedding", family.embedding, nn.Embedding, (config.vocab_size, width))
    _check_shape("lm_head", family.lm_head, nn.Linear, (config.vocab_size, width))


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
            f"{name} is a {type(module).__name__}, not a plain torch.nn.{kind.__name__}: merge "
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


def is_rotated(model: PreTrainedModel) -> bool:
    """True once a rotation has been fused; the config carries the mark through save and load.

    >>> import rotlib as rl
    >>> is_rotated(model), is_rotated(rl.fuse(model, rl.random_rotation(model)))
    (False, True)
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"a transformers model is needed, not a {type(model).__name__}")
    return bool(getattr(model.config, "rotlib_rotated", False))


def is_quantized(model: PreTrainedModel) -> bool:
    """True once the weights have been put on a grid; the config carries the mark."""
    return bool(getattr(model.config, "rotlib_quantized", False))


def mark(model: PreTrainedModel, name: str) -> None:
    """Mark a model that is about to be changed, in a config of its own: others may share that one.

    Until `finished` is called it is neither the original nor changed, which `check_sound` refuses.
    """
    shared, own = model.config, deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own
    setattr(own, name, True)
    model.rotlib_unfinished = True


def finished(model: PreTrainedModel) -> None:
    """What was begun when the model was marked is done."""
    del model.rotlib_unfinished


def weights_sample(model: PreTrainedModel) -> str:
    """A digest of every parameter, by a thousand entries and the sum of all bits.

    What is learned of a model is its own.
    """
    digest = sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize]
        bits = values.view(kind).sum(dtype=torch.int64).item()  # the same in whatever order
        values = values[:: max(1, len(values) // 1000)].cpu().float()
        digest.update(f"{name} {tuple(parameter.shape)} {bits}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:12]


def _stranger(model: PreTrainedModel, family: type[Family]) -> str | None:
    """The first module holding weights that the family's layout has no place for."""
    inside = {*family.linear_paths.values(), *family.norm_paths.values(), *family.other_paths}
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
