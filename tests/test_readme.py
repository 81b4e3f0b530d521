"""What README.md tells a reader to type."""

import pytest
from conftest import exact_logits, save_tiny_model, tiny_model

import rotlib as rl
from rotlib import fixed, store, tables


@pytest.fixture
def new_rotation(monkeypatch):
    """The example of "Add a rotation", as it would stand in rotlib/fixed.py."""
    section = (store.ROOT / "README.md").read_text().split("### Add a rotation")[1]
    namespace = vars(fixed) | {"DRAWN": {}}
    exec(section.split("```python")[1].split("```")[0], namespace)
    ((name, rotation),) = namespace["DRAWN"].items()
    monkeypatch.setitem(fixed.DRAWN, name, rotation)
    return name


def test_the_new_rotation_changes_nothing_that_the_model_computes(new_rotation, tokens):
    model = tiny_model()
    before = exact_logits(model, tokens)
    rl.fuse(model, fixed.DRAWN[new_rotation](model, seed=1))
    assert (exact_logits(model, tokens) - before).abs().max() < 1e-9


def test_the_new_rotation_runs_and_stands_in_the_tables(new_rotation, tmp_path, monkeypatch):
    save_tiny_model(tmp_path / "model")
    monkeypatch.setenv("ROTLIB_RESULTS", str(tmp_path / "results"))
    recipe = rl.Recipe(model=str(tmp_path / "model"), rotation=new_rotation, window=64, calibration_windows=2, test_windows=2)
    assert f"| {new_rotation} |" in tables.markdown(tables.arms([rl.run(recipe)]))
