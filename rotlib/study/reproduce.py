"""Run the notebooks in order at one scale.

The command is ``python -m rotlib.study.reproduce laptop [--only 03_optrot_w4] [--in-place]``. A
scale is configs/<scale>.yaml: for each notebook the parameters that differ from its own defaults,
which are the smoke scale. Executed copies go to results/local/notebooks, figures to figures/, what
they are drawn from to results/local/figures. Finished runs are read from the store, so the same
command after an interruption goes on where it stopped.

``--model A --model B --seeds 0 1 2`` does that for each of these models. Executed copies and
figures go to results/local/notebooks/<scale>/<model>, and index.md beside them has every model's
verdicts.
"""

import argparse
import ast
import logging
import os
import re
import sys
from pathlib import Path

import nbformat
import papermill
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm
from traitlets.config import Config

from rotlib.disk import ROOT, write_atomically, write_text
from rotlib.models.names import resolve
from rotlib.study import claims, store
from rotlib.study.files import print_any_name, results_folder
from rotlib.study.notebook import check_given, check_type
from rotlib.study.tables import arms, markdown, provenance
from rotlib.study.yaml_file import read_yaml, value_of

NOTEBOOKS = ROOT / "notebooks"
CONFIGS = ROOT / "configs"
# parallel runs would race for TCP ports; a kernel that is interrupted at its end needn't say so
_KERNEL = Config(
    KernelManager={"transport": "ipc"}, NotebookClient={"extra_arguments": ["--log-level=CRITICAL"]}
)
_VOLATILE = ("papermill", "execution")


def main(arguments: list[str] | None = None) -> None:
    print_any_name()
    parser = argparse.ArgumentParser(
        prog="python -m rotlib.study.reproduce",
        description="Run the notebooks in order at one scale.",
    )
    parser.add_argument("scale", help="smoke, laptop, or another file in configs/")
    parser.add_argument(
        "--only", nargs="+", action="extend", metavar="NOTEBOOK", help="run just these"
    )
    parser.add_argument(
        "--in-place", action="store_true", help="store the outputs in notebooks/, ready to commit"
    )
    parser.add_argument("--model", action="append", default=[], help="of this; may be repeated")
    parser.add_argument("--seeds", nargs="+", type=int, help="of the models that --model names")
    options = parser.parse_args(arguments)
    if options.in_place and options.model:
        parser.error("--in-place is of the packaged model's notebooks: leave --model out")
    if options.seeds and not options.model:
        parser.error("--seeds are of the models that --model names")
    # notebooks run in a folder of their own
    options.model = [os.path.abspath(one) if os.path.exists(one) else one for one in options.model]
    try:
        plan = make_plan(options.scale, options.only)
        batch = [(model, plan_for(model, plan, options.seeds)) for model in options.model]
        places = folders_for(options.model)
        for planned in [planned for _, planned in batch] or [plan]:
            check_plan(planned)
    except ValueError as error:
        parser.error(str(error))
    scale = options.scale + "-in-place" * options.in_place
    copies = results_folder() / "local" / "notebooks" / scale
    progress = {"desc": f"{options.scale} scale", "unit": "notebook", "disable": False}
    if batch:
        failures = _run_batch(batch, copies, places, progress)
        print(f"verdicts, and links to every notebook: {copies / 'index.md'}")
        sys.exit(1 if failures else 0)
    for path, parameters in tqdm(plan, **progress):
        execute(path, copies / path.name, parameters, options.in_place)
    if not options.in_place:
        print(table())


def make_plan(scale: str, only: list[str] | None = None) -> list[tuple[Path, dict]]:
    """Which notebooks run, in order, with which parameters.

    Raises ValueError for an unknown scale, notebook or parameter, before anything runs.
    """
    notebooks = {path.stem: path for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}
    config = CONFIGS / f"{scale}.yaml"
    if scale not in (scales := sorted(path.stem for path in CONFIGS.glob("*.yaml"))):
        known = ", ".join(scales)
        raise ValueError(f"unknown scale {scale!r}: choose one of {known}")
    parameters = _read_scale(config)
    for name in [*(only or ()), *parameters]:
        if name not in notebooks:
            raise ValueError(f"unknown notebook {name!r}: choose among {', '.join(notebooks)}")
    if only and len(set(only)) < len(only):
        raise ValueError(f"--only names a notebook twice: {' '.join(only)}")
    for name, given in parameters.items():
        declared = papermill.inspect_notebook(str(notebooks[name]))
        for parameter, value in given.items():
            if parameter not in declared:
                raise ValueError(
                    f"{config.name}: {name} has no parameter {parameter!r}, "
                    f"it has {', '.join(declared)}"
                )
            try:
                check_type(parameter, value)
            except ValueError as error:
                raise ValueError(f"{config.name}: {name}: {error}") from error
    return [
        (path, parameters.get(name, {}))
        for name, path in notebooks.items()
        if not only or name in only
    ]


