"""Compute a recipe: load, rotate, fuse, quantize the weights, round activations, evaluate.

Every result is kept and never computed twice, and so are learned rotations and quantized weights,
beside the results. The order is weights first: activation quantizers are attached to a finished
model, so one GPTQ serves every precision of the activations. The last model stays in memory for the
next recipe with the same weights.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rotlib.checks import yes_or_no
from rotlib.disk import write_atomically
from rotlib.learning.network import LearningFailed
from rotlib.learning.optrot import kurtail, mixed, optrot
from rotlib.learning.optrot_plus import optrot_plus
from rotlib.learning.ostquant import klt_rotation, ostquant
from rotlib.learning.spinquant import spinquant
from rotlib.learning.tuning import HELD_OUT, check_tunable, set_gains, tune
from rotlib.measure.fidelity import evaluate
from rotlib.models.content import weights_sample
from rotlib.models.names import resolve
from rotlib.models.reference import Reference
from rotlib.models.sound import check_surroundings
from rotlib.models.supported import adapt
from rotlib.models.text import fingerprint, load_tokens, windows
from rotlib.models.zoo import load_tokenizer, pick_device
from rotlib.quantization.activations import (
    ActivationQuant,
    check_activations,
    quantized_activations,
)
from rotlib.quantization.gptq import gptq
from rotlib.quantization.quantized import check_quantizable, restore, rtn
from rotlib.rotations.drawn import DRAWN, gsr_rotation
from rotlib.rotations.fuse import fuse
from rotlib.rotations.online import check_online, load
from rotlib.rotations.rotation import Rotation
from rotlib.study import memory, numerics, store
from rotlib.study.files import content_of
from rotlib.study.kept import Kept, KeptLayers, KeptSteps, packed, unpacked
from rotlib.study.recipe import LEARNED, OWN, Recipe, check_recipe
from rotlib.study.store import DIVERGED, Record, Result
from rotlib.study.suits import check_suits


def run(recipe: Recipe, device: str = "auto") -> Result:
    """The recipe's result: read where it is finished, computed and saved where it isn't.

    Raises ValueError for an unknown model, one that needs more memory than there is, or too short a
    text, before any long work.

    >>> recipe = Recipe(model=tiny, rotation="random", rounding="rtn", window=32, test_windows=2)
    >>> run(recipe).metrics["kl"] > 0
    True
    """
    return run_all([recipe], device)[0]


def run_all(recipes: Iterable[Recipe], device: str = "auto", run: bool = True) -> list[Result]:
    """Every recipe's result, under one progress bar.

    Models' names are checked before the first run. Recipes that share their weights cost least in a
    row: the last model stays in memory until the next needs other weights. Without `run` nothing is
    computed, and the results are those that there are, here or in results/study. Raises like `run`.

    >>> from dataclasses import replace
    >>> recipe = Recipe(model=tiny, window=32, calibration_windows=2, test_windows=2)
    >>> [result.stale for result in run_all([recipe, replace(recipe, rotation="hadamard")])]
    [False, False]
    """
    if not isinstance(recipes, Iterable):
        raise ValueError(f"run_all takes a list of Recipes, not a {type(recipes).__name__}")
    recipes = list(recipes)
    if strangers := [recipe for recipe in recipes if not isinstance(recipe, Recipe)]:
        raise ValueError(
            f"only Recipes can be run, such as rl.Recipe(rotation='optrot'), not {strangers[0]!r}"
        )
    yes_or_no("run", run)
    if not run:
        return [store.known(recipe.spec()) for recipe in recipes]
    check_surroundings()
    picked = pick_device(device)
    for name in {recipe.model for recipe in recipes}:
        resolve(name)
    for recipe in recipes:
        if store.find(recipe.spec()) is None:
            check_suits(recipe)
            memory.check_fits(recipe, picked)
    latest = _Latest(picked)
    results = []
    hidden = None if len(recipes) > 1 else True
    for recipe in tqdm(recipes, desc="recipes", unit="run", disable=hidden):
        compute = partial(_compute, recipe, latest)
        results.append(store.once(recipe.spec(), picked, compute))
    return results


def build(recipe: Recipe, device: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(the recipe's model, its weights rotated and quantized, and its tokenizer), to use otherwise.

    Kept rotations and weights are used again. Activations are rounded where it runs inside
    `quantized_activations(model, recipe.activations)`. Raises like `run`.

    >>> model, tokenizer = build(Recipe(model=tiny, rounding="rtn", window=32))
    >>> model.config.rotlib_quantized
    True
    """
    check_recipe("build", recipe)
    check_surroundings()
    numerics.check(numerics.stages_of(recipe.spec()))
    memory.check_fits(recipe, pick_device(device))
    calibration = calibration_tokens(recipe)
    model, tokenizer = load(recipe.model, str(pick_device(device)))
    _check(recipe, model)
    _prepare(recipe, model, calibration)
    return model, tokenizer


