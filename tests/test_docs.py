"""The Python of the README and of the pages runs as it stands there, on a tiny model; numbers that
a notebook quotes are among those that it shows; a claim's page says how to run it again.
"""

import importlib.util
import json
import re
import shlex
from dataclasses import replace
from functools import lru_cache

import pytest
from conftest import save_tiny_model

from rotlib.disk import ROOT
from rotlib.study import sweep, tables
from rotlib.study.claims import claims
from rotlib.study.sweep_file import read_sweep

pytestmark = pytest.mark.slow
# own_rotation.md's example is a file in test_own.py
PAGES = ["README.md", "docs/library.md", "docs/export.md"]
# the same calls at a size that runs in seconds
SMALLER = {
    "1024": "32",
    "block=64": "block=16",
    "group_size=64": "group_size=16",
    'rotation="optrot", ': 'rotation="optrot", steps=20, ',
    "model, reference)": "model, reference, steps=4)",
    '"offline")': '"offline", limit=2)',
}


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    # zero-shot's questions are longer in few tokens
    save_tiny_model(tmp_path / "tiny", max_position_embeddings=512)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROTLIB_RESULTS", str(tmp_path / "results"))
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))
    assert code
    for here, there in SMALLER.items():
        code = code.replace(here, there)
    learned = r"(rl\.(?:optrot|optrot_plus|spinquant|ostquant)\(\s*model(?:, windows)?)"
    code = re.sub(learned, r"\1, steps=2", code)
    code = code.replace("smollm2-135m", str(tmp_path / "tiny"))
    small = f"model={str(tmp_path / 'tiny')!r}, window=32, calibration_windows=2, test_windows=2, "
    code = code.replace("rl.Recipe(", f"rl.Recipe({small}")
    if page == "docs/export.md":  # a file that SpinQuant's code has written
        code = code.replace(
            "rl.fuse(model, rl.load_rotation",
            'rl.save_rotation(rl.Rotation(rl.hadamard_rotation(model).R1, None), "R.bin")\n'
            "rl.fuse(model, rl.load_rotation",
        )
    exec(compile(code, page, "exec"), {})


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_numbers_quoted_in_a_notebook_are_among_those_it_shows(path):
    """Within rounding; those of a paragraph "Published, …" are a paper's."""
    cells = json.loads(path.read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    paragraphs = [paragraph for text in texts for paragraph in text.split("\n\n")]
    published = [paragraph for paragraph in paragraphs if "Published, " in paragraph]
    shown = " ".join([*map(_shown, cells), *published])
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", shown)]
    for paragraph in paragraphs:
        for quoted in re.findall(r"(?<![\w.\-/])\d+\.\d+(?![\w.])", paragraph):
            half = 0.5 * 10 ** -len(quoted.split(".")[1]) + 1e-9
            assert any(abs(number - float(quoted)) <= half for number in numbers), quoted


def _shown(cell):
    """What a cell of code says and prints."""
    if cell["cell_type"] != "code":
        return ""
    data = [output.get("data", {}) for output in cell["outputs"]]
    kinds = [one.get(kind, []) for one in data for kind in ("text/plain", "text/markdown")]
    printed = [output.get("text", []) for output in cell["outputs"]]
    return " ".join("".join(part) for part in (cell["source"], *kinds, *printed))


def test_the_command_on_a_claims_page_runs_its_recipe_with_the_studys_seeds_and_no_other():
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "site" / "pages.py")
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    recipes = {recipe for claim in claims(pages.MODEL) for recipe in (claim.better, claim.worse)}
    arms = {replace(arm.recipe, seed=0): arm for arm in tables.stored(recipes)}
    assert arms.keys() == recipes
    read = lru_cache(read_sweep)
    for recipe, arm in arms.items():
        _, _, _, path, *filters = shlex.split(pages.command_for(recipe))
        chosen = sweep._chosen(read(ROOT / path), filters[1::2])
        assert {replace(one, seed=0) for one in chosen} == {recipe}
        assert {one.seed for one in chosen} >= arm.values("kl").keys()