def check_plan(plan: list[tuple[Path, dict]]) -> None:
    """Raises ValueError for what a notebook's first cell would refuse, hours later perhaps."""
    for path, given in plan:
        declared = papermill.inspect_notebook(str(path))
        own = {name: ast.literal_eval(found["default"]) for name, found in declared.items()}
        try:
            check_given(own | given)
        except ValueError as error:
            raise ValueError(f"{path.stem}: {error}") from error


def _run_batch(
    batch: list[tuple[str, list]], copies: Path, places: dict[str, str], progress: dict
) -> dict[tuple[str, Path], str]:
    """Run every model's notebooks; returns which failed, and why."""
    tasks = [(model, *task) for model, plan in batch for task in plan]
    failures = {}
    for model, path, parameters in tqdm(tasks, **progress):
        place = copies / places[model]
        os.environ["ROTLIB_FIGURES"] = str(place / "figures")
        try:
            execute(path, place / path.name, parameters, False)
        except PapermillExecutionError as error:  # other notebooks needn't suffer for it
            failures[model, path] = f"{error.ename}: {error.evalue}"
        write_text(copies / "index.md", index(batch, places, failures))
    return failures


def plan_for(model: str, plan: list[tuple[Path, dict]], seeds: list[int] | None) -> list:
    """The same notebooks of another model, and of these seeds where a notebook has some.

    Raises ValueError for a model that there isn't, and for seeds that aren't any.
    """
    resolve(model)
    its_own = {"model": model} | ({"seeds": seeds} if seeds else {})
    for name, value in its_own.items():
        check_type(name, value)
    declared = {path: papermill.inspect_notebook(str(path)) for path, _ in plan}
    return [
        (path, given | {name: its_own[name] for name in its_own if name in declared[path]})
        for path, given in plan
    ]


def folders_for(models: list[str]) -> dict[str, str]:
    """A folder's name for each model.

    Raises ValueError where two have the same.

    >>> folders_for(["Qwen/Qwen3-0.6B", "/models/mine"])
    {'Qwen/Qwen3-0.6B': 'Qwen-Qwen3-0.6B', '/models/mine': 'models-mine'}
    """
    named = {model: re.sub(r"[^\w.]+", "-", model).strip("-.") for model in models}
    if len({*named.values()}) < len(models):
        raise ValueError(f"--model names one model twice, or two alike: {' '.join(models)}")
    return named


def index(
    batch: list[tuple[str, list]], places: dict[str, str], failures: dict[tuple[str, Path], str]
) -> str:
    """Every model's verdicts as Markdown, with links to its executed notebooks."""
    text = "# Verdicts by model\n"
    for model, plan in batch:
        settings = {path.stem: given for path, given in plan}.get("90_report", {})
        found, _ = claims.verdicts(model, settings.get("settings"))
        counts = found.verdict.value_counts()
        text += f"\n## {model}\n\n{', '.join(f'{n} {name}' for name, n in counts.items())}\n\n"
        for path, _ in plan:
            failed = failures.get((model, path))
            text += f"- [{path.stem}]({places[model]}/{path.name})" + f": {failed}" * bool(failed)
            text += "\n"
        judged = found[found.verdict != "not run"].drop(columns=["model"])
        if len(judged):
            text += f"\n{judged.to_markdown(index=False, floatfmt='.3f')}\n"
    return text


def _read_scale(config: Path) -> dict[str, dict]:
    root = read_yaml(config)
    scale = {} if root is None else value_of(config, root)
    if not isinstance(scale, dict) or not all(isinstance(given, dict) for given in scale.values()):
        raise ValueError(
            f"{config.name} must map each notebook to its parameters, "
            "such as 03_optrot_w4: {seeds: [0, 1, 2]}"
        )
    return scale


def execute(path: Path, target: Path, parameters: dict, in_place: bool) -> None:
    """Run one notebook through papermill.

    In place, outputs and counts are kept, and what changes from run to run is dropped.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if in_place:
        os.environ.update({"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    else:
        os.environ.setdefault("ROTLIB_FIGURES", str(ROOT / "figures"))
        _show_kernel_progress()
    how = {"progress_bar": False, "log_output": not in_place, "config": _KERNEL}
    how |= {"coalesce_streams": in_place}  # what is printed is stored as one, whatever its pace
    papermill.execute_notebook(str(path), str(target), parameters, cwd=str(NOTEBOOKS), **how)
    if in_place:
        notebook = nbformat.read(target, as_version=4)
        for holder in (notebook, *notebook.cells):
            for key in _VOLATILE:
                holder.metadata.pop(key, None)
        notebook.metadata.get("language_info", {}).pop("version", None)
        write_atomically(path, lambda scratch: nbformat.write(notebook, scratch))


def table() -> str:
    """Every arm that there is a result for, here or committed, and what they were computed with."""
    results = store.load_results()
    return f"{markdown(arms(results))}\n\n{provenance(results)}"


def _show_kernel_progress() -> None:
    """Show a kernel's progress bars and rotlib's own words, of all that papermill logs.

    They go to the terminal.
    """
    logger = logging.getLogger("papermill")
    if logger.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.terminator = ""
    handler.addFilter(lambda record: re.match(r"rotlib: |.*\r", record.getMessage(), re.DOTALL))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


if __name__ == "__main__":
    main()
