"""Rounding activations: what every quantized linear reads, and every head's keys and values.

The grids are those of the weights with a token in the place of an output channel, and their scales
are taken from each token as it comes ("dynamic"). The step is absmax/(2^(b−1)−1), or spans
[min, max] with a rounded zero point, times a clip ratio. Papers differ in what they leave unsaid,
so a `Protocol` says it for all arms of a table: QuaRot's and SpinQuant's as their public code has
them, that of runtimes which read compressed-tensors' checkpoints, and this project's own, which
clips by the bits: one step off each end of the range is much at 4 bits and next to nothing at 8.
Values are rounded and stay floating-point.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from rotlib.checks import one_of, whole_number
from rotlib.models.families import Family
from rotlib.models.sound import check_not_rounding
from rotlib.models.supported import adapt, check_no_experts
from rotlib.models.walk import hooks
from rotlib.quantization.fp4 import FP4
from rotlib.quantization.grids import GRIDS, WeightQuant, grid_at
from rotlib.rotations.online import HeadStep, check_attention, head_steps

FULL = 16  # bits of what is left alone


@dataclass(frozen=True)
class Protocol:
    """How activations meet their grid.

    `clip` None is 1 − 2^(1−bits). With `o_per_head` what o_proj reads has one scale a head, else
    one a token. Keys and values have an asymmetric grid a head in every protocol. `convention` is
    `WeightQuant`'s.
    """

    symmetric: bool
    clip: float | None
    o_per_head: bool
    kv_clip: float
    convention: str = "full"


PROTOCOLS = {
    "quarot": Protocol(symmetric=True, clip=0.9, o_per_head=False, kv_clip=0.95),
    "spinquant": Protocol(symmetric=False, clip=1.0, o_per_head=True, kv_clip=1.0),
    "rotlib": Protocol(symmetric=False, clip=None, o_per_head=False, kv_clip=1.0),
    "compressed-tensors": Protocol(True, 1.0, o_per_head=False, kv_clip=1.0, convention="half"),
}


@dataclass(frozen=True)
class ActivationQuant:
    """Bits of the linears' inputs and of keys and values, 2–8 or 16 for none, and the protocol.

    The first `sinks` tokens of every sequence, attention's sinks, keep unrounded inputs; that needs
    whole sequences, not steps of a cached generation. On the `grid` "nvfp4" or "mxfp4" inputs are
    4-bit floats in groups of their own, by every protocol; keys and values stay integers. Raises
    ValueError at construction for a value outside the choices.

    >>> ActivationQuant(bits=4, protocol="quarot").input_grid()[1]  # the clip ratio
    0.9
    """

    bits: int = FULL
    kv_bits: int = FULL
    protocol: str = "rotlib"
    sinks: int = 0
    grid: str = GRIDS[0]

    def __post_init__(self):
        for name, bits in (("activation_bits", self.bits), ("kv_bits", self.kv_bits)):
            _check_bits(name, bits)
        one_of("protocol", self.protocol, PROTOCOLS)
        one_of("activation_grid", self.grid, GRIDS)
        if self.grid in FP4 and self.bits != 4:
            raise ValueError(f"the activation_grid {self.grid} has 4 bits, not {self.bits}")
        whole_number("sinks", self.sinks, 0)

    @property
    def rounds(self) -> bool:
        """Whether anything is rounded."""
        return self.bits != FULL or self.kv_bits != FULL

    def input_grid(self) -> tuple[WeightQuant, float]:
        """The grid of a linear's input and its clip ratio."""
        if self.grid in FP4:
            return WeightQuant(grid=self.grid, clip_search=False), 1.0
        protocol = PROTOCOLS[self.protocol]
        clip = 1 - 2 ** (1 - self.bits) if protocol.clip is None else protocol.clip
        grid = self.bits, None, protocol.symmetric, protocol.convention
        return WeightQuant(*grid, clip_search=False), clip

    def kv_grid(self) -> tuple[WeightQuant, float]:
        """The grid of one head's key or value and its clip ratio."""
        grid = WeightQuant(self.kv_bits, None, False, "full", clip_search=False)
        return grid, PROTOCOLS[self.protocol].kv_clip


