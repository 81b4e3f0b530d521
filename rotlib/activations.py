"""Rounding activations: what every quantized linear reads, token by token, and the keys and values of every head.

The grids are those of the weights with a token (or a group of its coordinates) in the place of an output channel, and
their scales are taken from each token as it comes ("dynamic"). The step is absmax/(2^(b−1)−1), or spans [min, max] with a
rounded zero point, times a clip ratio. Papers differ in what they leave unsaid, so a `Protocol` says it for all arms of a
table: QuaRot's and SpinQuant's as their public code has them, and this project's own, which clips by the bits: one step off
each end of the range is much at 4 bits and next to nothing at 8. Values are rounded and stay floating-point.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from rotlib.checks import one_of, whole_number
from rotlib.families import Family, adapt
from rotlib.fuse import check_not_rounding
from rotlib.online import HeadStep, check_attention, head_steps
from rotlib.quant import WeightQuant, grid_at

FULL = 16  # bits of what is left alone


@dataclass(frozen=True)
class Protocol:
    """How activations meet their grid.

    `clip` None is 1 − 2^(1−bits). With `o_per_head` what o_proj reads has one scale a head, else one a token. Keys and
    values have an asymmetric grid a head in every protocol.
    """

    symmetric: bool
    clip: float | None
    o_per_head: bool
    kv_clip: float


PROTOCOLS = {
    "quarot": Protocol(symmetric=True, clip=0.9, o_per_head=False, kv_clip=0.95),
    "spinquant": Protocol(symmetric=False, clip=1.0, o_per_head=True, kv_clip=1.0),
    "rotlib": Protocol(symmetric=False, clip=None, o_per_head=False, kv_clip=1.0),
}


@dataclass(frozen=True)
class ActivationQuant:
    """Bits of the linears' inputs and of keys and values, 2–8 or 16 for none; `group_size` None is one scale a token.

    Where the protocol has a scale a head for what o_proj reads, that goes before `group_size`. The first `sinks` tokens of
    every sequence, attention's sinks, keep unrounded inputs; that needs whole sequences, not steps of a cached generation.

    Raises ValueError at construction for a value outside the choices.
    """

    bits: int = FULL
    kv_bits: int = FULL
    group_size: int | None = None
    protocol: str = "rotlib"
    sinks: int = 0

    def __post_init__(self):
        for name, bits in (("activation_bits", self.bits), ("kv_bits", self.kv_bits)):
            _check_bits(name, bits)
        if self.group_size is not None:
            whole_number("activation_group_size (unless it is None)", self.group_size, 1)
            if self.bits == FULL:
                raise ValueError("activation_group_size needs activation_bits below 16")
        one_of("protocol", self.protocol, PROTOCOLS)
        whole_number("sinks", self.sinks, 0)

    def input_grid(self) -> tuple[WeightQuant, float]:
        """The grid of a linear's input and its clip ratio."""
        protocol = PROTOCOLS[self.protocol]
        clip = 1 - 2 ** (1 - self.bits) if protocol.clip is None else protocol.clip
        return WeightQuant(self.bits, None, protocol.symmetric, "full", clip_search=False), clip

    def kv_grid(self) -> tuple[WeightQuant, float]:
        """The grid of one head's key or value and its clip ratio."""
        return WeightQuant(self.kv_bits, None, False, "full", clip_search=False), PROTOCOLS[self.protocol].kv_clip


@contextmanager
def quantized_activations(model: PreTrainedModel, quant: ActivationQuant) -> Iterator[PreTrainedModel]:
    """Round activations while open; the model is as it was afterwards.

    Open it around `evaluate`, or around `gptq` too if calibration shall see rounded activations. Raises like
    `check_activations`.
    """
    family = check_activations(model, quant)
    o_per_head = PROTOCOLS[quant.protocol].o_per_head
    with ExitStack() as stack:
        model.rotlib_rounding = True
        stack.callback(delattr, model, "rotlib_rounding")
        if quant.bits != FULL:
            for layer in range(len(family.layers)):
                for name, linear in family.linears(layer).items():
                    group = family.head_dim if name == "o" and o_per_head else quant.group_size
                    handle = linear.register_forward_pre_hook(_rounded_input(*quant.input_grid(), group, quant.sinks))
                    stack.callback(handle.remove)
        if quant.kv_bits != FULL:
            stack.enter_context(head_steps(family, _rounded_heads(*quant.kv_grid())))
        yield model


def check_activations(model: PreTrainedModel, quant: ActivationQuant) -> Family:
    """The model's family, once it is known that it can carry these quantizers.

    Raises ValueError for a quantizer of the wrong type, groups that don't divide a width, keys out of reach, or a model whose
    activations are being rounded.
    """
    family = adapt(model)
    if not isinstance(quant, ActivationQuant):
        raise ValueError(f"an ActivationQuant such as ActivationQuant(bits=8) is needed, not {quant!r}")
    check_not_rounding(model)
    if quant.bits != FULL and quant.group_size:
        for name, linear in family.linears(0).items():
            grouped = name != "o" or not PROTOCOLS[quant.protocol].o_per_head
            if grouped and linear.in_features % quant.group_size:
                raise ValueError(f"activation_group_size {quant.group_size} doesn't divide the {linear.in_features} inputs of {name}_proj")
    if quant.kv_bits != FULL:
        check_attention(model)
    return family


def round_tokens(x: Float[Tensor, "... n"], grid: WeightQuant, clip: float, group: int | None = None) -> Float[Tensor, "... n"]:
    """Every token of x, or every `group` of its coordinates, on a grid of its own; in float32 at least.

    A gradient passes straight through.
    """
    rows = x.detach().reshape(-1, group or x.shape[-1])
    rows = rows if rows.dtype == torch.float64 else rows.float()
    rounded = grid_at(rows, grid, clip).round(rows).view(x.shape).to(x.dtype)
    return x + (rounded - x.detach()) if x.requires_grad else rounded


def _rounded_input(grid: WeightQuant, clip: float, group: int | None, sinks: int) -> Callable:
    def hook(module: nn.Module, args: tuple) -> tuple:
        x = args[0]
        if sinks and x.shape[-2] <= sinks:
            raise RuntimeError(f"{sinks} sinks need sequences of more tokens than that: turn the cache off (use_cache=False)")
        rounded = round_tokens(x[..., sinks:, :], grid, clip, group)
        return (torch.cat([x[..., :sinks, :], rounded], dim=-2) if sinks else rounded, *args[1:])

    return hook


def _rounded_heads(grid: WeightQuant, clip: float) -> HeadStep:
    return lambda query, key, value: (query, round_tokens(key, grid, clip), round_tokens(value, grid, clip))


def _check_bits(name: str, bits: object) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in (*range(2, 9), FULL):
        raise ValueError(f"{name} must be a whole number from 2 to 8, or {FULL} to leave them alone, not {bits!r}")
