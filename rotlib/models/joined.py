"""Projections that a family keeps in one matrix, opened into the linears that rotations speak of.

Phi-3 has q, k and v in one `qkv_proj`, gate and up in one `gate_up_proj`. R2 and GPTQ see them
apart. A `Joined` stands where the one linear stood and computes the same; what is saved has the
family's own names and shapes.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel


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
        for (name, count), weight in zip(
            rows.items(), linear.weight.data.split(list(rows.values())), strict=True
        ):
            with torch.device("meta"):
                part = nn.Linear(linear.in_features, count, bias=False)
            part.weight = nn.Parameter(weight, requires_grad=False)
            self.add_module(name, part)
        self.register_load_state_dict_pre_hook(_split)
        self.train(linear.training)

    def forward(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... out"]:
        return torch.cat([part(x) for part in self.children()], dim=-1)

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False) -> dict:
        """As of the one linear."""
        destination = {} if destination is None else destination
        destination[f"{prefix}weight"] = torch.cat([part.weight for part in self.children()])
        return destination


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
    return model
