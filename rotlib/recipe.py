"""A recipe says what one run does; running it gives one result, kept and never computed twice.

original model → rotation (none, random, hadamard, optrot) → rounding (RTN or GPTQ) → perplexity and KL divergence from
the original. A recipe is a dataclass whose defaults are the study's protocol; only what differs from them is its name,
its hash and what is stored.
"""

import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from rotlib import store
from rotlib.checks import one_of, positive, whole_number, yes_or_no
from rotlib.fuse import fuse
from rotlib.gptq import gptq
from rotlib.measure import Reference, evaluate
from rotlib.optrot import NORMALISATIONS, optrot
from rotlib.quant import WeightQuant, check_quantizable, rtn
from rotlib.rotation import Rotation, hadamard_rotation, random_rotation
from rotlib.store import Record, Result
from rotlib.text import check_text, fingerprint, load_tokens, windows
from rotlib.zoo import load, load_tokenizer, pick_device, resolve

FIXED_ROTATIONS = {"random": random_rotation, "hadamard": hadamard_rotation}
ROTATIONS = ("none", *FIXED_ROTATIONS, "optrot")
ROUNDINGS = ("rtn", "gptq")


@dataclass(frozen=True)
class Recipe:
    """One run; raises ValueError at construction for a value outside the choices."""

    model: str = "smollm2-135m"
    text: str = "wikipedia-mini"
    rotation: str = "none"
    normalisation: str = "plain"
    rounding: str = "gptq"
    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True
    convention: str = "half"
    clip_search: bool = True
    act_order: bool = False
    damping: float = 0.01
    window: int = 1024
    calibration_windows: int = 16
    test_windows: int = 8
    seed: int = 0

    def __post_init__(self):
        if not isinstance(self.model, str):
            raise ValueError(f"a model is named by a string, not {self.model!r}")
        choices = {"rotation": ROTATIONS, "rounding": ROUNDINGS, "normalisation": NORMALISATIONS}
        for name, allowed in choices.items():
            one_of(name, getattr(self, name), allowed)
        for name, least in {"window": 2, "calibration_windows": 1, "test_windows": 1, "seed": 0}.items():
            whole_number(name, getattr(self, name), least)
        positive("damping", self.damping)
        yes_or_no("act_order", self.act_order)
        check_text(self.text)
        if self.act_order and self.rounding != "gptq":
            raise ValueError("act_order orders GPTQ's columns: rounding to nearest has no use for it")
        if self.normalisation != "plain" and self.rotation != "optrot":
            raise ValueError(f"normalisation belongs to the rotation 'optrot', not to {self.rotation!r}")
        self.quant  # noqa: B018 - checks bits, group_size and convention

    @property
    def quant(self) -> WeightQuant:
        """The weight grid this recipe asks for."""
        return WeightQuant(**{f.name: getattr(self, f.name) for f in fields(WeightQuant)})

    def spec(self) -> dict:
        """What differs from the defaults; with `task`, this is the recipe's name in the store."""
        default = {f.name: f.default for f in fields(self)}
        return {"task": "quantize"} | {name: value for name, value in asdict(self).items() if value != default[name]}


def run(recipe: Recipe, device: str = "auto") -> Result:
    """The recipe's result: read where it is finished, computed and saved where it isn't.

    Raises ValueError for an unknown model or too short a text before any long work.
    """
    picked = pick_device(device)
    return store.once(recipe.spec(), picked, lambda record: _compute(recipe, picked, record))


def run_all(recipes: Iterable[Recipe], device: str = "auto") -> list[Result]:
    """Every recipe's result, under one progress bar; every model's name is checked before the first run."""
    recipes = list(recipes)
    for name in {recipe.model for recipe in recipes}:
        resolve(name)
    return [run(recipe, device) for recipe in tqdm(recipes, desc="recipes", unit="run")]


def _compute(recipe: Recipe, device: torch.device, record: Record) -> None:
    with record.stage("load"):
        calibration = calibration_tokens(recipe)
        model, _ = load(recipe.model, str(device))
        check_quantizable(model, recipe.quant)
        reference = _reference(recipe.model, recipe.text, recipe.window, recipe.test_windows, device)
    rotation, record.seconds["rotate"] = make_rotation(recipe, model)
    with record.stage("fuse"):
        if rotation is not None:
            fuse(model, rotation)
    with record.stage("quantize"):
        if recipe.rounding == "rtn":
            rtn(model, recipe.quant)
        else:
            report = gptq(model, calibration, recipe.quant, recipe.act_order, recipe.damping)
            record.metrics["fallbacks"] = report.fallbacks
    with record.stage("evaluate"):
        evaluation = evaluate(model, reference.windows, reference)
    record.metrics |= {
        "perplexity": evaluation.perplexity,
        "kl": evaluation.kl_divergence,
        "kl_windows": [round(kl, 6) for kl in evaluation.kl],
        "reference_perplexity": evaluation.reference_perplexity,
    }
    if rotation is not None and rotation.history:
        record.metrics["objective"] = rotation.history[-1]
        record.metrics["objective_history"] = [round(value, 1) for value in rotation.history[:-1]]
    record.tokens |= {"calibration": fingerprint(calibration), "test": fingerprint(reference.windows)}


def calibration_tokens(recipe: Recipe) -> Int[Tensor, "windows length"]:
    """The recipe's calibration windows, drawn from the calibration text by its seed."""
    return windows(_stream(recipe.model, recipe.text, "calibration"), recipe.window, recipe.calibration_windows, recipe.seed)


@lru_cache
def _stream(model: str, text: str, split: str) -> Int[Tensor, " n"]:
    return load_tokens(text, load_tokenizer(model), split)


@lru_cache(maxsize=1)
def _reference(model: str, text: str, window: int, count: int, device: torch.device) -> Reference:
    return Reference(load(model, str(device))[0], windows(_stream(model, text, "test"), window, count))


def make_rotation(recipe: Recipe, model: PreTrainedModel) -> tuple[Rotation | None, float]:
    """(the recipe's rotation of this original model, the seconds it took); learned ones are kept beside the results."""
    if recipe.rotation == "none":
        return None, 0.0
    start = time.perf_counter()
    if recipe.rotation in FIXED_ROTATIONS:
        return FIXED_ROTATIONS[recipe.rotation](model, recipe.seed), time.perf_counter() - start
    learned = ("model", "rotation", "normalisation", "seed")
    path = store.local_path({"task": "rotation"} | {name: getattr(recipe, name) for name in learned}, ".pt")
    code = store.code_fingerprint()
    with suppress(Exception):  # no file, or a damaged one: learn anew
        kept = torch.load(path)
        if kept["code"] == code:
            return Rotation(kept["R1"], kept["R2"], kept["history"]), kept["seconds"]
    rotation = optrot(model, recipe.seed, normalisation=recipe.normalisation)
    seconds = time.perf_counter() - start
    kept = vars(rotation) | {"seconds": seconds, "code": code}
    store.write_atomically(path, lambda scratch: torch.save(kept, scratch))
    return rotation, seconds
