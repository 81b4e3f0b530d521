"""A canary, and the table of all of them."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import partialmethod, wraps
from inspect import signature
from unittest.mock import patch

from torch import Tensor
from tqdm import tqdm

from rotlib.precision import float32_everywhere


@dataclass(frozen=True)
class Canary:
    """A stage's numbers, the constants behind them, and how far processors may differ.

    A number may be off by `tolerance` times the largest magnitude under its name. Of those named in
    `ties` a code may fall either way: the largest weight of every row lies half-way between two.
    """

    numbers: Callable[[], dict]
    constants: dict
    tolerance: float
    ties: tuple[str, ...] = ()

    def allowed(self, name: str) -> float:
        """How far a number may be off."""
        return TIE if name.startswith(self.ties) else self.tolerance


CANARIES: dict[str, Canary] = {}
TIE = 0.3  # what one code of a tiny weight changes; beside it stands a number on the grid "full"


def canary(
    stage: str,
    *doors: Callable,
    tolerance: float = 1e-5,
    ties: tuple[str, ...] = (),
    **constants: object,
) -> Callable:
    """The function below computes a stage's numbers; `doors` lend their defaults as constants."""
    told = {name: plain(value) for name, value in constants.items()} | defaults(*doors)

    def register(numbers: Callable[[], dict]) -> Callable[[], dict]:
        @wraps(numbers)
        def computed() -> dict:
            with _quietly(), float32_everywhere():
                return plain(numbers())

        CANARIES[stage] = Canary(computed, told, tolerance, ties)
        return numbers

    return register


@contextmanager
def _quietly() -> Iterator[None]:
    """No progress bars and no warnings: nobody waits for a canary."""
    hidden = partialmethod(tqdm.__init__, disable=True)
    with warnings.catch_warnings(), patch.object(tqdm, "__init__", hidden):
        warnings.simplefilter("ignore")
        yield


def defaults(*doors: Callable) -> dict[str, object]:
    """The defaults of functions' parameters and of dataclasses' fields."""
    found = {}
    for door in doors:
        if is_dataclass(door):
            given = {one.name: one.default for one in fields(door) if one.default is not MISSING}
        else:
            parameters = signature(door).parameters.values()
            given = {one.name: one.default for one in parameters if one.default is not one.empty}
        found |= {f"{door.__name__}({name})": plain(value) for name, value in given.items()}
    return found


def plain(thing: object) -> object:
    """A number, a tensor or a container of them as JSON keeps it; floats to nine digits."""
    if isinstance(thing, Tensor):
        return plain(thing.detach().cpu().tolist())
    if is_dataclass(thing) and not isinstance(thing, type):
        return {one.name: plain(getattr(thing, one.name)) for one in fields(thing)}
    if isinstance(thing, dict):
        return {str(name): plain(value) for name, value in thing.items()}
    if isinstance(thing, list | tuple | range):
        return [plain(value) for value in thing]
    if isinstance(thing, bool | int | str) or thing is None:
        return thing
    return float(f"{float(thing):.9g}")
