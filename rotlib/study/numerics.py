"""Which results today's code still stands behind (make numerics).

`numerics.json` holds, for every stage of the computation, the numbers that its canary should give,
the constants behind them and a digest (`canaries/`). A result notes the digests of the entries it
read. It is stale where an entry has changed since: nothing in that depends on how code is written,
on the processor or on Python's version. A run first checks, once a process, that the stages it
reads still compute what their entries say.

A new number or a new constant changes no digest, since nothing was computed with another one; a
changed or dropped one does.
"""

import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from math import inf, isfinite
from pathlib import Path

import torch

from rotlib.models.text import CORPORA, text_content
from rotlib.quantization.activations import ActivationQuant
from rotlib.quantization.fp4 import FP4
from rotlib.study import own
from rotlib.study.files import PINNED, spec_hash
from rotlib.study.recipe import OWN, SHIPPED, THROUGH_NETWORK, Recipe

FILE = Path(__file__).with_name("numerics.json")
FORMAT = 1
_OWN = "rotation "  # before the name of one's own, which is a stage too
TORCH = "2.11 to 2.13"  # what the canaries are tested with

_OPTROT = ("objective", "row sampling", "descent")
_OF_ROTATION = {
    "optrot": _OPTROT,
    "optrot+": (*_OPTROT, "covariance", "optrot+"),
    "kurtail": (*_OPTROT, "token sample"),
    "mixed": (*_OPTROT, "token sample"),
    "spinquant": ("network", "spinquant"),
    "ostquant": ("network", "ostquant", "covariance"),
    "klt": ("ostquant", "covariance"),
}
_OF_TASK = {
    "quantize": ("evaluation",),
    "outliers": ("outliers",),
    "bounds": ("bounds", "covariance", "grids", "gptq"),
    "groups": ("group spread",),
    "slopes": ("slopes",),
    "zero-shot": ("zero-shot",),
    "rotation": (),
    "weights": (),
}


def stages_of(spec: dict) -> list[str]:
    """The stages that a result, a kept rotation or kept weights of this specification read.

    >>> stages_of({"task": "quantize", "rotation": "hadamard", "rounding": "rtn"})
    ['drawn rotations', 'evaluation', 'fusing', 'grids', 'recipe', 'smollm2-135m', 'text', ...]
    """
    task, rotation = spec["task"], spec.get("rotation", "none")

    def setting(name: str) -> object:
        return spec.get(name, getattr(Recipe, name))

    stages = {"recipe", "text", *_OF_TASK[task]}
    stages |= {name for name in (setting("model"), setting("text")) if name in PINNED}
    if rotation != "none":
        # slopes are those of learning's start, and nothing is learned
        learned = ("network",) if task == "slopes" else _OF_ROTATION.get(rotation, ())
        stages |= {"drawn rotations", *learned}
        stages |= {_OWN + rotation} if rotation not in SHIPPED else set()
        stages |= {"fusing"} if task not in ("rotation", "slopes") else set()
    if setting("grouped"):
        stages.add("grouped")
    if setting("R3") or setting("R4"):
        stages.add("online rotations")
    rounded = ActivationQuant(setting("activation_bits"), setting("kv_bits")).rounds
    learned_on = setting("learned_on") if rotation in THROUGH_NETWORK else None
    measured = rounded and task in ("quantize", "zero-shot", "weights")
    if measured or learned_on == "activations":
        stages.add("activations")
    if learned_on == "weights":
        stages.add("grids")
    if {setting("grid"), setting("activation_grid")} & {*FP4}:
        stages.add("4-bit floats")
    if task in ("quantize", "zero-shot", "weights") and setting("rounding") != "none":
        stages |= {"grids"} | ({"tuning"} if setting("tuning") else set())
        if setting("rounding") == "gptq":
            stages |= {"covariance", "gptq"}
            options = {"asymmetry": "gptaq", "scale_search": "scale search"}
            options |= {"descent": "coordinate descent", "refit": "refit", "token_cap": "token cap"}
            options |= {"stream_weighted": "stream sizes", "loss_weighted": "loss slopes"}
            stages |= {stage for name, stage in options.items() if setting(name)}
    return sorted(stages)


