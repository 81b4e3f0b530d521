"""Rotations of one's own: known by their source, and taken along to a sweep's workers."""

import sys
from collections.abc import Callable
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from inspect import getsource, signature
from pathlib import Path
from textwrap import dedent
from types import FunctionType

import cloudpickle

from rotlib.rotations.rotation import Rotation
from rotlib.study.recipe import OWN, SHIPPED


def register_rotation(name: str, replace: bool = False) -> Callable:
    """Let recipes, sweeps, tables and figures know a rotation of one's own by a name.

    The function takes a model, a seed and whether R3 and R4 are on, and returns a Rotation. It may
    stand in a notebook or a module; a sweep file names the module's file under `rotations`. Its
    results carry a digest of its source, so that they are stale once it changes. Raises ValueError
    for a name that is taken, unless it is one's own to `replace`.

    >>> @register_rotation("reversed")
    ... def reversed_rotation(model, seed=0, R3=False, R4=False):
    ...     return Rotation(torch.eye(model.config.hidden_size).flip(0), None, R3, R4)
    >>> "reversed" in OWN
    True
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"a rotation's name is a word such as 'cosine', not {name!r}")
    if name in SHIPPED:
        raise ValueError(f"the rotation {name!r} is one of rotlib's: choose another name")

    def register(make: Callable[..., Rotation]) -> Callable[..., Rotation]:
        digest = source_digest(make)  # the same one: the same cell, run once more
        if name in OWN and source_digest(OWN[name]) != digest and not replace:
            raise ValueError(
                f"the rotation {name!r} is registered already: choose another name, or pass "
                "replace=True to put this one in its place"
            )
        OWN[name] = make
        return make

    return register


def source_digest(make: Callable) -> str:
    """Twelve hexadecimal digits over a function's source, and over what it calls of its own module.

    The constants that these read there count too. Raises ValueError where the source can't be read.
    """
    seen: dict[str, str] = {}

    def read(function: FunctionType) -> None:
        if function.__name__ in seen:
            return
        try:
            if function.__code__.co_filename == "<string>":  # Python 3.13 finds `python -c`'s there
                raise OSError("no file holds it")
            seen[function.__name__] = dedent(getsource(function))
        except (OSError, TypeError) as error:
            raise ValueError(
                f"the source of {function.__name__} can't be read: define it in a module or in a "
                "notebook's cell"
            ) from error
        for name in _names(function.__code__):
            called = function.__globals__.get(name)
            if isinstance(called, FunctionType) and called.__module__ == function.__module__:
                read(called)
            elif isinstance(called, bool | int | float | str | tuple):
                seen[name] = repr(called)

    if not isinstance(make, FunctionType):
        raise ValueError(f"a rotation is made by a function, not by {make!r}")
    if hasattr(make, "source_digest"):  # it came from another process
        return make.source_digest
    try:
        signature(make).bind(None, seed=0, R3=False, R4=False)
    except TypeError as error:
        raise ValueError(
            f"{make.__name__} must take (model, seed=0, R3=False, R4=False): {error}"
        ) from error
    read(make)
    return sha256("".join(seen[name] for name in sorted(seen)).encode()).hexdigest()[:12]


def _names(code) -> list[str]:
    """The globals that a function's code names, those of the functions inside it too."""
    inner = (constant for constant in code.co_consts if hasattr(constant, "co_names"))
    return [*code.co_names, *(name for part in inner for name in _names(part))]


def read_rotations(path: Path) -> None:
    """Import a file that registers rotations; raises ValueError where it can't be."""
    spec = spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None:
        raise ValueError(f"there is no Python file {path} to register rotations")
    module = module_from_spec(spec)
    sys.modules[path.stem] = module  # where getsource looks for it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path.name} can't be imported: {reason}") from error


def packed() -> bytes:
    """All that is registered, for another process, which need not find the modules."""
    modules = {sys.modules.get(make.__module__) for make in OWN.values()} - {None}
    by_value = [module for module in modules if module.__name__ != "__main__"]
    for module in by_value:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps({name: (make, source_digest(make)) for name, make in OWN.items()})
    finally:
        for module in by_value:
            cloudpickle.unregister_pickle_by_value(module)


def unpack(registered: bytes) -> None:
    """Register what another process has packed."""
    for name, (make, digest) in cloudpickle.loads(registered).items():
        make.source_digest = digest  # its source isn't there to be read
        OWN[name] = make
