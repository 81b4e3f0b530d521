"""A rotation of one's own, as docs/own_rotation.md shows it."""

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
    """The page's example in a file."""
    section = (ROOT / "docs" / "own_rotation.md").read_text()
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
    assert sweep.main([str(path), "--workers", "1"]) == 0  # Ray's workers: test_faults.py
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
    sys.modules.pop("rotlib_rotations_cosine")
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
    (tmp_path / "empty.py").write_text("import torch")
    (tmp_path / "sweep.yaml").write_text("rotations: [empty.py]\narms: [{}]")
    with pytest.raises(ValueError, match=r"line 1: empty.py registers no rotation: put @rl"):
        read_sweep(tmp_path / "sweep.yaml")


MAKER = """
from functools import lru_cache
import torch
import rotlib as rl

LIST, TENSOR, NUMBER = [1], torch.ones(2), 1


class Helper:
    def shift(self):
        return 1


@lru_cache
def cached():
    return 1


def maker(shift):
    def mine(model, seed=0, R3=False, R4=False, default=NUMBER):
        both = LIST[0] + TENSOR[0].item() + default + Helper().shift() + cached()
        return rl.random_rotation(model, seed + shift + int(both), R3, R4)
    return mine


mine = rl.register_rotation("mine", replace=True)(maker(1))
"""


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("maker(1))", "maker(2))"),
        ("LIST, TENSOR, NUMBER = [1],", "LIST, TENSOR, NUMBER = [2],"),
        ("torch.ones(2)", "torch.zeros(2)"),
        ("torch.ones(2), 1", "torch.ones(2), 2"),
        ("def shift(self):\n        return 1", "def shift(self):\n        return 2"),
        ("def cached():\n    return 1", "def cached():\n    return 2"),
    ],
)
def test_whatever_a_rotation_reads_of_its_module_counts(was, now, tmp_path):
    digests = []
    for name, text in (("a", MAKER), ("b", MAKER), ("c", MAKER.replace(was, now))):
        (tmp_path / f"{name}.py").write_text(text)
        own.read_rotations(tmp_path / f"{name}.py")
        digests.append(own.source_digest(OWN["mine"]))
    OWN.clear()
    first, same, other = digests
    assert first == same != other


def test_a_rotations_file_may_have_the_name_of_a_module_and_may_not_end_the_program(tmp_path):
    (tmp_path / "torch.py").write_text("")
    with pytest.raises(ValueError, match=r"torch.py registers no rotation"):
        own.read_rotations(tmp_path / "torch.py")
    assert sys.modules["torch"].__file__ != str(tmp_path / "torch.py")
    (tmp_path / "ends.py").write_text("import sys\nsys.exit()")
    with pytest.raises(ValueError, match=r"ends.py can't be imported: it ends the process"):
        own.read_rotations(tmp_path / "ends.py")


def test_replace_is_true_or_false():
    with pytest.raises(ValueError, match="replace must be True or False, not 'no'"):
        own.register_rotation("mine", replace="no")
