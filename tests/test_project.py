"""What holds the project together: one list of pins, notebooks that keep their contract, modules
that stay small.
"""

import ast
import re
import runpy
import tomllib
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml
from conftest import save_tiny_model
from packaging.requirements import Requirement
from papermill.exceptions import PapermillExecutionError

from rotlib.disk import ROOT
from rotlib.models.names import PACKAGED
from rotlib.study import notebook as shared
from rotlib.study import reproduce
from rotlib.study.reproduce import make_plan

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def lock() -> dict[str, str]:
    """{package: pinned version}"""
    pins = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    return {_canonical(name): version for name, version in pins}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_environment_yml_brings_a_python_that_the_project_takes():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert "make" in environment["dependencies"]  # which installs the lock's pins
    assert f"python{project()['requires-python']}" in environment["dependencies"]


def test_the_lock_pins_every_dependency_with_hashes_and_leaves_torch_to_the_makefile():
    declared = project()["dependencies"] + project()["optional-dependencies"]["dev"]
    pins = lock()
    for requirement in declared:
        name = _canonical(re.match(r"[\w.-]+", requirement)[0])
        assert name in pins or name == "torch"
    assert not [name for name in pins if re.match(r"torch$|nvidia|cuda|triton", name)]
    text = (ROOT / "requirements.lock").read_text()
    assert len(re.findall(r"^[\w.-]+==.*\\\n    --hash=sha256:", text, re.MULTILINE)) == len(pins)
    assert "://" not in text
    assert "/work" not in text


def test_the_pinned_torch_and_transformers_are_in_the_ranges_that_are_declared():
    makefile = (ROOT / "Makefile").read_text()
    torch = re.search(r"^TORCH := torch==(\S+)$", makefile, re.MULTILINE)[1]
    ranges = {r.name: r.specifier for r in map(Requirement, project()["dependencies"])}
    assert torch in ranges["torch"]
    assert lock()["transformers"] in ranges["transformers"]


def test_the_packages_of_the_brief_are_declared():
    declared = {Requirement(line).name for line in project()["dependencies"]}
    brief = {"torch", "transformers", "jupyterlab", "papermill", "matplotlib", "datasets"}
    assert brief | {"lm-eval"} <= declared


def test_the_packaged_model_is_the_same_everywhere():
    requirement = PACKAGED["smollm2-135m"].requirement
    for file in ("Makefile", "docs/results.md"):
        assert requirement in (ROOT / file).read_text()


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *ROOT.glob("results/*/*.md")]
PAGES.append(ROOT / ".github" / "CONTRIBUTING.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        file, _, heading = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert heading in {title.lower().replace(" ", "-") for title in titles}, link


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflows_steps_are_make_targets(path):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[1].split())
    jobs = yaml.safe_load(path.read_text())["jobs"].values()
    commands = [step["run"].split() for job in jobs for step in job["steps"] if "run" in step]
    made = [command for command in commands if command[0] == "make"]
    assert made
    for command in made:
        assert set(command[2:]) <= targets
    assert all(command in made or command[:2] == ["git", "diff"] for command in commands)


