"""Every figure as a file, and once more from saved results alone.

A figure of `plots.py` knows its function and arguments. `save` keeps them in
results/local/figures/<name>.json: arms and results as the names of their files, a matrix as the
shades that a picture of it shows, anything else as it is. It draws the files from what it kept, and
`redraw` does so again without a model: the bytes are the same. Where a notebook runs outside `make
reproduce` pictures go to figures/draft/ and nothing is kept, so that stepping through it overwrites
neither the committed figures nor what they are drawn from.
"""

import json
import logging
import os
import zlib
from base64 import b64decode, b64encode
from functools import partial
from pathlib import Path

import pandas
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from rotlib.disk import folder_of, write_atomically, write_text
from rotlib.study import plots, store
from rotlib.study.files import results_folder, saved
from rotlib.study.store import Result
from rotlib.study.tables import Arm, arms

_SHADES = 127  # either side of zero
_METADATA = {
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "png": {"Software": None},
}


def figures_folder() -> Path:
    """`ROTLIB_FIGURES`, else figures/draft of this checkout."""
    return folder_of("ROTLIB_FIGURES", "figures/draft")


def save(figure: Figure, name: str) -> None:
    """Write figures/<name>.pdf and .png, and in a reproduction what they are drawn from.

    The figure is closed. Raises ValueError for a figure that no function of `plots` has drawn,
    FileNotFoundError where a result of it isn't stored.
    """
    if not hasattr(figure, "drawn_from"):
        raise ValueError(
            f"the figure {name} couldn't be drawn again: "
            "let a function of rotlib/study/plots.py draw it"
        )
    function, arguments = figure.drawn_from
    plt.close(figure)
    drawing = {"function": function, "arguments": arguments}
    kept = json.dumps(drawing, default=_kept, indent=1) + "\n"
    _write(name, kept)
    if os.environ.get("ROTLIB_FIGURES"):
        write_text(results_folder() / "local" / "figures" / f"{name}.json", kept)


def redraw() -> dict[str, list[str]]:
    """Write every kept figure again: {its name: the files in results/ that it comes from}.

    One whose results have gone is left as it is, which is said on stderr. Raises ValueError for a
    file that this version can't draw.
    """
    made_from = {}
    for path in saved("figures/*.json"):
        try:
            used = _write(path.stem, path.read_text(encoding="utf-8"))
            made_from[path.stem] = [f"figures/{path.name}", *used]
        except FileNotFoundError as missing:
            left = f"rotlib: the figure {path.stem} is left as it is: {missing}"
            logging.getLogger("rotlib").warning(left)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} can't be drawn: delete it and run its notebook again ({error})"
            ) from error
    return made_from


def _write(name: str, kept: str) -> list[str]:
    """Draw what was kept and write it; returns its results' names.

    Without dates or versions, so that equal figures are equal files.
    """
    used = set()

    def load(file: str) -> Result:
        used.add(file)
        return store.load_result(file)

    def revived(entry: dict) -> object:
        match entry:
            case {"arm of": files}:
                return arms(load(file) for file in files)[0]
            case {"result of": file}:
                return load(file)
            case {"shades": shades, "shape": shape, "largest": largest}:
                raw = bytearray(zlib.decompress(b64decode(shades)))
                shades = torch.frombuffer(raw, dtype=torch.int8)
                return shades.double().reshape(shape) / _SHADES * largest
        return entry

    drawing = json.loads(kept, object_hook=revived)
    figure = getattr(plots, drawing["function"])(**drawing["arguments"])
    plt.close(figure)
    for kind, metadata in _METADATA.items():
        draw = partial(figure.savefig, format=kind, metadata=metadata, dpi=200)
        write_atomically(figures_folder() / f"{name}.{kind}", draw)
    return sorted(used)


def _kept(thing: object) -> object:
    """What `revived` makes this of; raises TypeError for what no figure is drawn from."""
    match thing:
        case Arm():
            return {"arm of": [result.file for result in thing.results]}
        case Result():
            return {"result of": thing.file}
        case torch.Tensor():
            largest = thing.abs().max().item()
            shades = (thing / largest * _SHADES).round().to(torch.int8)
            packed = b64encode(zlib.compress(shades.numpy().tobytes(), 9)).decode()
            return {"shades": packed, "shape": list(thing.shape), "largest": largest}
        case pandas.Series():
            return thing.tolist()
    raise TypeError(
        "a figure is drawn from arms, results, matrices and plain values, "
        f"not from a {type(thing).__name__}"
    )
