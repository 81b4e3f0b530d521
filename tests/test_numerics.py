"""What makes a result stale, and what doesn't."""

import ast
import importlib
import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from mutants import MUTANTS

import rotlib as rl
from rotlib.disk import ROOT
from rotlib.study import canaries, numerics, renew, store
from rotlib.study.recipe import rotations

NUMERIC = ("rotations", "quantization", "learning", "measure")
FOLDER = ROOT / "rotlib"
# constants that decide how fast something is computed, or how it is named, and not what
NOT_NUMBERS = {
    *(
        "BLOCK",
        "_STRIP",
        "_BLOCK",
        "_CHUNK",
        "CHUNK",
        "_LOGITS",
        "ATTENTION",
        "_HEADS",
        "_SYLVESTER",
        "_ONE",
        "LEAST_CAP",
    ),
    *(
        "_SENTENCE_END",
        "_SENTENCE",
        "_LAST_WORD",
        "_SIX",
        "_EIGHT",
        "FULL",
        "METHODS",
        "SITES",
        *("MOST_SWEEPS", "MOST_ROWS"),
    ),
    *("LEAST_INPUT", "_OUT_OF_RANGE"),
    *("TOKENS_PER_INPUT", "_INDICES", "_SIGNS", "_DAMAGE", "_R2", "_AXES", "UNIT_SPAN"),
    "LEAST_COSINE",
    "MOST_OFF",
    "MOST_SWEEPS",
}


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    """A copy of numerics.json that a test may spoil."""
    path = tmp_path / "numerics.json"
    path.write_text(numerics.FILE.read_text())
    monkeypatch.setattr(numerics, "FILE", path)
    numerics.forget()
    yield path
    numerics.forget()


@pytest.mark.parametrize("stage", canaries.CANARIES)
def test_a_stage_computes_what_its_entry_says(stage):
    assert numerics.drift(stage) is None


@pytest.mark.parametrize("stage", canaries.INPUTS)
def test_packaged_models_and_texts_are_the_same_bytes_everywhere(stage):
    assert numerics.drift(stage) is None


def test_every_entry_has_a_canary_and_every_canary_an_entry():
    assert set(numerics.entries()) == {*canaries.CANARIES, *canaries.INPUTS}


@pytest.mark.slow
def test_every_mutant_of_the_numeric_code_is_seen_and_no_refactor_is():
    script = Path(__file__).with_name("mutants.py")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    assert found.pop("all refactors") == []
    assert len(found) == len(MUTANTS) >= 25
    assert [name for name, stages in found.items() if not stages] == []


@pytest.mark.slow
def test_the_canaries_run_nine_tenths_of_the_numeric_code(tmp_path):
    """Lines that raise an error, and lines of protocols, compute nothing."""
    (tmp_path / "run.py").write_text(
        "from rotlib.study.canaries import CANARIES\n"
        "for canary in CANARIES.values():\n    canary.numbers()\n"
    )
    (tmp_path / "rc").write_text("[report]\nexclude_also =\n    raise \n    \\.\\.\\.$\n")
    source = ",".join(f"rotlib.{package}" for package in NUMERIC)
    coverage = [sys.executable, "-m", "coverage"]
    how = {"cwd": tmp_path, "check": True, "capture_output": True}
    subprocess.run([*coverage, "run", "--source", source, "run.py"], **how)
    subprocess.run([*coverage, "json", "--rcfile", "rc", "-o", "report.json"], **how)
    report = json.loads((tmp_path / "report.json").read_text())
    missing = {name: file["missing_lines"] for name, file in report["files"].items()}
    assert report["totals"]["percent_covered"] >= 90, missing