def test_ci_runs_every_notebook():
    makefile = (ROOT / "Makefile").read_text()
    assert " notebooks\n\t$(PYTEST)" in makefile  # the whole folder: no notebook can be left out
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert [path for path, _ in make_plan("laptop")] == NOTEBOOKS
    assert all(re.match(r"\d\d_\w+$", path.stem) for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_its_contract(path):
    notebook = nbformat.read(path, as_version=4)
    first, *_ = notebook.cells
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1
    for heading in (
        "**Question.**",
        "**You will see**",
        "**Inputs.**",
        "**Runtime**",
        "smoke",
        "laptop",
    ):
        assert heading in first.source, heading

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == [code[0]], "one parameters cell, before any other code"
    assert set(papermill.inspect_notebook(str(path))) <= set(shared.PARAMETERS)
    assert "check_parameters()" in code[1].source
    assert "print(" in code[-1].source
    assert "figures.save(" in code[-1].source

    for cell in code:
        assert cell.execution_count, (
            "stored outputs need their counts: nbval compares nothing without them"
        )
        assert not any(output.output_type == "error" for output in cell.outputs)
        assert len(cell.source.splitlines()) <= 15, cell.source
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 10, node.name
    for position, cell in enumerate(notebook.cells):
        if cell.cell_type == "code" and "= plots." in cell.source:
            assert notebook.cells[position + 1].cell_type == "markdown", (
                "a figure is read in words below it"
            )
            assert any("image/png" in output.get("data", {}) for output in cell.outputs), (
                "a figure is shown where it is drawn"
            )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (["lapto"], "unknown scale 'lapto': choose one of laptop, paper, smoke, study"),
        (["laptop", "--only", "03_optrot"], "unknown notebook '03_optrot'"),
        (["smoke", "--model", "no/where"], "no/where"),
        (["smoke", "--seeds", "1"], "--seeds are of the models that --model names"),
        (["smoke", "--model", "smollm2-135m", "--in-place"], "leave --model out"),
        (["smoke", *["--model", "smollm2-135m"] * 2], "names one model twice"),
        (["smoke", "--model", "smollm2-135m", "--seeds", "1", "1"], "names a seed twice"),
    ],
)
def test_a_mistyped_scale_or_notebook_is_refused_before_anything_runs(call, message, capsys):
    with pytest.raises(SystemExit) as ended:
        reproduce.main(call)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_several_models_leave_a_folder_each_and_an_index_of_verdicts(tmp_path, monkeypatch):
    """A notebook that fails for one model is said there, and the other's runs."""
    models = {"plain": str(tmp_path / "plain"), "odd": str(tmp_path / "odd")}
    for folder in models.values():
        save_tiny_model(Path(folder), max_position_embeddings=1024)
    monkeypatch.setenv("ROTLIB_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("ROTLIB_FIGURES", str(tmp_path / "figures"))
    ran = []

    def execute(path, target, parameters, in_place):
        ran.append((path.stem, parameters))
        if parameters["model"] == models["odd"]:
            raise PapermillExecutionError(0, 1, "", "ValueError", "it can't be", [])

    monkeypatch.setattr(reproduce, "execute", execute)
    options = [part for model in models.values() for part in ("--model", model)]
    with pytest.raises(SystemExit) as ended:
        reproduce.main(["laptop", "--only", "03_optrot_w4", "90_report", *options, "--seeds", "4"])
    assert ended.value.code == 1
    assert [name for name, _ in ran] == ["03_optrot_w4", "90_report"] * 2
    assert ran[0][1] == {"seeds": [4], "model": models["plain"]}
    assert ran[1][1] == {"model": models["plain"]}
    (index,) = (tmp_path / "results").rglob("index.md")
    text = index.read_text()
    place = reproduce.folders_for([models["plain"]])[models["plain"]]
    assert f"- [03_optrot_w4]({place}/03_optrot_w4.ipynb)\n" in text
    assert text.count("ValueError: it can't be") == 2
    assert text.count("27 not run") == 2


def test_a_scale_cannot_name_a_parameter_that_a_notebook_lacks(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "bad.yaml").write_text("00_quickstart: {sedes: [1]}")
    monkeypatch.setattr(reproduce, "CONFIGS", tmp_path / "configs")
    with pytest.raises(ValueError, match="00_quickstart has no parameter 'sedes'"):
        make_plan("bad")


def check(**parameters):
    namespace = {
        "model": "smollm2-135m",
        "text": "wikipedia-mini",
        "seeds": [0],
        "check_parameters": shared.check_parameters,
    }
    exec("recipe = check_parameters()", namespace | parameters)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"sedes": [1]}, r"unknown parameter sedes \(did you mean seeds\?\)"),
        ({"seeds": "[0, 1]"}, "seeds must be of type list, not str"),
        ({"seeds": [0.5]}, "every seed in seeds must be a whole number"),
        ({"seeds": [1, 1]}, "names a seed twice"),
        ({"side_seeds": [-1]}, "every seed in side_seeds must be a whole number"),
        ({"shares": [1]}, "every share in shares must be a number between 0 and 1"),
        ({"shares": [0.5, 0.5]}, "names a share twice"),
        ({"budgets": [0]}, "every budget in budgets must be a whole number of at least 1"),
        ({"budgets": [5, 5]}, "names a budget twice"),
        ({"steps": 0}, "steps .* must be a whole number of at least 1"),
        ({"learning_windows": 0}, "learning_windows must be a whole number of at least 1"),
        ({"every": 0}, "every must be a whole number of at least 1"),
        ({"block": 0}, "block must be a whole number of at least 1"),
        ({"items": "all"}, "items must be of type int"),
        ({"items": 1}, "items must be a whole number of at least 2"),
        ({"bits": 4.0}, "bits must be of type int, not float"),
        ({"bits": 1}, "bits must be a whole number from 2 to 8"),
        ({"group_size": "per channel"}, r"group_size must be of type int \| None, not str"),
        ({"group_size": 0}, "group_size"),
        ({"compare": 1}, "compare must be of type bool, not int"),
        ({"settings": {"txt": "c4"}}, "unknown setting 'txt': choose one of text, window"),
        ({"settings": {"window": 1}}, "window must be a whole number of at least 2, not 1"),
        ({"folder": 3}, r"folder must be of type str \| None, not int"),
        ({"window": "1024"}, "window must be of type int"),
        ({"window": True}, "window must be of type int"),
        ({"text": "wiki"}, "unknown text 'wiki'"),
        ({"model": "smollm"}, "unknown model 'smollm'"),
    ],
)
def test_a_mistyped_notebook_parameter_is_one_sentence(parameters, message):
    with pytest.raises(ValueError, match=message):
        check(**parameters)


def test_a_notebooks_own_variables_do_not_disturb_a_second_check():
    namespace = {
        "model": "smollm2-135m",
        "text": "wikipedia-mini",
        "seeds": [0],
        "check_parameters": shared.check_parameters,
    }
    exec("check_parameters(); best = 0.1; check_parameters()", namespace)


def test_a_notebooks_decimals_may_differ_by_one_in_the_last_digit_and_nothing_else_may():
    Printed = runpy.run_path(str(ROOT / "notebooks" / "conftest.py"))["Printed"]
    stored = Printed("OptRot  2.2 in 30 layers")
    assert stored == Printed("OptRot  2.3 in 30 layers")
    for other in (
        "OptRot  2.4 in 30 layers",
        "OptRot  2.2 in 31 layers",
        "OptRot  2.20 in 30 layers",
        "none  2.2 in 30 layers",
        "OptRot 2.2, 2.2",
    ):
        assert stored != Printed(other)
