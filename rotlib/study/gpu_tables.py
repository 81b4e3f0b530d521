"""What `rotlib.study.gpu` found, machine by machine, as tables: `results/gpu/<machine>/`."""

import json
from collections.abc import Iterator
from pathlib import Path

import pandas

from rotlib.study.files import results_folder
from rotlib.study.store import read

_MIB = 2**20 / 1e9  # GB


def tables() -> dict[str, tuple[pandas.DataFrame, list[str]]]:
    """(the table, the files under results/ that it was made from) of stages, parity and study.

    Only what some machine has found is there.
    """
    found = {}
    for name, rows_of in {"stages": _stages, "parity": _parity, "study": _study}.items():
        rows, files = [], []
        for machine in sorted((results_folder() / "gpu").glob("*")):
            for path, row in rows_of(machine):
                rows.append(row)
                files.append(path.relative_to(results_folder()).as_posix())
        if rows:
            found[name] = pandas.DataFrame(rows).fillna(""), sorted(set(files))
    return found


def _stages(machine: Path) -> Iterator[tuple[Path, dict]]:
    held = [(*found, "the GPU") for found in _lines(machine, "stages")]
    sent = [(*found, "the host") for found in _lines(machine, "streamed")]
    layers: dict[Path, int] = {}
    for path, device, line, where in held + sent:
        layers[path] = line.get("layers", layers.get(path, ""))
        if "peak_mb" in line:
            estimate = line.get("estimate_mb")
            yield (
                path,
                {
                    "machine": device,
                    "model on": where,
                    "layers": layers[path],
                    "stage": line["name"],
                    "seconds": line.get("seconds", line.get("error")),
                    "peak, GB": round(line["peak_mb"] * _MIB, 1),
                    "estimate, GB": "" if estimate is None else round(estimate * _MIB, 1),
                },
            )


def _parity(machine: Path) -> Iterator[tuple[Path, dict]]:
    for path, device, line in _lines(machine, "parity"):
        found = line.get("difference", line.get("error"))
        row = {"machine": device, "compared": line["name"], "relative difference": _short(found)}
        row["allowed"] = _short(line.get("tolerance", ""))
        row["of numbers on ties"] = _short(max(line.get("ties", {}).values(), default=""))
        yield path, row


def _study(machine: Path) -> Iterator[tuple[Path, dict]]:
    for path in sorted((machine / "results" / "local").glob("*.json")):
        result = read(path)
        spec = {name: value for name, value in result.spec.items() if name != "task"}
        row = {"machine": result.provenance["device"]}
        row["recipe"] = ", ".join(f"{name} {value}" for name, value in spec.items())
        row |= {"KL, nats": round(result.metrics["kl"], 4)}
        row |= {"perplexity": round(result.metrics["perplexity"], 2)}
        row |= {f"{step}, s": seconds for step, seconds in sorted(result.seconds.items())}
        yield path, row | {"peak, GB": round(result.peak_memory_mb * _MIB, 1)}


def _lines(machine: Path, phase: str) -> Iterator[tuple[Path, str, dict]]:
    for path in sorted(machine.rglob(f"{phase}.json")):  # of whole models, and of fewer layers
        found = json.loads(path.read_text(encoding="utf-8"))
        for line in found["lines"]:
            yield path, found["machine"]["device"], line


def _short(value: object) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value)
