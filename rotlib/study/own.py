"""Rotations of one's own: known by their source, and taken along to a sweep's workers."""

import sys
import tokenize
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from inspect import getsource, signature
from io import StringIO
from pathlib import Path
from textwrap import dedent
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType

import cloudpickle
from torch import Tensor

from rotlib.checks import yes_or_no
from rotlib.rotations.rotation import Rotation
from rotlib.study.recipe import OWN, SHIPPED

_PLAIN = (bool, int, float, complex, str, bytes)


def register_rotation(name: str, replace: bool = False) -> Callable:
    """Let recipes, sweeps, tables and figures know a rotation of one's own by a name.

    The function takes a model, a seed and whether R3 and R4 are on, and returns a Rotation. It may
    stand in a notebook or a module; a sweep file names the module's file under `rotations`. Its
    results carry a digest of its source, so that they are stale once it changes; what it reads from
    files or from other modules isn't seen. Raises ValueError for a name that is taken, unless it is
    one's own to `replace`.

    >>> @register_rotation("reversed")
    ... def reversed_rotation(model, seed=0, R3=False, R4=False):
    ...     return Rotation(torch.eye(model.config.hidden_size).flip(0), None, R3, R4)
    >>> "reversed" in OWN
    True
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"a rotation's name is a word such as 'cosine', not {name!r}")
    yes_or_no("replace", replace)
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
        make.registered_file = _file_of(make)
        return make

    return register


def _file_of(make: FunctionType) -> str:
    """The whole module's file, comments apart, as it is when the function is registered."""
    file = getattr(sys.modules.get(make.__module__), "__file__", None)
    if not file or not Path(file).is_file():
        return ""
    return _without_comments(Path(file).read_text(encoding="utf-8"))


