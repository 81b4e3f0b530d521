"""Projections that a family keeps in one tensor, opened into the linears that rotations speak of.

Phi-3 has q, k and v in one `qkv_proj`, gate and up in one `gate_up_proj`. R2 and GPTQ see them
apart. A `Joined` stands where the one linear stood and computes the same; what is saved has the
family's own names and shapes. So do the `Experts` of Mixtral and others: transformers computes with
all experts' weights in two tensors, and keeps each expert's apart on disk.
"""

from collections.abc import Callable
from typing import no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from rotlib.models.families import FAMILIES, Qwen3Moe

OPENED = ("self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.experts")  # what `open_joined` opens


class Joined(nn.Module):
    """Several linears that read one input, their outputs side by side.

    The parts are views of the one weight. In a state dict they are one again.

    >>> linear = nn.Linear(4, 5, bias=False)
    >>> joined = Joined(linear, {"a": 2, "b": 3})
    >>> torch.allclose(joined(torch.ones(4)), linear(torch.ones(4))), list(joined.state_dict())
    (True, ['weight'])
    """

    def __init__(self, linear: nn.Linear, rows: dict[str, int]):
        super().__init__()
        for name, weight in zip(rows, linear.weight.data.split(list(rows.values())), strict=True):
            self.add_module(name, _linear(weight))
        self.register_load_state_dict_pre_hook(_split)
        self.train(linear.training)

    def forward(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... out"]:
        return torch.cat([part(x) for part in self.children()], dim=-1)

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False) -> dict:
        """As of the one linear."""
        destination = {} if destination is None else destination
        destination[f"{prefix}weight"] = torch.cat([part.weight for part in self.children()])
        return destination


class Expert(nn.Module):
    """One MLP of a layer that has several."""

    def __init__(self, parts: dict[str, nn.Linear], names: dict[str, str], act: Callable):
        super().__init__()
        for site, linear in parts.items():
            self.add_module(names[site], linear)
        self._names, self._act = names, act

    @no_type_check  # batches wait inside (`walk.Passes`), and jaxtyping's notes are a thread's
    def forward(self, x: Float[Tensor, "tokens n"]) -> Float[Tensor, "tokens n"]:
        gate, up, down = (self.get_submodule(self._names[site]) for site in ("gate", "up", "down"))
        return down(self._act(gate(x)) * up(x))


class Experts(nn.ModuleList):
    """A layer's experts, each called once a batch, with no tokens where it was given none.

    Their weights are views of the two tensors that transformers has; `names` are those of its
    files for gate, up and down.
    """

    def __init__(self, packed: nn.Module, names: dict[str, str]):
        pairs = zip(packed.gate_up_proj.data, packed.down_proj.data, strict=True)
        super().__init__(
            Expert(
                {"gate": _linear(gate), "up": _linear(up), "down": _linear(down)},
                names,
                packed.act_fn,
            )
            for gate_up, down in pairs
            for gate, up in [gate_up.chunk(2)]
        )
        self.train(packed.training)

    @no_type_check
    def forward(
        self,
        x: Float[Tensor, "tokens n"],
        chosen: Int[Tensor, "tokens top"],
        weights: Float[Tensor, "tokens top"],
    ) -> Float[Tensor, "tokens n"]:
        """The sum of what each token's chosen experts put out, times their weights."""
        out = torch.zeros_like(x)
        for number, expert in enumerate(self):
            token, place = torch.where(chosen == number)
            found = expert(x[token]) * weights[token, place, None]
            out.index_add_(0, token, found.to(out.dtype))
        return out


def _linear(weight: Float[Tensor, "out in"]) -> nn.Linear:
    """A linear whose weight is this one, not a copy."""
    with torch.device("meta"):
        linear = nn.Linear(*weight.shape[::-1], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _split(module: Joined, state_dict: dict, prefix: str, *_) -> None:
    """Hand the one weight of a state dict to the parts."""
    if (weight := state_dict.pop(f"{prefix}weight", None)) is not None:
        parts = dict(module.named_children())
        sizes = [part.out_features for part in parts.values()]
        for name, value in zip(parts, weight.split(sizes), strict=True):
            state_dict[f"{prefix}{name}.weight"] = value


def open_joined(model: PreTrainedModel) -> PreTrainedModel:
    """Open the joined projections of a model that has some, in place; other models stay."""
    if model.config.model_type == "phi3":
        config = model.config
        for layer in model.model.layers:
            head = layer.self_attn.head_dim
            keys = config.num_key_value_heads * head
            rows = {"q": config.num_attention_heads * head, "k": keys, "v": keys}
            layer.self_attn.qkv_proj = Joined(layer.self_attn.qkv_proj, rows)
            wide = config.intermediate_size
            layer.mlp.gate_up_proj = Joined(layer.mlp.gate_up_proj, {"gate": wide, "up": wide})
    family = next((one for one in FAMILIES if model.config.model_type in one.model_types), None)
    if family is not None and issubclass(family, Qwen3Moe):
        for layer in model.model.layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp.experts = Experts(layer.mlp.experts, family.expert_paths)
    return model
