"""Compute a recipe: load, rotate, fuse, quantize the weights, round activations, evaluate.

Every result is kept and never computed twice, and so are learned rotations and quantized weights, beside the results. The
order is weights first: activation quantizers are attached to a finished model, so one GPTQ serves every precision of the
activations. The last model stays in memory for the next recipe with the same weights.
"""

import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from rotlib import store
from rotlib.activations import ActivationQuant, check_activations, quantized_activations
from rotlib.fuse import fuse
from rotlib.gptq import gptq
from rotlib.measure import Reference, evaluate
from rotlib.online import check_online
from rotlib.optrot import kurtail, mixed, optrot
from rotlib.quant import QuantizedWeight, check_quantizable, restore, rtn
from rotlib.recipe import FIXED, LEARNED, ON_ACTIVATIONS, ON_WEIGHTS, Recipe
from rotlib.rotation import Rotation, hadamard_rotation, random_rotation
from rotlib.store import Record, Result
from rotlib.text import fingerprint, load_tokens, windows
from rotlib.zoo import load, load_tokenizer, pick_device, resolve


def run(recipe: Recipe, device: str = "auto") -> Result:
    """The recipe's result: read where it is finished, computed and saved where it isn't.

    Raises ValueError for an unknown model or too short a text before any long work.
    """
    return run_all([recipe], device)[0]


def run_all(recipes: Iterable[Recipe], device: str = "auto") -> list[Result]:
    """Every recipe's result, under one progress bar; every model's name is checked before the first run.

    Recipes that share their weights cost least in a row: the last model stays in memory until the next needs other weights.
    """
    recipes = list(recipes)
    if strangers := [recipe for recipe in recipes if not isinstance(recipe, Recipe)]:
        raise ValueError(f"only Recipes can be run, such as rl.Recipe(rotation='optrot'), not {strangers[0]!r}")
    picked = pick_device(device)
    for name in {recipe.model for recipe in recipes}:
        resolve(name)
    latest = _Latest(picked)
    return [
        store.once(recipe.spec(), picked, lambda record, recipe=recipe: _compute(recipe, latest, record))
        for recipe in tqdm(recipes, desc="recipes", unit="run", disable=None if len(recipes) > 1 else True)
    ]


@dataclass
class _Latest:
    """The last model computed, with its weights as its recipe wants them and what making them took, and the last reference."""

    device: torch.device
    key: tuple | None = None
    model: PreTrainedModel | None = None
    record: Record = field(default_factory=Record)
    reference_key: tuple | None = None
    reference: Reference | None = None


def _compute(recipe: Recipe, latest: _Latest, record: Record) -> None:
    key = (recipe.sharing_weights(), recipe.R3)
    reference_key = (recipe.model, recipe.text, recipe.window, recipe.test_windows)
    with record.stage("load"):
        calibration = calibration_tokens(recipe)
        test = windows(_stream(recipe.model, recipe.text, "test"), recipe.window, recipe.test_windows)
        if (latest.key, latest.reference_key) != (key, reference_key):
            latest.key = latest.model = None  # two models are never held at a time
            model, _ = load(recipe.model, str(latest.device))
            check_quantizable(model, recipe.quant)
            check_online(check_activations(model, recipe.activations), recipe.online)
        if latest.reference_key != reference_key:
            latest.reference, latest.reference_key = Reference(model, test), reference_key
    if latest.key != key:
        latest.model, latest.record = model, _prepare(recipe, model, calibration)
        latest.key = key
    record.metrics |= latest.record.metrics
    record.seconds |= latest.record.seconds
    with record.stage("evaluate"), quantized_activations(latest.model, recipe.activations):
        evaluation = evaluate(latest.model, test, latest.reference)
    record.metrics |= {
        "order": recipe.order,
        "perplexity": evaluation.perplexity,
        "kl": evaluation.kl_divergence,
        "kl_windows": [round(kl, 6) for kl in evaluation.kl],
        "reference_perplexity": evaluation.reference_perplexity,
    }
    record.tokens |= {"calibration": fingerprint(calibration), "test": fingerprint(test)}


def _prepare(recipe: Recipe, model: PreTrainedModel, calibration: Tensor) -> Record:
    """Rotate and quantize the original model in place; returns what that took."""
    record = Record()
    rotation, record.seconds["rotate"] = make_rotation(recipe, model)
    with record.stage("fuse"):
        if rotation is not None:
            fuse(model, rotation)
    record.seconds["quantize"] = 0.0
    if recipe.rounding != "none":
        _quantize(recipe, model, calibration, record)
    if rotation is not None and rotation.history:
        record.metrics["objective"] = rotation.history[-1]
        record.metrics["objective_history"] = [round(value, 1) for value in rotation.history[:-1]]
    return record


