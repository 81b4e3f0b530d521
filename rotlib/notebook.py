"""What every notebook shares: its parameters are checked, its numbers become tables.

papermill only warns of a mistyped parameter and hands over whatever type it parsed; `check_parameters` turns both into
one sentence in a notebook's first code cell, before any work.
"""

import inspect
from difflib import get_close_matches

from rotlib.recipe import Recipe

PARAMETERS = {
    "model": str,
    "text": str,
    "seeds": list,
    "window": int,
    "calibration_windows": int,
    "test_windows": int,
    "steps": int,
}


def check_parameters() -> Recipe:
    """Check the calling notebook's parameters; returns the recipe that they describe, with the first of the seeds.

    Raises ValueError for a name that no notebook has, a wrong type, or a value that a recipe refuses.
    """
    given = {
        name: value
        for name, value in inspect.stack()[1].frame.f_globals.items()
        if not name.startswith("_") and name not in ("In", "Out", "exit", "quit") and isinstance(value, bool | int | float | str | list)
    }
    for name, value in given.items():
        if name not in PARAMETERS:
            hint = f", did you mean {match[0]}" if (match := get_close_matches(name, PARAMETERS)) else ""
            raise ValueError(f"unknown parameter {name}{hint}: the notebooks know {', '.join(PARAMETERS)}")
        kind = PARAMETERS[name]
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ValueError(f"the parameter {name} must be of type {kind.__name__}, not {type(value).__name__} ({value!r})")
    seeds = given.pop("seeds", [0])
    if not seeds or any(isinstance(seed, bool) or not isinstance(seed, int) or seed < 0 for seed in seeds):
        raise ValueError(f"seeds must be a list of whole numbers, not {seeds!r}")
    given.pop("steps", None)
    return Recipe(**given, seed=seeds[0])
