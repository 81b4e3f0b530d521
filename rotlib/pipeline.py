"""Compute a recipe: load, rotate, fuse, quantize the weights, round activations, evaluate.

Every result is kept and never computed twice, and so are learned rotations and quantized weights, beside the results. The
order is weights first: activation quantizers are attached to a finished model, so one GPTQ serves every precision of the
activations. The last model stays in memory for the next recipe with the same weights.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rotlib import memory, store
from rotlib.activations import ActivationQuant, check_activations, quantized_activations
from rotlib.families import adapt
from rotlib.fixed import DRAWN, gsr_rotation
from rotlib.fuse import fuse
from rotlib.gptq import gptq
from rotlib.kept import Kept, KeptLayers, packed, unpacked
from rotlib.measure import Reference, evaluate
from rotlib.network import LearningFailed
from rotlib.online import check_online
from rotlib.optrot import kurtail, mixed, optrot
from rotlib.optrot_plus import optrot_plus
from rotlib.ostquant import ostquant
from rotlib.quant import check_quantizable, restore, rtn
from rotlib.recipe import LEARNED, Recipe
from rotlib.rotation import Rotation
from rotlib.spinquant import spinquant
from rotlib.store import Record, Result
from rotlib.text import fingerprint, load_tokens, windows
from rotlib.zoo import load, load_tokenizer, pick_device, resolve


def run(recipe: Recipe, device: str = "auto") -> Result:
    """The recipe's result: read where it is finished, computed and saved where it isn't.

    Raises ValueError for an unknown model, one that needs more memory than there is, or too short a text, before any long work.
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
    for recipe in recipes:
        if store.find(recipe.spec()) is None:
            memory.check_fits(recipe, picked)
    latest = _Latest(picked)
    return [
        store.once(recipe.spec(), picked, lambda record, recipe=recipe: _compute(recipe, latest, record))
        for recipe in tqdm(recipes, desc="recipes", unit="run", disable=None if len(recipes) > 1 else True)
    ]


