"""A rotation of one's own, as README shows it."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import exact_logits, tiny_model

import rotlib as rl
from rotlib.disk import ROOT
from rotlib.study import engines, numerics, own, plots, store, sweep, tables
from rotlib.study.recipe import OWN
from rotlib.study.sweep_file import read_sweep


@pytest.fixture(autouse=True)
def none_registered():
    OWN.clear()
    yield
    OWN.clear()
    sys.modules.pop("cosine", None)


@pytest.fixture
def cosine(tmp_path) -> Path:
    """README's example in a file."""
    section = (ROOT / "README.md").read_text().split("### Add a rotation")[1]
    path = tmp_path / "cosine.py"
    path.write_text(section.split("```python")[1].split("```")[0])
    return path


def test_it_changes_nothing_that_the_model_computes(cosine, tokens):
    own.read_rotations(cosine)
    model = tiny_model()
    before = exact_logits(model, tokens)
    rl.fuse(model, OWN["cosine"](model, seed=1))
    assert (exact_logits(model, tokens) - before).abs().max() < 1e-9


@pytest.mark.slow
def test_a_sweep_runs_it_in_its_workers_and_the_tables_show_it_beside_hadamard(folder, cosine):
    path = folder / "sweep.yaml"
    text = path.read_text().replace("rotation: [none, hadamard]", "rotation: [hadamard, cosine]")
    path.write_text(
        "rotations: [cosine.py]\n" + text.replace("arms: [{}, {activation_bits: 8}]", "")
    )
    assert sweep.main([str(path), "--workers", "2"]) == 0  # Ray's workers: test_faults.py
    hadamard = next(recipe for recipe in read_sweep(path) if recipe.rotation == "hadamard")
    shown = tables.stored([hadamard], own=True)  # what notebooks ask for
    assert [arm.rotation for arm in shown] == ["hadamard", "cosine"]
    assert [len(arm.results) for arm in shown] == [2, 2]
    assert not any(arm.stale for arm in shown)
    assert plots._style("cosine") != plots._style("hadamard")  # figures have a mark for it
    assert [arm.rotation for arm in tables.stored([hadamard])] == ["hadamard"]


def test_its_source_and_that_of_its_helpers_decide_what_is_stale(cosine):
    own.read_rotations(cosine)
    spec = rl.Recipe(rotation="cosine").spec()
    noted = numerics.digests(numerics.stages_of(spec))
    assert numerics.changed_since(noted) == []
    cosine.write_text("# a comment above\n" + cosine.read_text())
    again = cosine.with_name("again.py")
    again.write_text(cosine.read_text())
    OWN.clear()
    own.read_rotations(again)
    assert numerics.changed_since(noted) == []
    again = cosine.with_name("another.py")
    again.write_text(cosine.read_text().replace("norm=", "type=2, norm="))
    OWN.clear()
    own.read_rotations(again)
    assert numerics.changed_since(noted) == ["rotation cosine"]
    hadamard = numerics.digests(numerics.stages_of(rl.Recipe(rotation="hadamard").spec()))
    assert numerics.changed_since(hadamard) == []


def test_results_of_one_that_is_not_registered_are_left_out_with_a_word(folder, cosine, caplog):
    own.read_rotations(cosine)
    recipe = replace(read_sweep(folder / "sweep.yaml")[0], rotation="cosine", rounding="rtn")
    rl.run(recipe)
    OWN.clear()
    assert tables.arms(store.load_results()) == []
    assert "results of the rotation 'cosine' are left out: it isn't registered" in caplog.text


def test_it_goes_to_a_worker_without_its_module(cosine):
    own.read_rotations(cosine)
    digest = own.source_digest(OWN["cosine"])
    (parcel,) = {engines._parcel([])[1]}
    OWN.clear()
    sys.modules.pop("cosine")
    cosine.unlink()
    own.unpack(parcel)
    assert own.source_digest(OWN["cosine"]) == digest
    assert OWN["cosine"](tiny_model()).orthogonality_error() < 1e-12


def test_a_name_that_is_taken_is_refused_in_one_sentence(cosine):
    for name in ("hadamard", "none", "gsr", "optrot+"):
        with pytest.raises(ValueError, match=r"one of rotlib's|a word such as"):
            rl.register_rotation(name)
    own.read_rotations(cosine)
    make = OWN["cosine"]
    rl.register_rotation("cosine")(make)  # a cell that is run again

    def another(model, seed=0, R3=False, R4=False):
        return make(model, seed + 1, R3, R4)

    with pytest.raises(ValueError, match=r"'cosine' is registered already: .* replace=True"):
        rl.register_rotation("cosine")(another)
    rl.register_rotation("cosine", replace=True)(another)
    assert OWN["cosine"] is another


def test_what_cannot_be_registered_says_why(tmp_path):
    with pytest.raises(ValueError, match="a rotation is made by a function, not by 3"):
        rl.register_rotation("three")(3)
    space = {}
    exec("def made(model, seed=0, R3=False, R4=False): ...", space)
    with pytest.raises(ValueError, match="the source of made can't be read"):
        rl.register_rotation("made")(space["made"])
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "sweep.yaml").write_text("rotations: [broken.py]\narms: [{}]")
    with pytest.raises(ValueError, match=r"line 1: broken.py can't be imported: division by zero"):
        read_sweep(tmp_path / "sweep.yaml")
    (tmp_path / "sweep.yaml").write_text("rotations: [missing.py]\narms: [{}]")
    with pytest.raises(ValueError, match=r"there is no Python file .*missing.py"):
        read_sweep(tmp_path / "sweep.yaml")