def _without_comments(text: str) -> str:
    """Python as it is written, without comments and empty lines."""
    lines = text.splitlines()
    with suppress(tokenize.TokenError, SyntaxError):  # a piece of a line, such as a lambda
        for token in tokenize.generate_tokens(StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def source_digest(make: Callable) -> str:
    """Twelve hexadecimal digits over the file of a function's module, and over what it reads there.

    In a notebook, which is no file, over the source of the function, and of what it calls of its
    own. The values that these read count too, those of the functions around them, and defaults.
    Raises ValueError where a source can't be read, or where a value can't be told by its bytes.
    """
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
    file = make.registered_file if hasattr(make, "registered_file") else _file_of(make)
    notes = _Notes(make.__module__, whole=bool(file))
    notes.read(make, make.__name__)
    return sha256("\n".join([file, *notes.lines]).encode()).hexdigest()[:12]


class _Notes:
    """What a function does, told line by line: sources of its own module, and values.

    Of a module whose `whole` file counts no source is noted again.
    """

    def __init__(self, module: str, whole: bool):
        self.lines: list[str] = []
        self._module, self._whole = module, whole
        self._seen: dict[int, tuple[str, object]] = {}  # held, so that no other takes its id

    def read(self, thing: object, name: str) -> None:
        """Note a thing by its name, and all that has to be read to know what it does."""
        if thing is None or isinstance(thing, ModuleType | BuiltinFunctionType):
            return
        if isinstance(thing, _PLAIN):
            self.lines.append(f"{name} {thing!r}")
            return
        if id(thing) in self._seen:
            self.lines.append(f"{name} is {self._seen[id(thing)][0]}")
            return
        self._seen[id(thing)] = name, thing
        code = isinstance(thing, FunctionType | type)
        if code and thing.__module__ != self._module:
            return
        try:
            parts = list(self._parts(thing))
            told = "" if parts or code else _told(thing)
        except Exception as error:  # whatever its class raises
            raise ValueError(
                f"the rotation's function reads {name}, a {type(thing).__name__}, whose value "
                "can't be told by its bytes: make it inside the function"
            ) from error
        if code and not self._whole:
            told = _source(thing)
        self.lines.append(f"{name} {type(thing).__name__} {told}")
        for part, value in parts:
            self.read(value, f"{name}.{part}")

    def _parts(self, thing: object) -> Iterator[tuple[str, object]]:
        """(name, value) of what else has to be read."""
        if wrapped := getattr(thing, "__wrapped__", None):  # behind a decorator, or a cache
            yield "__wrapped__", wrapped
        if isinstance(thing, FunctionType):
            yield from ((one, thing.__globals__.get(one)) for one in _names(thing.__code__))
            yield from ((one, cell.cell_contents) for one, cell in _cells(thing))
            yield from ((f"default {one}", value) for one, value in enumerate(_defaults(thing)))
            yield "registry", vars(thing).get("registry")  # singledispatch's implementations
        elif isinstance(thing, type):
            yield from ((base.__name__, base) for base in thing.__bases__)
            for one, value in vars(thing).items():
                value = getattr(value, "fget", getattr(value, "__func__", value))
                if isinstance(value, FunctionType):
                    yield one, value
        elif isinstance(thing, MethodType):
            yield "function", thing.__func__
            if self._is_own(thing.__self__):
                yield "self", thing.__self__
        elif isinstance(thing, partial):
            yield from (("function", thing.func), ("given", thing.args), ("named", thing.keywords))
        elif isinstance(thing, Mapping | list | tuple):
            if self._is_own(thing):
                yield "class", type(thing)
            items = thing.items() if isinstance(thing, Mapping) else enumerate(thing)
            yield from ((str(one), value) for one, value in items)
        elif self._is_own(thing):  # by what a copy would be made of
            _, made_of, *state = thing.__reduce_ex__(2)
            yield from [("class", type(thing)), ("made of", made_of), ("state", state)]

    def _is_own(self, thing: object) -> bool:
        """Whether a thing's class is of this module."""
        return type(thing).__module__ == self._module and not isinstance(thing, Tensor)


def _told(value: object) -> str:
    """A value by its content: the same in every process."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, tuple):
        return str([_told(one) for one in value])
    if isinstance(value, set | frozenset):
        return str(sorted(map(_told, value)))
    if isinstance(value, Tensor):  # whose pickle names its place in memory
        return f"{value.dtype} {value.tolist()}"
    return sha256(cloudpickle.dumps(value)).hexdigest()


def _source(thing: FunctionType | type) -> str:
    try:
        code = getattr(thing, "__code__", None)
        if code and code.co_filename == "<string>":  # Python 3.13 finds `python -c`'s there
            raise OSError("no file holds it")
        return _without_comments(dedent(getsource(thing)))
    except (OSError, TypeError) as error:
        raise ValueError(
            f"the source of {thing.__name__} can't be read: define it in a module or in a "
            "notebook's cell"
        ) from error


def _cells(function: FunctionType) -> list[tuple[str, object]]:
    """The variables of functions around it that it reads; one may not be set yet."""
    both = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return [(name, cell) for name, cell in both if cell != CellType()]


def _defaults(function: FunctionType) -> list[object]:
    return [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _names(code) -> list[str]:
    """The globals that a function's code names, those of the functions inside it too."""
    inner = (constant for constant in code.co_consts if hasattr(constant, "co_names"))
    return [*code.co_names, *(name for part in inner for name in _names(part))]


def read_rotations(path: Path) -> None:
    """Import a file that registers rotations; raises ValueError where it can't, or has none."""
    name = f"rotlib_rotations_{path.stem}"  # of its own: a file may be called torch.py
    spec = spec_from_file_location(name, path)
    if not path.is_file() or spec is None:
        raise ValueError(f"there is no Python file {path} to register rotations")
    module = module_from_spec(spec)
    sys.modules[name] = module  # where getsource looks for it
    before = dict(OWN)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, SystemExit):
            reason = "it ends the process"
        raise ValueError(f"{path.name} can't be imported: {reason}") from error
    if all(before.get(own) is make for own, make in OWN.items()):
        raise ValueError(
            f"{path.name} registers no rotation: put @rl.register_rotation(NAME) before a function"
        )


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
