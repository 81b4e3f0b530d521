"""Where each model family keeps what a rotation touches.

A `Family` names the embedding, the norms, the linears of a decoder layer and the head of one
transformers model; nothing else in rotlib knows a module's path. Supporting a new family is one
small class here, if its norms are plain RMSNorms that sit *before* the attention and the MLP. A
norm between a writer (o_proj, down_proj) and the residual stream stands in R1's way; of such a
family R2, R3 and R4 are left.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import nn
from torch.nn import Module
from transformers import PreTrainedConfig, PreTrainedModel

# the order in which a decoder layer calls its linears; those of one tuple read the same input
READERS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


def kind_of(name: str) -> str:
    """What a linear is in its layer, whichever expert's.

    >>> kind_of("experts.3.gate"), kind_of("q")
    ('gate', 'q')
    """
    return name.rpartition(".")[2]


def is_experts(name: str) -> bool:
    """Whether a linear is one expert's, by its name in its layer or in the model."""
    return "experts" in name.split(".")


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
    router_path = ""  # what gives every token to some of a layer's experts
    other_paths: ClassVar[tuple[str, ...]] = ()  # modules with weights that no rotation touches
    against_R1 = ""  # the norm in R1's way, which leaves the residual stream as it is
    on_disk: ClassVar = ("", "")  # a part of the weights' names, and what files have in its place
    head_scale = 1.0  # the head reads so many times what the final norm puts out
    readers: tuple[tuple[str, ...], ...] = READERS

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

    @classmethod
    def layout(cls, config: PreTrainedConfig) -> dict[str, str]:
        """The path of every linear in a decoder layer, by its name."""
        return cls.linear_paths

    @property
    def experts(self) -> int:
        """How many MLPs a layer has to choose from; 0 where it has one."""
        return 0

    @property
    def inner_width(self) -> int:
        """How many inputs down reads."""
        return self.config.intermediate_size

    @property
    def has_R1(self) -> bool:
        """Whether the residual stream can be turned."""
        return not self.against_R1

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
        """q, k, v, o, gate, up and down of one layer, by those names.

        An expert's are "experts.0.gate" and so on.
        """
        paths = self.layout(self.config)
        return {name: self.layers[layer].get_submodule(path) for name, path in paths.items()}

    def norms(self, layer: int) -> dict[str, Module]:
        """The two norms of one layer: q, k and v read attention_norm, gate and up read mlp_norm.

        So does a router.
        """
        return {
            name: self.layers[layer].get_submodule(path) for name, path in self.norm_paths.items()
        }

    def attention(self, layer: int) -> Module:
        """The attention of one layer, as the module that calls the attention function."""
        return self.layers[layer].self_attn

    def router(self, layer: int) -> Module | None:
        """What gives every token to some of a layer's experts, where the family has them."""
        return self.layers[layer].get_submodule(self.router_path) if self.router_path else None

    def query_key_norms(self, layer: int) -> tuple[Module, ...]:
        """The norms on a layer's query and key heads, where the family has them."""
        return ()

    def untie(self) -> None:
        """Give lm_head a weight of its own, and let the config say so.

        Folding the final norm needs it.
        """
        if self.lm_head.weight.data_ptr() == self.embedding.weight.data_ptr():
            with torch.inference_mode(False):  # else nothing could change it any more
                own = self.embedding.weight.detach().clone()
                self.lm_head.weight = nn.Parameter(own, requires_grad=False)
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


class Qwen3Moe(Qwen3):
    """Qwen3's mixtures of experts, and OLMoE: a router gives every token to some of a layer's MLPs.

    transformers keeps the experts' weights in two tensors, which `rl.load` opens.
    """

    model_types = ("qwen3_moe", "olmoe")
    expert_paths: ClassVar = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    router_path = "mlp.gate"

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        if getattr(self.config, "clip_qkv", None) is not None:
            raise ValueError("the config's clip_qkv clips values, and turned ones are others")
        self.readers = READERS[:2] + tuple(
            tuple(f"experts.{expert}.{site}" for site in sites)
            for expert in range(self.experts)
            for sites in READERS[2:]
        )

    @classmethod
    def layout(cls, config: PreTrainedConfig) -> dict[str, str]:
        attention = {site: cls.linear_paths[site] for sites in READERS[:2] for site in sites}
        return attention | {
            f"experts.{expert}.{site}": f"mlp.experts.{expert}.{path}"
            for expert in range(config.num_local_experts)
            for site, path in cls.expert_paths.items()
        }

    @property
    def experts(self) -> int:
        return self.config.num_local_experts

    @property
    def inner_width(self) -> int:
        return getattr(self.config, "moe_intermediate_size", self.config.intermediate_size)


class Mixtral(Qwen3Moe):
    """The same without norms on queries and keys, by other names."""

    model_types = ("mixtral",)
    expert_paths: ClassVar = {"gate": "w1", "up": "w3", "down": "w2"}
    other_paths = ()
    query_key_norms = Family.query_key_norms
    on_disk = (".mlp.", ".block_sparse_moe.")


class PostNorm(Family):
    """OLMo-2, OLMo-3 and EXAONE 4: a norm ends each block, and none begins it.

    No norm is folded, and what its gain multiplies can't be turned: R1 is left out.
    """

    model_types = ("olmo2", "olmo3", "exaone4")
    norm_paths: ClassVar = {}
    against_R1 = "post_attention_layernorm"
    other_paths = (
        *("post_attention_layernorm", "post_feedforward_layernorm"),
        *("self_attn.q_norm", "self_attn.k_norm"),
    )


class Gemma3(PostNorm):
    """Gemma-3's text models: norms around every block, whose gains are 1 + weight."""

    model_types = ("gemma3_text",)
    other_paths = (*PostNorm.other_paths, "input_layernorm", "pre_feedforward_layernorm")


FAMILIES = (Family, Qwen3, Granite, Phi3, Qwen3Moe, Mixtral, PostNorm, Gemma3)