@dataclass
class _Latest:
    """The last model, its weights as its recipe wants them, what that took; the last reference."""

    device: torch.device
    key: tuple | None = None
    model: PreTrainedModel | None = None
    record: Record = field(default_factory=Record)
    reference_key: tuple | None = None
    reference: Reference | None = None


def _compute(recipe: Recipe, latest: _Latest, record: Record) -> None:
    content = tuple(content_of(recipe.spec()).items())
    key = (recipe.sharing_weights(), recipe.R3, content)
    reference_key = (recipe.model, recipe.text, recipe.window, recipe.test_windows, content)
    with record.timed("load"):
        calibration = calibration_tokens(recipe)
        test = test_tokens(recipe)
        if (latest.key, latest.reference_key) != (key, reference_key):
            latest.key = latest.model = None  # two models are never held at a time
            model, _ = load(recipe.model, str(latest.device))
            _check(recipe, model)
        if latest.reference_key != reference_key:
            latest.reference, latest.reference_key = Reference(model, test), reference_key
    if latest.key != key:
        latest.model, latest.record = model, _prepare(recipe, model, calibration)
        latest.key = key
    record.model_commit = getattr(latest.model.config, "_commit_hash", None)
    record.weights = weights_sample(latest.model)
    record.metrics |= latest.record.metrics
    record.seconds |= latest.record.seconds
    with record.timed("evaluate"), quantized_activations(latest.model, recipe.activations):
        evaluation = evaluate(latest.model, test, latest.reference)
    record.metrics |= {
        "order": recipe.order,
        "perplexity": evaluation.perplexity,
        "kl": evaluation.kl_divergence,
        "kl_windows": [float(f"{kl:.6g}") for kl in evaluation.kl],
        "reference_perplexity": evaluation.reference_perplexity,
    }
    if not evaluation.perplexity < DIVERGED:
        record.metrics["diverged"] = True
    record.tokens |= {"calibration": fingerprint(calibration), "test": fingerprint(test)}


def _check(recipe: Recipe, model: PreTrainedModel) -> None:
    """Raises ValueError for what this model can't do, before any of it is done."""
    family = adapt(model)
    check_quantizable(family, recipe.quant)
    check_activations(family, recipe.activations)
    check_online(family, recipe.online)
    if recipe.tuning:
        check_tunable(family)
        tuning_tokens(recipe)  # is the text long enough?


def _prepare(recipe: Recipe, model: PreTrainedModel, calibration: Tensor) -> Record:
    """Rotate and quantize the original model in place; returns what that took."""
    record = Record()
    rotation = rotation_of(recipe, model, record)
    how = _weights_of(recipe, model, rotation)
    tuned = Kept(*how) if recipe.tuning else None
    done = tuned and tuned.read()
    if tuned and done is None:
        with record.timed("tune"):
            reference = Reference(model, tuning_tokens(recipe))
    with record.timed("fuse"):
        if rotation is not None:
            fuse(model, rotation)
    record.seconds["quantize"] = 0.0
    if done is not None:
        restore(model, unpacked(done["weights"]), recipe.quant)
        set_gains(model, done["gains"])
        KeptSteps(*how).clear()
        record.metrics |= done["metrics"]
        record.seconds |= done["seconds"]
    elif recipe.rounding != "none":
        _quantize(recipe, model, rotation, calibration, record)
        if tuned:
            _tune(recipe, model, reference, how, record)
    return record


def _tune(
    recipe: Recipe,
    model: PreTrainedModel,
    reference: Reference,
    how: tuple[dict, torch.device, str],
    record: Record,
) -> None:
    """Tune the quantized model to the original's reference, and keep what that gave."""
    steps = KeptSteps(*how)
    tuning = tune(model, reference, steps=recipe.tuning, kept=steps)
    record.seconds["tune"] = round(record.seconds["tune"] + tuning.seconds, 2)
    looks = {str(step): round(kl, 6) for step, kl in tuning.held_out.items()}
    record.metrics |= {"tuning_held_out": looks, "tuning_step": tuning.step}
    made_by = ("fallbacks", "tuning_held_out", "tuning_step")
    done = {
        "weights": packed(tuning.weights),
        "gains": tuning.gains,
        "metrics": {name: record.metrics[name] for name in made_by if name in record.metrics},
        "seconds": {name: record.seconds[name] for name in ("quantize", "tune")},
    }
    if Kept(*how).write(done):
        steps.clear()


