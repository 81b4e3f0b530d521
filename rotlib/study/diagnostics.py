"""Measures of a recipe's model, kept like runs: outliers, bounds, groups, slopes, zero-shot.

What they measure stands in `rotlib.measure`; here a recipe is resolved, its model and rotation are
made, and the numbers are stored.
"""

from collections.abc import Callable
from dataclasses import fields, replace

import torch

from rotlib.checks import one_of, whole_number, yes_or_no
from rotlib.learning.grouped import check_group
from rotlib.measure.bounds import module_bounds
from rotlib.measure.outliers import WINDOWS, input_outliers, weight_histogram, weight_outliers
from rotlib.measure.slopes import slope_agreement
from rotlib.measure.weights import SHOWN_LAYER, group_spread
from rotlib.measure.zeroshot import check_limit, load_tasks, task_names, zero_shot
from rotlib.models.supported import adapt, check_no_experts
from rotlib.models.text import fingerprint
from rotlib.models.zoo import pick_device
from rotlib.quantization.activations import quantized_activations
from rotlib.quantization.fp4 import FP4
from rotlib.quantization.quantized import check_quantizable
from rotlib.rotations.fuse import fuse
from rotlib.rotations.online import check_online, load
from rotlib.rotations.rotation import Rotation, placed_weights
from rotlib.study import store
from rotlib.study.memory import outline
from rotlib.study.pipeline import build, calibration_tokens, learning_tokens, rotation_of
from rotlib.study.recipe import THROUGH_NETWORK, Recipe, check_recipe
from rotlib.study.store import Record, Result


def outliers(recipe: Recipe, device: str = "auto", run: bool = True) -> Result:
    """Outliers of the recipe's model under its rotation, over its first calibration windows.

    Kept like a run. Without `run` nothing is computed: it is read here, or in results/study.

    >>> recipe = Recipe(model=tiny, rotation="random", window=32, calibration_windows=2)
    >>> outliers(recipe).metrics["modules"][0]["kurtosis"] > 1
    True
    """
    check_recipe("outliers", recipe)
    recipe = recipe.of_rotation("text", "window", "calibration_windows")
    picked = pick_device(device)

    @torch.no_grad()
    def compute(record: Record) -> None:
        check_no_experts(outline(recipe.model)[0], "outliers")
        calibration = calibration_tokens(recipe)
        model, _ = load(recipe.model, str(picked))
        rotation = rotation_of(recipe, model, record)
        if rotation is not None:
            fuse(model, rotation)
        family = adapt(model)
        with record.timed("weights"):
            record.metrics["modules"] = weight_outliers(family)
            record.metrics["histogram"] = weight_histogram(family).tolist()
        with record.timed("activations"):
            inputs = input_outliers(family, calibration[:WINDOWS])
        for module in record.metrics["modules"]:
            module |= inputs[module["layer"], module["site"]]
        record.tokens["calibration"] = fingerprint(calibration)

    return _once(recipe.spec() | {"task": "outliers"}, picked, compute, run)


def compare_outliers(
    recipe: Recipe, rotations: tuple[str, ...], run: bool = True
) -> dict[str, Result]:
    """`outliers` of one recipe under several rotations; a name such as "hadamard + R4" has R4 on.

    >>> recipe = Recipe(model=tiny, window=32, calibration_windows=2)
    >>> list(compare_outliers(recipe, ("none", "hadamard + R4")))
    ['none', 'hadamard + R4']
    """
    check_recipe("compare_outliers", recipe)
    if not isinstance(rotations, list | tuple) or not all(isinstance(r, str) for r in rotations):
        raise ValueError(
            f"rotations must be a list of names such as 'hadamard + R4', not {rotations!r}"
        )
    online = " + R4"

    def turned(name: str) -> Recipe:
        return replace(recipe, rotation=name.removesuffix(online), R4=name.endswith(online))

    return {name: outliers(turned(name), run=run) for name in rotations}


def bounds(recipe: Recipe, every: int = 1, device: str = "auto", run: bool = True) -> Result:
    """Bounds and errors of every weight under the recipe's rotation and weight grid.

    The inputs don't drift: a layer is measured as if those before it were unquantized. `every`
    second, third … layer is measured; `measure.bounds.stage_bounds` says what a line of
    `metrics["modules"]` holds. Kept like a run.

    >>> recipe = Recipe(model=tiny, rotation="hadamard", window=32, calibration_windows=2)
    >>> module = bounds(recipe).metrics["modules"][0]
    >>> module["floor"] < module["tr_D"]
    True
    """
    check_recipe("bounds", recipe)
    grid = (field.name for field in fields(recipe.quant))
    recipe = recipe.of_rotation("text", "window", "calibration_windows", *grid)
    if recipe.grid in FP4:
        raise ValueError(f"the bounds are of integer grids, not of {recipe.grid}")
    picked = pick_device(device)
    whole_number("every", every, 1)
    spec = recipe.spec() | {"task": "bounds"} | ({"every": every} if every > 1 else {})

    def compute(record: Record) -> None:
        check_no_experts(outline(recipe.model)[0], "bounds")
        calibration = calibration_tokens(recipe)
        model, _ = load(recipe.model, str(picked))
        family = adapt(model)
        check_quantizable(family, recipe.quant)
        check_online(family, recipe.online)
        rotation = rotation_of(recipe, model, record) or Rotation(None, None)
        with record.timed("bounds"):
            lines = module_bounds(family, rotation, calibration, recipe.quant, every)
        record.metrics["modules"] = lines
        record.tokens["calibration"] = fingerprint(calibration)

    return _once(spec, picked, compute, run)


