"""Does a model compute what its config says? Besides weights a file holds nothing else of it."""

from copy import deepcopy

import torch
from torch.nn import Module
from transformers import PreTrainedModel

from rotlib.models.joined import open_joined

# of a module, what changes while it runs, or counts in training alone
_PASSING = ("training", "padding_idx", "cached", "dropout")


def check_as_configured(model: PreTrainedModel) -> None:
    """Raises ValueError for a module that isn't what the config makes in its place.

    It is of another class, holds another number or word, or a parameter that the config has no
    place for. What the parameters hold is free.
    """
    try:
        with torch.device("meta"):
            made = open_joined(type(model)(deepcopy(model.config)))
    except Exception as error:  # whatever its code makes of the config
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the model's config makes no model any more: {reason}") from error
    expected = dict(made.named_modules())
    for name, module in model.named_modules():
        if told := _difference(name or "the model", module, expected.get(name)):
            raise ValueError(f"{told}: a file holds the config alone, so change both")


def _difference(name: str, module: Module, expected: Module | None) -> str | None:
    if type(module) is not type(expected):
        made = "nothing" if expected is None else f"a {type(expected).__name__}"
        return f"{name} is a {type(module).__name__}, and the config makes {made} there"
    shapes = {of: tuple(part.shape) for of, part in expected.named_parameters(recurse=False)}
    for of, parameter in module.named_parameters(recurse=False):
        if (shape := tuple(parameter.shape)) != (made := shapes.get(of, "none")):
            return f"{name} has a {of} of {shape}, and the config makes {made} there"
    if isinstance(module, PreTrainedModel):  # whose own settings are the config's
        return None
    theirs = vars(expected)
    for of, value in vars(module).items():
        plain = isinstance(value, int | float | str) and isinstance(theirs.get(of), type(value))
        if plain and value != theirs[of] and not of.startswith("_") and not of.endswith(_PASSING):
            return f"{name}.{of} is {value!r}, and the config makes it {theirs[of]!r}"
    return None
