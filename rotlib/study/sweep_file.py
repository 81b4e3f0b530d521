"""A sweep as a YAML file: many recipes, crossed from a few lists.

The file crosses each of its `arms` with the lists of its `grid`; what all have in common stands
under `base`, and files that register rotations of one's own under `rotations`:

    rotations: [cosine.py]
    base: {bits: 3, group_size: 64, symmetric: false}
    grid: {rotation: [none, hadamard, cosine], seed: [0, 1, 2]}
    arms: [{}, {act_order: true, seed: [0, 1, 2, 3, 4]}]

A list in an arm is a grid of its own, and replaces the shared one of that name. Every combination
is a `Recipe`, and all are made before anything runs.
"""

from dataclasses import fields
from difflib import get_close_matches
from itertools import product
from math import prod
from pathlib import Path

import yaml

from rotlib.study.own import read_rotations
from rotlib.study.recipe import Recipe
from rotlib.study.yaml_file import place, read_yaml, value_of

_PARTS = ("rotations", "base", "grid", "arms")
_MOST = 100_000  # recipes of a sweep, before equal ones are put together
FIELDS = {field.name for field in fields(Recipe)}


def read_sweep(path: Path) -> list[Recipe]:
    """The recipes of a sweep file, each once: arm by arm, the grid's last list fastest.

    Raises ValueError naming file and line for what isn't YAML, an unknown key, or a combination
    that a recipe refuses.
    """
    root = read_yaml(path)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path.name} must map {', '.join(_PARTS)} to what they hold")
    at = {key.value: (key, node) for key, node in root.value}
    for name, (key, _) in at.items():
        if name not in _PARTS:
            raise ValueError(
                f"{place(path, key)}: unknown part {name!r}, a sweep has {', '.join(_PARTS)}"
            )
    if "rotations" in at:
        _read_rotations(path, *at["rotations"])
    base = _entries(path, at["base"][1]) if "base" in at else {}
    grid = _entries(path, at["grid"][1]) if "grid" in at else {}
    if "arms" in at and not (isinstance(at["arms"][1], yaml.SequenceNode) and at["arms"][1].value):
        raise ValueError(
            f"{place(path, at['arms'][0])}: arms must be a list, "
            "each entry a mapping of what it changes"
        )
    arms = [({}, root)]
    if "arms" in at:
        arms = [(_entries(path, node), node) for node in at["arms"][1].value]
    for part, only_lists in ((base, False), (grid, True), *((arm, False) for arm, _ in arms)):
        for values, key in part.values():
            if values == [] or (only_lists and not isinstance(values, list)):
                raise ValueError(
                    f"{place(path, key)}: {key.value} must be a list of values, "
                    f"such as [0, 1, 2], not {values!r}"
                )
    if twice := base.keys() & grid.keys():
        name = min(twice)
        raise ValueError(
            f"{place(path, base[name][1])}: {name} stands under base and under grid, which would "
            "replace it: leave one out"
        )
    crossed = []
    for arm, _ in arms:
        parts = (base, grid, arm)
        together = {name: value for part in parts for name, (value, _) in part.items()}
        crossed.append({k: v if isinstance(v, list) else [v] for k, v in together.items()})
    count = sum(prod(map(len, together.values())) for together in crossed)
    if count > _MOST:
        raise ValueError(f"{path.name} makes {count} recipes, more than {_MOST}: shorten its lists")
    recipes = []
    for (arm, node), together in zip(arms, crossed, strict=True):
        for chosen in product(*together.values()):
            settings = dict(zip(together, chosen, strict=True))
            try:
                recipes.append(Recipe(**settings))
            except ValueError as error:
                keys = {name: key for part in (base, grid, arm) for name, (_, key) in part.items()}
                words = str(error).replace(",", " ").split()
                named = next((keys[word] for word in words if word in keys), node)
                whole = ", ".join(f"{name}: {value}" for name, value in settings.items())
                raise ValueError(f"{place(path, named)}: {error} (in {whole})") from error
    return list(dict.fromkeys(recipes))


def _read_rotations(path: Path, key: yaml.Node, node: yaml.Node) -> None:
    """Import the files that register rotations of one's own; their places are the sweep file's."""
    files = value_of(path, node)
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise ValueError(
            f"{place(path, key)}: rotations must be a list of Python files, such as [cosine.py]"
        )
    for file in files:
        try:
            read_rotations(path.parent / file)
        except ValueError as error:
            raise ValueError(f"{place(path, key)}: {error}") from error


def _entries(path: Path, node: yaml.Node) -> dict[str, tuple[object, yaml.Node]]:
    """{field: (its value, where its name stands)} of one mapping."""
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(
            f"{place(path, node)}: this must map a recipe's fields to values, such as {{bits: 3}}"
        )
    for key, _ in node.value:
        if key.value not in FIELDS:
            match = get_close_matches(key.value, FIELDS)
            hint = f", did you mean {match[0]}?" if match else ""
            raise ValueError(f"{place(path, key)}: a recipe has no field {key.value!r}{hint}")
    values = value_of(path, node)
    return {key.value: (values[key.value], key) for key, _ in node.value}
