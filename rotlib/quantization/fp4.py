"""The 4-bit floats that today's hardware multiplies, and the scales that their formats have.

A weight is one of E2M1's 0, ½, 1, 1½, 2, 3, 4, 6 and their negatives. NVFP4 has an E4M3 scale for
16 weights and a float32 for a tensor, its unit; MXFP4 (OCP Microscaling v1.0) has a power of two
for 32.
"""

from math import frexp, isinf

import torch
from jaxtyping import Float
from torch import Tensor

FP4 = {"nvfp4": 16, "mxfp4": 32}  # the weights that share a scale
FP4_LARGEST = 6.0
E4M3 = torch.float8_e4m3fn
# a tensor's largest weight has a scale of at most half of what E4M3 holds: GPTQ's may grow
E4M3_ROOM = torch.finfo(E4M3).max / 2
# how many times smaller than its neighbour's a matrix's largest weight may be, with one unit for
# both: its scales are then E4M3's smallest normal numbers
UNIT_SPAN = 2**12
# the clip factors that differ where scales are powers of two
HALVES = (1.0, 0.5, 0.25)


def nearest_fp4_(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The floats of E2M1 nearest to these, in their place; halves go to the even code.

    >>> nearest_fp4_(torch.tensor([0.2, 0.3, 2.4, -2.6, 5.0, 9.0]))
    tensor([ 0.0000,  0.5000,  2.0000, -3.0000,  4.0000,  6.0000])
    """
    size = x.abs()
    step = 0.5 + 0.5 * (size >= 2) + (size >= 4)
    return x.div_(step).round_().mul_(step).clamp_(-FP4_LARGEST, FP4_LARGEST)


def unit_for(largest: float) -> float:
    """The power of two that NVFP4's scales of a tensor with this largest weight are multiples of.

    >>> unit_for(1.0)
    0.0009765625
    """
    if isinf(largest):
        return largest  # what is divided by it becomes NaN, and isn't made finite
    return 2.0 ** frexp(largest / (FP4_LARGEST * E4M3_ROOM))[1] if largest else 1.0


def unit_of(scale: Float[Tensor, "*n"]) -> float:
    """The smallest unit that these scales of NVFP4 can be stored with."""
    return 2.0 ** (1 - frexp(torch.finfo(E4M3).max / scale.max().item())[1])


def held(grid: str, scale: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The scales of unit 1 that the format has, nearest to these.

    MXFP4's are those with which 6 of them reach 6 of these; what would round to 8 doubles a scale,
    as in compressed-tensors: from 7 on.

    >>> held("mxfp4", torch.tensor([0.9, 1.1, 1.2]))
    tensor([1., 1., 2.])
    """
    if grid == "nvfp4":
        return scale.clamp(max=torch.finfo(E4M3).max).to(E4M3).to(scale.dtype)
    powers = torch.ldexp(torch.ones_like(scale), torch.frexp(scale * (FP4_LARGEST / 7)).exponent)
    return torch.where(torch.isfinite(scale), powers, torch.nan)
