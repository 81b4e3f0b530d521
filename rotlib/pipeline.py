"""Compute a recipe: load, rotate, fuse, quantize the weights, round activations, evaluate.

Every result is kept and never computed twice, and so are learned rotations and quantized weights, beside the results. The
order is weights first: activation quantizers are attached to a finished model, so one GPTQ serves every precision of the
activations. The last model stays in memory for the next recipe with the same weights.
"""

import time
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
from rotlib.optrot import kurtail, mixed, optrot
from rotlib.quant import QuantizedWeight, check_quantizable, restore, rtn
from rotlib.recipe import FIXED, LEARNED, ON_ACTIVATIONS, Recipe
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
    """The last model computed, with its weights as its recipe wants them, and what making them took."""

    device: torch.device
    key: tuple | None = None
    model: PreTrainedModel | None = None
    record: Record = field(default_factory=Record)


def _compute(recipe: Recipe, latest: _Latest, record: Record) -> None:
    key = (recipe.sharing_weights(), recipe.R3)
    with record.stage("load"):
        calibration = calibration_tokens(recipe)
        if latest.key != key:
            latest.key = latest.model = None  # two models are never held at a time
            model, _ = load(recipe.model, str(latest.device))
            check_quantizable(model, recipe.quant)
            check_activations(model, recipe.activations)
        reference = _reference(recipe.model, recipe.text, recipe.window, recipe.test_windows, latest.device)
    if latest.key != key:
        latest.model, latest.record = model, _prepare(recipe, model, calibration)
        latest.key = key
    record.metrics |= latest.record.metrics
    record.seconds |= latest.record.seconds
    with record.stage("evaluate"), quantized_activations(latest.model, recipe.activations):
        evaluation = evaluate(latest.model, reference.windows, reference)
    record.metrics |= {
        "order": recipe.order,
        "perplexity": evaluation.perplexity,
        "kl": evaluation.kl_divergence,
        "kl_windows": [round(kl, 6) for kl in evaluation.kl],
        "reference_perplexity": evaluation.reference_perplexity,
    }
    record.tokens |= {"calibration": fingerprint(calibration), "test": fingerprint(reference.windows)}


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
    """Quantize the fused model's weights, or put back those that an earlier run with the same weights has kept."""
    shared = recipe.sharing_weights()

    def compute() -> dict:
        start = time.perf_counter()
        seen = recipe.activations if recipe.order == "activations-first" else ActivationQuant()
        with quantized_activations(model, seen):
            if recipe.rounding == "rtn":
                weights, metrics = rtn(model, recipe.quant), {}
            else:
                report = gptq(model, calibration, recipe.quant, recipe.act_order, recipe.damping)
                weights, metrics = report.weights, {"fallbacks": report.fallbacks}
        return {"weights": {name: tuple(w) for name, w in weights.items()}, "metrics": metrics, "seconds": time.perf_counter() - start}

    kept, fresh = _kept(shared.spec() | {"task": "weights"}, compute)
    if not fresh:
        restore(model, {name: QuantizedWeight(*parts) for name, parts in kept["weights"].items()})
    record.metrics |= kept["metrics"]
    record.seconds["quantize"] = round(kept["seconds"], 2)


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
    read = ["model", "rotation", "normalisation", "activation_share", "R4", "seed"]
    if recipe.rotation in ON_ACTIVATIONS:
        read += ["text", "window", "calibration_windows"]
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

    kept, _ = _kept(spec, compute)
    return Rotation(kept["R1"], kept["R2"], recipe.R3, recipe.R4, kept["history"]), kept["seconds"]


def _kept(spec: dict, compute: Callable[[], dict]) -> tuple[dict, bool]:
    """(what `compute` returned, computed just now?), kept in a file beside the results for as long as the code stays."""
    path = store.local_path(spec, ".pt")
    code = store.code_fingerprint()
    with suppress(Exception):  # no file, or a damaged one: compute anew
        kept = torch.load(path)
        if kept["code"] == code:
            return kept, False
    kept = compute() | {"code": code}
    store.write_atomically(path, lambda scratch: torch.save(kept, scratch))
    return kept, True