@lru_cache
def entries() -> dict[str, dict]:
    """Every stage's committed entry.

    Raises ValueError for a file of another version, or one that `make numerics` didn't write.
    """
    try:
        file = json.loads(FILE.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        file = {"format": FORMAT}
    except OSError as error:
        raise ValueError(f"{FILE} can't be read ({error.strerror}): restore it with git") from error
    if not isinstance(file, dict):
        file = {"format": FORMAT}
    if file.get("format") != FORMAT:
        raise ValueError(
            f"{FILE.name} has the format {file.get('format')!r} and this version of rotlib reads "
            f"{FORMAT}: take both from one commit"
        )
    if file.get("sum") != spec_hash(file.get("stages"), 64):
        raise ValueError(
            f"{FILE.name} was changed by hand: restore it with git, "
            "and let `make numerics` write it"
        )
    return file["stages"]


def digests(stages: Iterable[str]) -> dict[str, str | None]:
    """What a result notes of the stages it reads: their entries' digests.

    A rotation of one's own has that of its source, None while it isn't registered.
    """
    return {stage: _digest_of(stage) for stage in stages}


def _digest_of(stage: str) -> str | None:
    if stage.startswith(_OWN):
        make = OWN.get(stage.removeprefix(_OWN))
        return make and own.source_digest(make)
    return entries()[stage]["digest"]


def unknown(stages: Iterable[str]) -> list[str]:
    """Those of these stages that have no entry."""
    return [stage for stage in stages if not stage.startswith(_OWN) and stage not in entries()]


def changed_since(noted: dict[str, str]) -> list[str]:
    """The stages whose entries aren't those that a result has noted."""
    return [stage for stage, digest in noted.items() if _digest_of(stage) != digest]


def drift(stage: str) -> str | None:
    """What a stage computes otherwise, here and now, than its entry says; None where it doesn't."""
    if stage.startswith(_OWN):
        return None
    return _drift(stage, text_content(stage) if stage in CORPORA else "")


@lru_cache
def _drift(stage: str, content: str) -> str | None:
    """Once for a stage, and for a text that is, by its bytes, this `content`."""
    from rotlib.study.canaries import CANARIES, INPUTS  # it imports every numeric module

    if unknown([stage]):
        return "it has no entry yet"
    entry, found = entries()[stage], (INPUTS | CANARIES)[stage]
    for name, value in entry["constants"].items():
        if (now := found.constants.get(name)) != value:
            return f"{name} is {now}, not {value}"
    numbers = found.numbers()
    for name, value in entry["numbers"].items():
        if distance(numbers.get(name), value) > found.allowed(name):
            return f"{name} is {_short(numbers.get(name))}, not {_short(value)}"
    return None


def forget() -> None:
    """What was read of the file and compared with it so far."""
    entries.cache_clear()
    _drift.cache_clear()


def distance(found: object, expected: object) -> float:
    """How far numbers are from those expected, in units of their largest magnitude.

    It is 0 for equal things of any kind, infinite for other things that differ.
    """
    if found == expected:
        return 0.0
    if isinstance(found, dict) and isinstance(expected, dict) and found.keys() == expected.keys():
        return max(distance(found[name], value) for name, value in expected.items())
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        flat, wanted = list(_flat(found)), list(_flat(expected))
    elif isinstance(expected, float):
        flat, wanted = [found], [expected]
    else:
        return inf
    if len(flat) != len(wanted) or not all(isinstance(x, float | int) for x in flat + wanted):
        return inf
    largest = max(map(abs, wanted), default=0.0)
    worst = max(abs(x - y) for x, y in zip(flat, wanted, strict=True))
    return worst / largest if largest and isfinite(worst) else inf


def _flat(values: list) -> Iterator:
    for value in values:
        yield from _flat(value) if isinstance(value, list) else (value,)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check(stages: Iterable[str]) -> None:
    """Raises ValueError, naming the stage, where the code computes something else than it says."""
    for stage in stages:
        if what := drift(stage):
            if stage == "wikipedia-mini":
                raise ValueError(
                    f"the text {stage} is another one here than the study's: look at the folder "
                    "that ROTLIB_DATA names, or at the installed gensim"
                )
            raise ValueError(
                f"the stage {stage!r} computes something else here than {FILE.name} says: {what}. "
                "If the code was meant to change, run `make numerics`, which says what that makes "
                f"stale; if not, this torch ({torch.__version__}) or processor computes otherwise: "
                f"rotlib is tested with torch {TORCH}"
            )