def build(recipe: Recipe, device: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(the recipe's model with its weights rotated and quantized, its tokenizer), to evaluate otherwise or to export.

    Kept rotations and weights are used again. Activations are rounded where it runs inside
    `quantized_activations(model, recipe.activations)`. Raises like `run`.
    """
    memory.check_fits(recipe, pick_device(device))
    calibration = calibration_tokens(recipe)
    model, tokenizer = load(recipe.model, str(pick_device(device)))
    _check(recipe, model)
    _prepare(recipe, model, calibration)
    return model, tokenizer


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
            _check(recipe, model)
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


def _check(recipe: Recipe, model: PreTrainedModel) -> None:
    """Raises ValueError for what this model can't do, before any of it is done."""
    check_quantizable(model, recipe.quant)
    check_online(check_activations(model, recipe.activations), recipe.online)


def _prepare(recipe: Recipe, model: PreTrainedModel, calibration: Tensor) -> Record:
    """Rotate and quantize the original model in place; returns what that took."""
    record = Record()
    rotation = rotation_of(recipe, model, record)
    with record.stage("fuse"):
        if rotation is not None:
            fuse(model, rotation)
    record.seconds["quantize"] = 0.0
    if recipe.rounding != "none":
        _quantize(recipe, model, rotation, calibration, record)
    return record


def _quantize(recipe: Recipe, model: PreTrainedModel, rotation: Rotation | None, calibration: Tensor, record: Record) -> None:
    """Quantize the fused model's weights, or put back those that an earlier GPTQ has kept of the same weights under this very rotation."""
    if recipe.rounding == "rtn":
        with record.stage("quantize"):
            rtn(model, recipe.quant)
        return

    how = recipe.sharing_weights().spec() | {"task": "weights"}, adapt(model).device, _identity(rotation)
    whole, layers = Kept(*how), KeptLayers(*how)
    if done := whole.read():
        restore(model, unpacked(done["weights"]))
        layers.clear()
    else:
        seen = recipe.activations if recipe.order == "activations-first" else ActivationQuant()
        with quantized_activations(model, seen):
            report = gptq(model, calibration, recipe.quant, recipe.act_order, recipe.damping, recipe.asymmetry, layers)
        done = {"weights": packed(report.weights), "fallbacks": report.fallbacks, "seconds": report.seconds}
        if whole.write(done):
            layers.clear()
    record.metrics["fallbacks"] = done["fallbacks"]
    record.seconds["quantize"] = round(done["seconds"], 2)


def calibration_tokens(recipe: Recipe) -> Int[Tensor, "windows length"]:
    """The recipe's calibration windows, drawn from the calibration text by its seed."""
    return windows(_stream(recipe.model, recipe.text, "calibration"), recipe.window, recipe.calibration_windows, recipe.seed)


def learning_tokens(recipe: Recipe) -> Int[Tensor, "windows length"]:
    """The windows that a rotation is learned on, drawn from the calibration text by the recipe's seed."""
    return windows(_stream(recipe.model, recipe.text, "calibration"), recipe.window, recipe.learning_windows, recipe.seed)


@lru_cache
def _stream(model: str, text: str, split: str) -> Int[Tensor, " n"]:
    return load_tokens(text, load_tokenizer(model), split)


def make_rotation(recipe: Recipe, model: PreTrainedModel) -> tuple[Rotation | None, float]:
    """(the recipe's rotation of this original model, the seconds it took); learned ones are kept beside the results."""
    record = Record()
    return rotation_of(recipe, model, record), record.seconds["rotate"]


def rotation_of(recipe: Recipe, model: PreTrainedModel, record: Record) -> Rotation | None:
    """The recipe's rotation, as `make_rotation` has it; what it took goes into the record."""
    if recipe.rotation in LEARNED:
        return _learned(recipe, model, record)
    with record.stage("rotate"):
        if recipe.rotation == "none":
            return Rotation(None, None, recipe.R3, recipe.R4) if recipe.R3 or recipe.R4 else None
        return _drawn(recipe.rotation, recipe, model)


def _drawn(name: str, recipe: Recipe, model: PreTrainedModel) -> Rotation:
    """The recipe's rotation where it is drawn, or where its learning starts."""
    how = {"seed": recipe.seed, "R3": recipe.R3, "R4": recipe.R4}
    if name == "gsr":
        return gsr_rotation(model, recipe.R1_order, recipe.block, recipe.signs, **how)
    return DRAWN[name](model, **how)


def _learned(recipe: Recipe, model: PreTrainedModel, record: Record) -> Rotation:
    kept = Kept({"task": "rotation"} | recipe.rotation_reads, adapt(model).device)
    done = kept.read()
    if done is None:
        start = time.perf_counter()
        try:
            rotation, tokens = _learn(recipe, model)
        except LearningFailed as error:
            if error.rotation is not None:
                path = kept.path.with_suffix(".last-good.pt")
                store.write_atomically(path, lambda scratch: torch.save(_parts(error.rotation), scratch))
                error.add_note(f"the last good rotation is kept in {path}")
            raise
        seconds, memory_mb = time.perf_counter() - start, store.peak_memory_mb(adapt(model).device)
        done = {"rotation": _parts(rotation), "seconds": seconds, "memory_mb": memory_mb, "tokens": tokens}
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
    start = {"start": _drawn("gsr", recipe, model) if recipe.start == "gsr" else None, "local": recipe.local}
    if recipe.rotation == "optrot":
        group_size = recipe.group_size if recipe.grouped else None
        return optrot(model, normalisation=recipe.normalisation, steps=recipe.steps, group_size=group_size, **start, **how), 0
    if recipe.rotation == "kurtail":
        tokens = calibration_tokens(recipe)
        return kurtail(model, tokens, **how), tokens.numel()
    if recipe.rotation == "mixed":
        tokens = calibration_tokens(recipe)
        return mixed(model, tokens, recipe.activation_share, **how), tokens.numel()
    tokens = learning_tokens(recipe)
    if recipe.rotation == "optrot+":
        return optrot_plus(model, tokens, form=recipe.form, steps=recipe.steps, **how), tokens.numel()
    how |= {"preset": recipe.preset, "steps": recipe.steps} | start
    how |= {"quant": recipe.quant} if recipe.learned_on == "weights" else {"activations": recipe.activations}
    if recipe.rotation == "spinquant":
        return spinquant(model, tokens, **how), tokens.numel()
    return ostquant(model, tokens, kl_top=recipe.kl_top, **how), tokens.numel()


def _identity(rotation: Rotation | None) -> str:
    """A digest of a rotation: one that is learned again needn't be the same to the last bit."""
    if rotation is None:
        return ""
    return sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in rotation.tensors())).hexdigest()[:12]
