"""The checks that arguments share.

Each raises ValueError with one sentence that says what would be right.
"""

import sys

import torch
from transformers import PreTrainedModel

_LARGEST = sys.float_info.max
# what is computed in
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def whole_number(name: str, value: object, least: int, most: int = 2**63 - 1) -> int:
    """`value`, known to be an int (no bool) from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        small = most == 2**63 - 1 and not (isinstance(value, int) and value > most)
        bounds = f"of at least {least}" if small else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number {bounds}, not {shown(value)}")
    return value


def shown(value: object) -> str:
    """A value as an error says it, in a line."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}…"


def yes_or_no(name: str, value: object) -> None:
    """Known to be True or False: the string "no" would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {shown(value)}")


def keeper(name: str, value: object, protocol: type, what: str) -> None:
    """Known to be None or to keep things by get and put, as the protocol says; a class doesn't."""
    if isinstance(value, type) or not (value is None or isinstance(value, protocol)):
        raise ValueError(f"{name} must hold {what} by get and put, not be {value!r}")


def positive(name: str, value: object, least: float = 0.0) -> None:
    """Known to be a finite number above zero, and no smaller than `least`."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not 0 < value <= _LARGEST or value < least:
        bound = f" from {least:g}" if least else ""
        raise ValueError(f"{name} must be a positive number{bound}, not {shown(value)}")


def share(name: str, value: object) -> None:
    """Known to be a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, not {shown(value)}")


def inner_share(name: str, value: object) -> None:
    """Known to be a number strictly between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError(
            f"{name} must be a number between 0 and 1, both excluded, not {shown(value)}"
        )


def all_finite(values: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinite: the ends tell, in a twentieth of isfinite's time."""
    return not values.numel() or bool(torch.stack(values.aminmax()).isfinite().all())


def one_of(name: str, value: object, choices) -> None:
    """Known to be one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"unknown {name} {shown(value)}: choose one of {', '.join(choices)}")


def _stored(name: str, value: torch.Tensor) -> None:
    """Known to be a tensor whose entries lie in memory one by one, in a type that computes."""
    if value.is_meta or value.layout != torch.strided:
        kind = "on the device 'meta', where it has no values" if value.is_meta else "sparse"
        raise ValueError(f"{name} is {kind}: give a dense tensor")
    if value.is_floating_point() and value.dtype.itemsize < 2:
        raise ValueError(f"{name} is of {value.dtype}, which nothing is computed in: widen it")


def matrix(name: str, value: object) -> None:
    """Known to be a matrix of finite real numbers that isn't empty."""
    if not isinstance(value, torch.Tensor) or value.ndim != 2 or not value.is_floating_point():
        is_tensor = isinstance(value, torch.Tensor)
        found = f"{value.dtype} {tuple(value.shape)}" if is_tensor else type(value).__name__
        raise ValueError(f"{name} must be a floating-point matrix, not {found}")
    _stored(name, value)
    if not value.numel() or not all_finite(value):
        raise ValueError(f"{name} must hold finite numbers, and at least one")


def floats(name: str, value: object, last: int | None = None) -> None:
    """Known to be a floating-point tensor with an axis, the last one of this length."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.ndim:
        raise ValueError(f"{name} must be a floating-point tensor with at least one axis")
    _stored(name, value)
    if last is not None and value.shape[-1] != last:
        raise ValueError(f"the last axis of {name} must have {last} entries, not {value.shape[-1]}")


def token_ids(
    name: str, tokens: object, dimensions: int, model: PreTrainedModel | None = None
) -> None:
    """Known to be a LongTensor, a stream (1 dimension) or windows (2).

    With a model, also to hold ids and lengths that it can take.
    """
    is_tensor = isinstance(tokens, torch.Tensor)
    if not is_tensor or tokens.dtype != torch.long or tokens.ndim != dimensions:
        found = f"{tokens.dtype} {tuple(tokens.shape)}" if is_tensor else type(tokens).__name__
        shape = ("(n,)", "(windows, length)")[dimensions - 1]
        raise ValueError(f"{name} must be a LongTensor of shape {shape}, not {found}")
    _stored(name, tokens)
    if model is None:
        return
    if not tokens.numel() or tokens.shape[-1] < 2:
        raise ValueError(
            f"{name} must hold at least one window of 2 tokens or more, not {tuple(tokens.shape)}"
        )
    vocabulary = model.config.vocab_size
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise ValueError(
            f"{name} must hold token ids from 0 to {vocabulary - 1}: "
            "tokenize with this model's tokenizer"
        )
    window_fits(name, tokens.shape[-1], model)


def window_fits(name: str, length: int, model: PreTrainedModel) -> None:
    """Known to be no longer than what the model reads."""
    context = model.config.max_position_embeddings
    if length > context:
        raise ValueError(
            f"{name} has windows of {length} tokens, but this model reads {context} at most"
        )