def _quantize(
    recipe: Recipe,
    model: PreTrainedModel,
    rotation: Rotation | None,
    calibration: Tensor,
    record: Record,
) -> None:
    """Quantize the fused model, or put back what an earlier GPTQ kept under this very rotation."""
    if recipe.rounding == "rtn":
        with record.timed("quantize"):
            rtn(model, recipe.quant)
        return
    how = _weights_of(replace(recipe, tuning=0), model, rotation)
    whole, layers = Kept(*how), KeptLayers(*how)
    if done := whole.read():
        restore(model, unpacked(done["weights"]), recipe.quant)
        layers.clear()
    else:
        seen = recipe.activations if recipe.order == "activations-first" else ActivationQuant()
        with quantized_activations(model, seen):
            report = gptq(model, calibration, recipe.quant, **recipe.gptq_settings, kept=layers)
        done = {
            "weights": packed(report.weights),
            "fallbacks": report.fallbacks,
            "seconds": report.seconds,
        }
        if whole.write(done):
            layers.clear()
    record.metrics["fallbacks"] = done["fallbacks"]
    record.seconds["quantize"] = round(done["seconds"], 2)


def _weights_of(
    recipe: Recipe, model: PreTrainedModel, rotation: Rotation | None
) -> tuple[dict, torch.device, str]:
    """What a recipe's kept weights are named by."""
    spec = recipe.sharing_weights().spec() | {"task": "weights"}
    return spec, adapt(model).device, rotation.digest() if rotation else ""


def calibration_tokens(recipe: Recipe) -> Int[Tensor, "windows length"]:
    """The recipe's calibration windows, drawn from the calibration text by its seed."""
    return _drawn_windows(recipe, recipe.calibration_windows)


def tuning_tokens(recipe: Recipe) -> Int[Tensor, "windows length"]:
    """The windows that scales are tuned on and those held out: behind the calibration's."""
    first = recipe.calibration_windows
    return _drawn_windows(recipe, first + recipe.tuning + HELD_OUT)[first:]


def test_tokens(recipe: Recipe) -> Int[Tensor, "windows length"]:
    """The recipe's test windows: the first ones of the test text."""
    return windows(_stream(recipe, "test"), recipe.window, recipe.test_windows)


def learning_tokens(recipe: Recipe) -> Int[Tensor, "windows length"]:
    """The windows that a rotation is learned on, drawn from that text by the same seed."""
    return _drawn_windows(recipe, recipe.learning_windows)


def _drawn_windows(recipe: Recipe, count: int) -> Int[Tensor, "windows length"]:
    return windows(_stream(recipe, "calibration"), recipe.window, count, recipe.seed)


def _stream(recipe: Recipe, split: str) -> Int[Tensor, " n"]:
    content = tuple(content_of(recipe.spec()).items())
    return _tokenized(recipe.model, recipe.text, split, content)


@lru_cache
def _tokenized(model: str, text: str, split: str, content: tuple) -> Int[Tensor, " n"]:
    """Once for a model and a text that are, by their bytes, this `content`."""
    return load_tokens(text, load_tokenizer(model), split)


def make_rotation(recipe: Recipe, model: PreTrainedModel) -> tuple[Rotation | None, float]:
    """(the recipe's rotation of this original model, the seconds it took).

    Learned ones are kept beside the results.

    >>> rotation, seconds = make_rotation(Recipe(model=tiny, rotation="hadamard"), model)
    >>> seconds >= 0
    True
    """
    check_recipe("make_rotation", recipe)
    record = Record()
    return rotation_of(recipe, model, record), record.seconds["rotate"]


def rotation_of(recipe: Recipe, model: PreTrainedModel, record: Record) -> Rotation | None:
    """The recipe's rotation, as `make_rotation` has it; what it took goes into the record."""
    if recipe.rotation in LEARNED:
        return _learned(recipe, model, record)
    with record.timed("rotate"):
        if recipe.rotation == "none":
            return Rotation(None, None, recipe.R3, recipe.R4) if recipe.R3 or recipe.R4 else None
        if recipe.rotation == "klt":
            how = {"seed": recipe.seed, "R3": recipe.R3, "R4": recipe.R4}
            return klt_rotation(model, learning_tokens(recipe), **how)
        return _drawn(recipe.rotation, recipe, model)