@pytest.mark.slow
def test_every_annotation_holds_wherever_a_canary_goes():
    """Types and shapes, checked by jaxtyping and beartype."""
    script = (
        "from jaxtyping import install_import_hook\n"
        "install_import_hook('rotlib', 'beartype.beartype')\n"
        "from rotlib.study.canaries import CANARIES\n"
        "for canary in CANARIES.values(): canary.numbers()\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=False, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_every_constant_of_the_numeric_code_is_declared_beside_a_canary():
    declared = {
        node.attr
        for path in (FOLDER / "study" / "canaries").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    for package in NUMERIC:
        for path in sorted((FOLDER / package).glob("*.py")):
            for node in ast.parse(path.read_text()).body:
                targets = node.targets if isinstance(node, ast.Assign) else ()
                names = {name.id for name in targets if isinstance(name, ast.Name)}
                constants = {name for name in names if name.isupper()} - NOT_NUMBERS
                assert constants <= declared, f"{path.name}: {constants - declared}"


def test_a_result_reads_the_stages_of_its_own_computation_and_no_others():
    def stages(**settings):
        return set(numerics.stages_of(rl.Recipe(**settings).spec()))

    plain = stages()
    assert {"evaluation", "covariance", "grids", "gptq", "recipe", "text"} <= plain
    assert {"smollm2-135m", "wikipedia-mini"} <= plain
    assert stages(model="org/model", text="c4") == plain - {"smollm2-135m", "wikipedia-mini"}
    assert stages(rounding="rtn") == plain - {"covariance", "gptq"}
    assert stages(rotation="hadamard") - plain == {"drawn rotations", "fusing"}
    assert stages(asymmetry=0.25) - plain == {"gptaq"}
    assert stages(activation_bits=8) - plain == {"activations"}
    assert stages(R4=True) - plain == {"online rotations"}
    optrot = stages(rotation="optrot") - stages(rotation="hadamard")
    assert optrot == {"objective", "row sampling", "descent"}
    assert "grouped" in stages(rotation="optrot", grouped=True, group_size=64)
    assert "ostquant" in stages(rotation="ostquant")
    shares = {"mixed": {"activation_share": 0.5}}
    for rotation in rotations():
        assert numerics.unknown(stages(rotation=rotation, **shares.get(rotation, {}))) == []


def test_every_committed_result_notes_the_stages_it_reads_and_none_is_stale():
    for path in sorted((ROOT / "results" / "study").glob("*.json")):
        result = store.read(path)
        assert sorted(result.provenance["stages"]) == numerics.stages_of(result.spec)
        assert not result.stale, path.name


def test_a_run_on_code_that_computes_something_else_is_refused_with_what_to_do(monkeypatch):
    grids = importlib.import_module("rotlib.quantization.grids")
    canary = canaries.CANARIES["grids"]
    numerics.forget()
    changed = {**canary.constants, "clip_norm": 2.5}
    monkeypatch.setitem(
        canaries.CANARIES, "grids", canaries.Canary(canary.numbers, changed, canary.tolerance)
    )
    with pytest.raises(
        ValueError, match=r"the stage 'grids' .* clip_norm is 2\.5, not 2\.4\."
    ) as e:
        numerics.check(["text", "grids"])
    assert "run `make numerics`" in str(e.value)
    assert "torch" in str(e.value)
    monkeypatch.undo()
    numerics.forget()
    monkeypatch.setitem(grids.SHORT_OF, "half", 0.4)
    assert "is" in numerics.drift("grids")  # the numbers tell as well
    numerics.forget()


def test_make_numerics_keeps_what_agrees_and_says_what_becomes_stale(own_file, monkeypatch, capsys):
    for name, canary in canaries.CANARIES.items():  # computed once for all that is asked here
        once = replace(canary, numbers=cache(canary.numbers))
        monkeypatch.setitem(canaries.CANARIES, name, once)
    before = own_file.read_bytes()
    assert renew.main([]) == 0
    assert own_file.read_bytes() == before

    canary = canaries.CANARIES["fusing"]
    more = {**canary.constants, "new": 1}
    monkeypatch.setitem(
        canaries.CANARIES, "fusing", canaries.Canary(canary.numbers, more, canary.tolerance)
    )
    reasons = {name: entry["reasons"] for name, entry in numerics.entries().items()}
    digest = numerics.entries()["fusing"]["digest"]
    assert renew.main([]) == 0  # a new constant makes nothing stale, and needs no reason
    assert numerics.entries()["fusing"]["digest"] == digest
    assert numerics.entries()["fusing"]["constants"]["new"] == 1

    other = {**more, "new": 2}
    monkeypatch.setitem(
        canaries.CANARIES, "fusing", canaries.Canary(canary.numbers, other, canary.tolerance)
    )
    numerics.forget()
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    before = own_file.read_bytes()
    with pytest.raises(SystemExit):
        renew.main([])
    assert own_file.read_bytes() == before
    printed = capsys.readouterr()
    assert "fusing: new is 2, not 1; " in printed.out
    assert "say why: make numerics REASON='...'" in printed.err
    assert renew.main(["--reason", "twice as new"]) == 0
    entry = numerics.entries()["fusing"]
    assert entry["digest"] != digest
    assert entry["reasons"][-1]["reason"] == "twice as new"
    assert entry["reasons"][-1]["was"] == digest
    others = [name for name in numerics.entries() if name != "fusing"]
    assert all(numerics.entries()[name]["reasons"] == reasons[name] for name in others)


def test_a_file_that_was_edited_by_hand_or_is_of_another_version_is_refused(own_file):
    text = own_file.read_text()
    own_file.write_text(text.replace('"clip_norm": 2.4', '"clip_norm": 2.5'))
    with pytest.raises(
        ValueError, match=r"numerics\.json was changed by hand: restore it with git"
    ):
        numerics.entries()
    own_file.write_text(text[:-100])
    with pytest.raises(ValueError, match=r"numerics\.json was changed by hand"):
        numerics.entries()
    own_file.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="has the format 2 and this version of rotlib reads 1"):
        numerics.entries()


def test_a_result_with_an_unknown_stage_is_one_sentence_with_its_file(tmp_path):
    path = tmp_path / "quantize-0.json"
    store.save(store.Result({"task": "quantize"}, {}, {}, 0, {"stages": {"astrology": "0"}}), path)
    with pytest.raises(ValueError, match=r"quantize-0\.json notes the stage 'astrology'"):
        store.read(path)
