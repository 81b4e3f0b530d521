"""What README.md tells a reader to type."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import exact_logits, save_tiny_model, tiny_model

import rotlib as rl
from rotlib import fixed, plots, store, tables


@pytest.fixture
def new_rotation():
    """The example of "Add a rotation", as it would stand in rotlib/own.py."""
    section = (store.ROOT / "README.md").read_text().split("### Add a rotation")[1]
    before = dict(fixed.DRAWN)
    for name in before.keys() - set(store.SHIPPED):  # the reader's own
        del fixed.DRAWN[name]
    shipped = set(fixed.DRAWN)
    exec(section.split("```python")[1].split("```")[0], {})
    yield next(iter(fixed.DRAWN.keys() - shipped))
    fixed.DRAWN.clear()
    fixed.DRAWN.update(before)


def test_the_new_rotation_changes_nothing_that_the_model_computes(new_rotation, tokens):
    model = tiny_model()
    before = exact_logits(model, tokens)
    rl.fuse(model, fixed.DRAWN[new_rotation](model, seed=1))
    assert (exact_logits(model, tokens) - before).abs().max() < 1e-9


def test_the_new_rotation_runs_and_stands_in_the_tables(new_rotation, tmp_path, monkeypatch):
    save_tiny_model(tmp_path / "model")
    monkeypatch.setenv("ROTLIB_RESULTS", str(tmp_path / "results"))
    recipe = rl.Recipe(model=str(tmp_path / "model"), rotation=new_rotation, window=64, calibration_windows=2, test_windows=2)
    rl.run_all([recipe, replace(recipe, rotation="hadamard")])
    hadamard = replace(recipe, rotation="hadamard")
    shown = tables.stored([hadamard], own=True)  # what notebooks ask for
    assert [arm.rotation for arm in shown] == ["hadamard", new_rotation]
    assert plots._style(new_rotation) != plots._style("hadamard")  # figures have a mark for it
    assert [arm.rotation for arm in tables.stored([hadamard])] == ["hadamard"]  # what claims are judged on


def test_the_new_rotation_makes_no_other_rotations_results_stale(new_rotation, monkeypatch):
    before = {name: store.code_fingerprint("quantize", name) for name in ("none", "hadamard", "optrot", new_rotation)}
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **how: read(path, **how) + "x = 1" * (path.name == "own.py"))
    store.code_fingerprint.cache_clear()
    after = {name: store.code_fingerprint("quantize", name) for name in before}
    store.code_fingerprint.cache_clear()
    assert [name for name in before if before[name] != after[name]] == [new_rotation]