def _drawn(name: str, recipe: Recipe, model: PreTrainedModel) -> Rotation:
    """The recipe's rotation where it is drawn, or where its learning starts."""
    how = {"seed": recipe.seed, "R3": recipe.R3, "R4": recipe.R4}
    if name == "gsr":
        return gsr_rotation(model, recipe.R1_order, recipe.block, recipe.signs, **how)
    if name in DRAWN:
        return DRAWN[name](model, **how)
    before = weights_sample(model)
    rotation = OWN[name](model, **how)
    if not isinstance(rotation, Rotation):
        raise ValueError(f"the rotation {name!r} made a {type(rotation).__name__}, not a Rotation")
    if (rotation.R3, rotation.R4) != (recipe.R3, recipe.R4):
        raise ValueError(
            f"the rotation {name!r} was made with R3={rotation.R3} and R4={rotation.R4}, and asked "
            f"for with R3={recipe.R3} and R4={recipe.R4}: let its function hand them on"
        )
    if weights_sample(model) != before or model.training:
        raise ValueError(f"the rotation {name!r} has changed the model that it was made for")
    return rotation


def _learned(recipe: Recipe, model: PreTrainedModel, record: Record) -> Rotation:
    spec = {"task": "rotation"} | recipe.rotation_reads
    kept = Kept(spec, adapt(model).device, weights_sample(model))
    done = kept.read()
    if done is None:
        start = time.perf_counter()
        try:
            rotation, tokens = _learn(recipe, model)
        except LearningFailed as error:
            if error.rotation is not None:
                path = kept.path.with_suffix(".last-good.pt")
                good = _parts(error.rotation)
                write_atomically(path, lambda scratch: torch.save(good, scratch))
                error.add_note(f"the last good rotation is kept in {path}")
            raise
        seconds, memory_mb = time.perf_counter() - start, store.peak_memory_mb(adapt(model).device)
        done = {
            "rotation": _parts(rotation),
            "seconds": seconds,
            "memory_mb": memory_mb,
            "tokens": tokens,
        }
        kept.write(done)
    rotation = Rotation(**done["rotation"], R3=recipe.R3, R4=recipe.R4)
    record.seconds["rotate"] = round(done["seconds"], 2)
    record.metrics |= {
        "objective": rotation.history[-1],
        "objective_history": [float(f"{value:.6g}") for value in rotation.history[:-1]],
        "learning_memory_mb": done["memory_mb"],
        "learning_tokens": done["tokens"],
    }
    return rotation


def _parts(rotation: Rotation) -> dict:
    """What a file keeps of a rotation: all but R3 and R4, which the recipe says."""
    return {name: getattr(rotation, name) for name in ("R1", "R2", "history", "scales")}


def _learn(recipe: Recipe, model: PreTrainedModel) -> tuple[Rotation, int]:
    """(the rotation, how many tokens of text it was learned on)"""
    how = {"seed": recipe.seed, "R3": recipe.R3, "R4": recipe.R4}
    start = {"local": recipe.local}
    if recipe.start == "gsr":
        start["start"] = _drawn("gsr", recipe, model)
    if recipe.rotation == "optrot":
        how["group_size"] = recipe.quant.group_size if recipe.grouped else None
        return optrot(model, steps=recipe.steps, **start, **how), 0
    if recipe.rotation == "kurtail":
        tokens = calibration_tokens(recipe)
        return kurtail(model, tokens, **how), tokens.numel()
    if recipe.rotation == "mixed":
        tokens = calibration_tokens(recipe)
        return mixed(model, tokens, recipe.activation_share, **how), tokens.numel()
    tokens = learning_tokens(recipe)
    if recipe.rotation == "optrot+":
        how |= {"form": recipe.form, "steps": recipe.steps}
        return optrot_plus(model, tokens, **how), tokens.numel()
    how |= {"preset": recipe.preset, "steps": recipe.steps, "lr": recipe.lr} | start
    how |= recipe.learned_grid
    learn = {"spinquant": spinquant, "ostquant": ostquant}[recipe.rotation]
    return learn(model, tokens, **how), tokens.numel()