def _quantize(recipe: Recipe, model: PreTrainedModel, calibration: Tensor, record: Record) -> None:
    """Quantize the fused model's weights, or put back those that an earlier GPTQ of the same weights has kept."""
    if recipe.rounding == "rtn":
        with record.stage("quantize"):
            rtn(model, recipe.quant)
        return

    def compute() -> dict:
        seen = recipe.activations if recipe.order == "activations-first" else ActivationQuant()
        with quantized_activations(model, seen):
            report = gptq(model, calibration, recipe.quant, recipe.act_order, recipe.damping)
        weights = {name: tuple(weight) for name, weight in report.weights.items()}
        return {"weights": weights, "fallbacks": report.fallbacks, "seconds": report.seconds}

    kept, fresh = _kept(recipe.sharing_weights().spec() | {"task": "weights"}, model.device, compute)
    if not fresh:
        restore(model, {name: QuantizedWeight(*parts) for name, parts in kept["weights"].items()})
    record.metrics["fallbacks"] = kept["fallbacks"]
    record.seconds["quantize"] = round(kept["seconds"], 2)


def calibration_tokens(recipe: Recipe) -> Int[Tensor, "windows length"]:
    """The recipe's calibration windows, drawn from the calibration text by its seed."""
    return windows(_stream(recipe.model, recipe.text, "calibration"), recipe.window, recipe.calibration_windows, recipe.seed)


@lru_cache
def _stream(model: str, text: str, split: str) -> Int[Tensor, " n"]:
    return load_tokens(text, load_tokenizer(model), split)


def make_rotation(recipe: Recipe, model: PreTrainedModel) -> tuple[Rotation | None, float]:
    """(the recipe's rotation of this original model, the seconds it took); learned ones are kept beside the results."""
    if recipe.rotation in LEARNED:
        return _learned(recipe, model)
    start = time.perf_counter()
    if recipe.rotation in FIXED:
        draw = {"random": random_rotation, "hadamard": hadamard_rotation}[recipe.rotation]
        rotation = draw(model, recipe.seed, recipe.R3, recipe.R4)
    else:
        rotation = Rotation(None, None, recipe.R3, recipe.R4) if recipe.R3 or recipe.R4 else None
    return rotation, time.perf_counter() - start


def _learned(recipe: Recipe, model: PreTrainedModel) -> tuple[Rotation, float]:
    read = ["model", "rotation", "normalisation", "activation_share", "seed"]
    if recipe.rotation in ON_ACTIVATIONS:
        read += ["text", "window", "calibration_windows"]
    if recipe.rotation in ON_WEIGHTS:
        read += ["R4"]
    spec = {"task": "rotation"} | {name: getattr(recipe, name) for name in read}

    def compute() -> dict:
        start = time.perf_counter()
        online = {"R3": recipe.R3, "R4": recipe.R4}
        if recipe.rotation == "optrot":
            rotation = optrot(model, recipe.seed, normalisation=recipe.normalisation, **online)
        elif recipe.rotation == "kurtail":
            rotation = kurtail(model, calibration_tokens(recipe), recipe.seed, **online)
        else:
            rotation = mixed(model, calibration_tokens(recipe), recipe.activation_share, recipe.seed, **online)
        return {"R1": rotation.R1, "R2": rotation.R2, "history": rotation.history, "seconds": time.perf_counter() - start}

    kept, _ = _kept(spec, model.device, compute)
    return Rotation(kept["R1"], kept["R2"], recipe.R3, recipe.R4, kept["history"]), kept["seconds"]


def _kept(spec: dict, device: torch.device, compute: Callable[[], dict]) -> tuple[dict, bool]:
    """(what `compute` returned, computed just now?), kept in a file beside the results while code, torch and device stay."""
    path = store.local_path(spec, ".pt")
    maker = f"{store.code_fingerprint()} torch {torch.__version__} {device.type}"
    with suppress(Exception):  # no file, or a damaged one: compute anew
        kept = torch.load(path, map_location="cpu")
        if kept["maker"] == maker:
            return kept, False
    kept = compute() | {"maker": maker}
    try:
        store.write_atomically(path, lambda scratch: torch.save(kept, scratch))
    except OSError as error:  # a full disk, say: the run goes on, the next one computes this again
        warnings.warn(f"{path} couldn't be written, so it won't be reused ({error})", stacklevel=2)
    return kept, True
