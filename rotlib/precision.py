"""How exactly float32 matrices are multiplied: decided here, for every stage.

| stage | CPU | CUDA |
|---|---|---|
| fusing, projecting | float64 | float64 |
| grids, GPTQ's solver, objectives | float32 | float32 |
| passes through the model, Hessians, logits | float32 | TF32 |
| slopes, to learn by and to weigh tokens | bfloat16 where the processor is fast at it | TF32 |

TF32 keeps ten bits of a factor's mantissa and sums in float32, so a product is off by some 3e-4 of
its size: far less than rounding to 8 bits, and a slope's noise of sampling is larger still. Other
dtypes than float32 are never touched. What the process has set (torch.set_float32_matmul_precision)
is put aside meanwhile and put back.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


def coarse_products() -> AbstractContextManager:
    """Of slopes: bfloat16 or TF32 where the hardware does that fast."""
    return _products("medium")


def slope_dtype(device: torch.device) -> torch.dtype:
    """What a drawn row is kept in for its slopes.

    Some processors multiply bfloat16 twice as fast, and only where it is asked for by its type.
    """
    fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() and not _coarsest
    return torch.bfloat16 if fast else torch.float32


def model_products(device: torch.device) -> AbstractContextManager:
    """Of passes through the model: TF32 on CUDA, whatever the process has set."""
    return _products("high" if device.type == "cuda" else "highest")


def exact_products() -> AbstractContextManager:
    """Of what decides about codes and rotations: float32, also within a pass through the model."""
    return _products("highest")


@contextmanager
def float32_everywhere() -> Iterator[None]:
    """While open, every stage multiplies in float32: to compare a device with another."""
    global _coarsest
    before, _coarsest = _coarsest, "highest"
    try:
        yield
    finally:
        _coarsest = before


_coarsest: str | None = None


@contextmanager
def _products(precision: str) -> Iterator[None]:
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch has a second way to say it, and refuses to be asked for both
        raise ValueError(
            "torch's fp32_precision says how float32 is multiplied, which rotlib decides stage by "
            "stage: set torch.backends.fp32_precision and those of its parts back to 'none'"
        ) from None
    torch.set_float32_matmul_precision(_coarsest or precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