def groups(recipe: Recipe, group_size: int, device: str = "auto", run: bool = True) -> Result:
    """`group_spread` of every weight under the recipe's rotation, kept like a run.

    `energies` holds, for the coordinates that q reads in one layer, Σ_i W_ij² over its mean. Raises
    ValueError where the groups don't divide a weight's inputs.

    >>> recipe = Recipe(model=tiny, rotation="gsr", block=16)
    >>> sorted(groups(recipe, group_size=16).metrics["modules"][0])
    ['layer', 'peak', 'site', 'within']
    """
    check_recipe("groups", recipe)
    whole_number("group_size", group_size, 1)
    recipe = recipe.of_rotation()
    picked = pick_device(device)

    @torch.no_grad()
    def compute(record: Record) -> None:
        model, _ = load(recipe.model, str(picked))
        family = adapt(model)
        check_group(family, group_size)
        rotation = rotation_of(recipe, model, record) or Rotation(None, None)
        rotation = rotation.projected(family.device)
        shown = ("q", min(SHOWN_LAYER, len(family.layers) - 1))
        record.metrics["modules"] = []
        for placed in placed_weights(family, quantized_only=True):
            W = dict(placed.rotated(rotation, family.device))["weight"]
            where = {"site": placed.site, "layer": placed.layer}
            record.metrics["modules"].append(where | group_spread(W, group_size))
            if (placed.site, placed.layer) == shown:
                energy = W.square().sum(0)
                energies = (energy / energy.mean()).tolist()
                record.metrics["energies"] = [float(f"{value:.4g}") for value in energies]

    spec = recipe.spec() | {"task": "groups", "groups_of": group_size}
    return _once(spec, picked, compute, run)


def slopes(recipe: Recipe, device: str = "auto", run: bool = True) -> Result:
    """`slope_agreement` of what the recipe's rival learns on, over its learning windows.

    Kept like a run. Raises ValueError for a rotation that isn't learned through the network.

    >>> recipe = Recipe(model=tiny, rotation="spinquant", window=32, learning_windows=2)
    >>> -1 <= slopes(recipe).metrics["agreement"] <= 1
    True
    """
    check_recipe("slopes", recipe)
    one_of("rotation with slopes", recipe.rotation, THROUGH_NETWORK)
    recipe = replace(recipe.of_rotation(), steps=None, lr=None, preset=Recipe.preset)
    picked = pick_device(device)

    def compute(record: Record) -> None:
        text = learning_tokens(recipe)
        model, _ = load(recipe.model, str(picked))
        with record.timed("slopes"):
            record.metrics["agreement"] = slope_agreement(
                model, text, seed=recipe.seed, R4=recipe.R4, **recipe.learned_grid
            )
        record.tokens["learning"] = fingerprint(text)

    return _once(recipe.spec() | {"task": "slopes"}, picked, compute, run)


def zero_shot_of(
    recipe: Recipe,
    tasks: str | list[str] = "offline",
    limit: int | None = None,
    device: str = "auto",
    run: bool = True,
) -> Result:
    """`zero_shot` of a recipe's model, rebuilt from what is kept of it or computed.

    Kept like a run. Raises like `zero_shot` and `run`.

    >>> recipe = Recipe(model=tiny, window=32, calibration_windows=2)
    >>> zero_shot_of(recipe, ["last_word"], limit=4).metrics["items"]
    {'last_word': 4}
    """
    check_recipe("zero_shot_of", recipe)
    names = task_names(tasks)
    check_limit(limit)
    picked = pick_device(device)
    asked = {"task": "zero-shot", "tasks": list(names), "limit": limit}
    spec = replace(recipe, test_windows=Recipe.test_windows).spec() | asked

    def compute(record: Record) -> None:
        load_tasks(names, limit, recipe.text)  # refused before the model is made
        with record.timed("build"):
            model, tokenizer = build(recipe, device)
        with record.timed("evaluate"), quantized_activations(model, recipe.activations):
            record.metrics |= zero_shot(model, tokenizer, tasks, limit, recipe.text).metrics

    return _once(spec, picked, compute, run)


def _once(spec: dict, device: torch.device, compute: Callable, run: bool) -> Result:
    yes_or_no("run", run)
    return store.once(spec, device, compute) if run else store.known(spec)
