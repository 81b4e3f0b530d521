"""What every notebook shares: the check of its parameters.

papermill only warns of a mistyped parameter and hands over whatever type it parsed;
`check_parameters` turns both into one sentence in a notebook's first code cell, before any work.
"""

import ast
import inspect
from difflib import get_close_matches
from pathlib import Path

from rotlib.checks import inner_share, one_of, whole_number
from rotlib.disk import check_writable
from rotlib.models.names import check_name, resolve
from rotlib.models.zoo import pick_device
from rotlib.study.claims import claims
from rotlib.study.figures import figures_folder
from rotlib.study.files import check_results_folder
from rotlib.study.memory import check_fits
from rotlib.study.recipe import QUALITIES, Recipe
from rotlib.study.suits import check_suits

PARAMETERS = {
    "model": str,
    "text": str,
    "seeds": list,
    "side_seeds": list,
    "extra_seeds": list,
    "shares": list,
    "budgets": list,
    "beside": list,
    "steps": int,
    "every": int,
    "block": int,
    "items": int,
    "bits": int,
    "group_size": int | None,
    "compare": bool,
    "settings": dict,
    "quality": str,
    "folder": str | None,
    "window": int,
    "calibration_windows": int,
    "learning_windows": int,
    "test_windows": int,
}
# of the rotations learned on data alone: the notebook gives them to those
_LEARNING = ("steps", "learning_windows")
_COUNTS = ("every", "block", "items")  # what a notebook hands on itself: not every recipe reads it
_OTHERS = ("compare", "folder", "quality", "settings")  # no recipe reads them
# what one entry of a list is; the other lists hold seeds
_ENTRY = {"shares": "share", "budgets": "budget", "beside": "model"}


def check_parameters() -> Recipe:
    """Check the calling notebook's parameters; returns the recipe they describe, of the first seed.

    Without seeds a notebook shows what has been computed; the recipe's seed is 0 then. One without
    a text reads results alone: there the model's name isn't looked up. Raises ValueError for a name
    that this notebook has no parameter of, a wrong type, a value that a recipe refuses, an unknown
    model, a folder that can't be written to, or more memory than there is.
    """
    namespace = inspect.stack()[1].frame.f_globals
    given = {name: value for name, value in namespace.items() if name in PARAMETERS}
    if not namespace.get("_parameters_checked"):  # later the notebook's own variables are there too
        _refuse_strangers(namespace)
        check_results_folder()
        check_writable(figures_folder(), "let ROTLIB_FIGURES name a writable folder")
    recipe = check_given(given)
    namespace["_parameters_checked"] = True
    return recipe


def check_given(given: dict[str, object]) -> Recipe:
    """Check a notebook's parameters, all of them; returns and raises like `check_parameters`."""
    for name, value in given.items():
        check_type(name, value)
    learning = {name: value for name, value in given.items() if name in _LEARNING}
    Recipe(rotation="spinquant", **learning)
    for name in _COUNTS:  # a single item has no standard error
        whole_number(name, given.get(name, 2), 2 if name == "items" else 1)
    apart = (*_LEARNING, *_COUNTS, *_OTHERS)
    read = [name for name in given if PARAMETERS[name] is not list and name not in apart]
    settings = {name: given[name] for name in read}
    recipe = Recipe(**settings, seed=[*given.get("seeds", []), 0][0])
    if "quality" in given:
        one_of("quality", given["quality"], QUALITIES)
    if "settings" in given:
        claims(recipe.model, given["settings"])  # refuses what no claim can be judged under
    if given.get("folder"):
        check_writable(Path(given["folder"]), "let folder name another one")
    if "text" in given:
        resolve(recipe.model)
    if "test_windows" in given and given.get("seeds", [0]):  # without seeds nothing is run
        check_suits(recipe)
        check_fits(recipe, pick_device())
    return recipe


def _refuse_strangers(namespace: dict) -> None:
    """Raises ValueError for a variable that can only be a mistyped parameter.

    Or one that papermill put in for a parameter that this notebook doesn't have.
    """
    cells = namespace.get("In", ())
    injected = {name for cell in cells if cell.startswith("# Parameters") for name in _set_by(cell)}
    own = {name for cell in cells if not cell.startswith("# Parameters") for name in _set_by(cell)}
    if unread := sorted(injected & PARAMETERS.keys() - own):
        has = ", ".join(sorted(own & PARAMETERS.keys()))
        raise ValueError(f"this notebook has no parameter {unread[0]}: it has {has}")
    kinds = bool | int | float | str | list | tuple | dict | None
    for name, value in namespace.items():
        own = name.startswith("_") or name in ("In", "Out") or name in PARAMETERS
        if not own and isinstance(value, kinds):
            match = get_close_matches(name, PARAMETERS)
            hint = f" (did you mean {match[0]}?)" if match else ""
            raise ValueError(
                f"unknown parameter {name}{hint}: the notebooks know {', '.join(PARAMETERS)}"
            )


def _set_by(cell: str) -> set[str]:
    """The variables that a cell sets; none of one that isn't plain Python."""
    try:
        nodes = ast.parse(cell).body
    except SyntaxError:
        return set()
    targets = (target for node in nodes if isinstance(node, ast.Assign) for target in node.targets)
    return {target.id for target in targets if isinstance(target, ast.Name)}


def check_type(name: str, value: object) -> None:
    """Raises ValueError where a parameter has the wrong type, or a list the wrong entries."""
    kind = PARAMETERS[name]
    if (isinstance(value, bool) and kind is not bool) or not isinstance(value, kind):
        wanted = kind.__name__ if isinstance(kind, type) else str(kind)
        raise ValueError(
            f"the parameter {name} must be of type {wanted}, not {type(value).__name__} ({value!r})"
        )
    if kind is not list:
        return
    entry = _ENTRY.get(name, "seed")
    for one in value:
        if entry == "share":
            inner_share(f"every share in {name}", one)
        elif entry == "model":
            check_name(one)
        else:
            whole_number(f"every {entry} in {name}", one, 1 if entry == "budget" else 0)
    if len(set(value)) < len(value):
        raise ValueError(f"the parameter {name} names a {entry} twice: {value!r}")