@contextmanager
def quantized_activations(
    model: PreTrainedModel, quant: ActivationQuant
) -> Iterator[PreTrainedModel]:
    """Round activations while open; the model is as it was afterwards.

    Open it around `evaluate`, or around `gptq` too if calibration shall see rounded activations.
    Raises like `check_activations`.

    >>> before = model(tokens).logits
    >>> with quantized_activations(model, ActivationQuant(bits=4)):
    ...     rounded = model(tokens).logits
    >>> torch.equal(rounded, before), torch.equal(model(tokens).logits, before)
    (False, True)
    """
    family = adapt(model)
    check_activations(family, quant)
    o_per_head = PROTOCOLS[quant.protocol].o_per_head and quant.grid not in FP4
    with ExitStack() as stack:
        model.rotlib_rounding = id(model)  # a copy of the model is told by it
        stack.callback(delattr, model, "rotlib_rounding")
        if quant.sinks:
            stack.enter_context(hooks([(family.decoder, _check_whole)], with_kwargs=True))
        if quant.bits != FULL:
            grid, clip = quant.input_grid()
            rounded = (
                (linear, _rounded_input(grid, clip, width, quant.sinks))
                for layer in range(len(family.layers))
                for name, linear in family.linears(layer).items()
                for width in [family.head_dim if o_per_head and name == "o" else grid.group_size]
            )
            stack.enter_context(hooks(rounded))
        if quant.kv_bits != FULL:
            stack.enter_context(head_steps(family, _rounded_heads(*quant.kv_grid())))
        yield model


def check_activations(family: Family, quant: ActivationQuant) -> None:
    """Raises ValueError where a model can't carry these quantizers.

    They are of the wrong type, its keys are out of reach, or its activations are being rounded.
    """
    if not isinstance(quant, ActivationQuant):
        raise ValueError(
            f"an ActivationQuant such as ActivationQuant(bits=8) is needed, not {quant!r}"
        )
    check_not_rounding(family.model)
    if quant.sinks:
        check_no_experts(family, "leaving sinks alone")
    if quant.kv_bits != FULL:
        check_attention(family.model)
    if quant.grid in FP4:
        for name, linear in family.linears(0).items():
            quant.input_grid()[0].check_width(linear.in_features, f"{name}_proj")


def round_tokens(
    x: Float[Tensor, "... n"], grid: WeightQuant, clip: float, width: int | None = None
) -> Float[Tensor, "... n"]:
    """Every token of x, or every `width` of its coordinates, on a grid of its own.

    In float32 at least; a gradient passes straight through. NVFP4's unit is one for all of x.
    """
    rows = x.detach().reshape(-1, width or x.shape[-1])
    rows = rows if rows.dtype == torch.float64 else rows.float()
    rows, unit = grid.in_units(rows)
    rounded = grid_at(rows, grid, clip).round(rows).mul_(unit).view(x.shape).to(x.dtype)
    return x + (rounded - x.detach()) if x.requires_grad else rounded


def _rounded_input(grid: WeightQuant, clip: float, width: int | None, sinks: int) -> Callable:
    def hook(module: nn.Module, args: tuple) -> tuple:
        x = args[0]
        if not x.numel():  # an expert that was given no token
            return args
        if sinks and x.shape[-2] <= sinks:
            raise ValueError(
                f"{sinks} sinks need sequences of more tokens than the {x.shape[-2]} here: take "
                "longer ones"
            )
        rounded = round_tokens(x[..., sinks:, :], grid, clip, width)
        return (torch.cat([x[..., :sinks, :], rounded], dim=-2) if sinks else rounded, *args[1:])

    return hook


def _check_whole(decoder: nn.Module, args: tuple, keywords: dict) -> None:
    """Raises ValueError where a sequence's first tokens aren't where its batch begins.

    It goes on from a cache, is padded on the left, or is one of several in a row.
    """
    if (cache := keywords.get("past_key_values")) is not None and cache.get_seq_length():
        raise ValueError(
            "sinks are the first tokens of a sequence, and a cache holds them already: give whole "
            "sequences (use_cache=False)"
        )
    mask, positions = keywords.get("attention_mask"), keywords.get("position_ids")
    read = mask.bool() if mask is not None and mask.ndim == 2 else None
    if read is not None and not read[:, 0].all():
        raise ValueError(
            "sinks are the first tokens of a sequence, and here padding comes before them: pad on "
            "the right"
        )
    if positions is None:
        return
    begins = positions == 0 if read is None else (positions == 0) & read
    if begins[..., 1:].any():
        raise ValueError(
            "sinks are the first tokens of a sequence, and here several follow each other in a "
            "row: give each a row of its own"
        )


def _rounded_heads(grid: WeightQuant, clip: float) -> HeadStep:
    return lambda query, key, value: (
        query,
        round_tokens(key, grid, clip),
        round_tokens(value, grid, clip),
    )


def _check_bits(name: str, bits: object) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in (*range(2, 9), FULL):
        raise ValueError(
            f"{name} must be a whole number from 2 to 8, or {FULL} to leave them alone, "
            f"not {bits!r}"
        )
