"""What every notebook shares: the check of its parameters.

papermill only warns of a mistyped parameter and hands over whatever type it parsed; `check_parameters` turns both into
one sentence in a notebook's first code cell, before any work.
"""

import inspect
from difflib import get_close_matches

from rotlib.checks import inner_share, whole_number
from rotlib.recipe import Recipe
from rotlib.report import claims
from rotlib.zoo import resolve

PARAMETERS = {
    "model": str,
    "text": str,
    "seeds": list,
    "side_seeds": list,
    "extra_seeds": list,
    "shares": list,
    "budgets": list,
    "steps": int,
    "every": int,
    "block": int,
    "items": int,
    "bits": int,
    "group_size": int | None,
    "compare": bool,
    "settings": dict,
    "folder": str | None,
    "window": int,
    "calibration_windows": int,
    "learning_windows": int,
    "test_windows": int,
}
_LEARNING = ("steps", "learning_windows")  # of the rotations learned on data alone: the notebook gives them to those
_COUNTS = ("every", "block", "items")  # what a notebook hands on itself: not every recipe reads it
_OTHERS = ("compare", "folder", "settings")  # no recipe reads them
_LISTS = {"shares": "a share", "budgets": "a budget"}  # the other lists hold seeds


def check_parameters() -> Recipe:
    """Check the calling notebook's parameters; returns the recipe that they describe, with the first of the seeds.

    A notebook without a text reads results alone: there the model's name isn't looked up.

    Raises ValueError for a name that no notebook has, a wrong type, a value that a recipe refuses, or an unknown model.
    """
    namespace = inspect.stack()[1].frame.f_globals
    given = {name: value for name, value in namespace.items() if name in PARAMETERS}
    if not namespace.get("_parameters_checked"):  # later on the notebook's own variables are there too
        strangers = [name for name, value in namespace.items() if _looks_like_a_parameter(name, value) and name not in given]
        if strangers:
            hint = f" (did you mean {match[0]}?)" if (match := get_close_matches(strangers[0], PARAMETERS)) else ""
            raise ValueError(f"unknown parameter {strangers[0]}{hint}: the notebooks know {', '.join(PARAMETERS)}")
    for name, value in given.items():
        kind = PARAMETERS[name]
        if (isinstance(value, bool) and kind is not bool) or not isinstance(value, kind):
            wanted = kind.__name__ if isinstance(kind, type) else str(kind)
            raise ValueError(f"the parameter {name} must be of type {wanted}, not {type(value).__name__} ({value!r})")
        if kind is list:
            for entry in value:
                if name == "shares":
                    inner_share("every share in shares", entry)
                else:
                    whole_number(f"every {_LISTS.get(name, 'a seed')[2:]} in {name}", entry, int(name == "budgets"))
            if len(set(value)) < len(value):
                raise ValueError(f"the parameter {name} names {_LISTS.get(name, 'a seed')} twice: {value!r}")
    if not given.get("seeds", [0]):
        raise ValueError("the parameter seeds must hold at least one seed")
    Recipe(rotation="spinquant", **{name: value for name, value in given.items() if name in _LEARNING})
    for name in _COUNTS:
        whole_number(name, given.get(name, 2), 1 + (name == "items"))  # a single item has no standard error
    settings = {
        name: value for name, value in given.items() if PARAMETERS[name] is not list and name not in (*_LEARNING, *_COUNTS, *_OTHERS)
    }
    recipe = Recipe(**settings, seed=given.get("seeds", [0])[0])
    if "settings" in given:
        claims(recipe.model, given["settings"])  # refuses what no claim can be judged under
    if "text" in given:
        resolve(recipe.model)
    namespace["_parameters_checked"] = True
    return recipe


def _looks_like_a_parameter(name: str, value: object) -> bool:
    return (
        not name.startswith("_") and name not in ("In", "Out") and isinstance(value, bool | int | float | str | list | tuple | dict | None)
    )
