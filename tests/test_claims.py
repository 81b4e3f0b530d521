import hashlib
import json
from dataclasses import replace

import pandas
import pytest

from rotlib.study import claims, files, numerics, store, tables
from rotlib.study.claims import Claim
from rotlib.study.recipe import Recipe


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Three made-up seeds of two arms, in a store and a folder of figures of their own."""
    monkeypatch.setenv("ROTLIB_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("ROTLIB_FIGURES", str(tmp_path / "figures"))
    for rotation, kls in {"hadamard": (0.3, 0.32, 0.31), "optrot": (0.2, 0.21, 0.19)}.items():
        for seed, kl in enumerate(kls):
            recipe = Recipe(rotation=rotation, seed=seed)
            stages = {"stages": numerics.digests(numerics.stages_of(recipe.spec()))}
            metrics = {"kl": kl, "perplexity": 20 + kl, "reference_perplexity": 20.0}
            result = store.Result(recipe.spec(), metrics, {}, 0, stages)
            store.save(result, files.local_path(recipe.spec()))
    return tmp_path


def test_every_claim_has_a_verdict_or_says_that_it_was_not_run(results):
    found, used = claims.verdicts("smollm2-135m")
    assert len(found) == len(claims.claims("smollm2-135m"))
    by_claim = found.set_index(["claim", "setting"])
    row = by_claim.loc[("OptRot is better than Hadamard", "W4A16 GPTQ")]
    assert row["verdict"] == "reproduced"
    assert row["effect, nats"] == pytest.approx(0.11)
    assert row["KL, %"] == pytest.approx(-35.5, abs=0.1)
    assert row["from"] < row["KL, %"] < row["to"] < 0
    assert row["seeds"] == 3
    assert not row["stale"]
    assert by_claim.loc[("OptRot is better than SpinQuant", "W4A16 GPTQ"), "verdict"] == "not run"
    assert {arm.rotation for arm in used} == {"hadamard", "optrot"}


def test_arms_without_a_seed_in_common_decide_nothing(results):
    for path in files.results_folder().glob("local/*.json"):
        if (
            json.loads(path.read_text())["spec"] != Recipe(rotation="optrot", seed=2).spec()
            and "optrot" in path.read_text()
        ):
            path.unlink()
    files.local_path(Recipe(rotation="hadamard", seed=2).spec()).unlink()
    found, _ = claims.verdicts("smollm2-135m")
    assert set(found["verdict"]) == {"not run"}


def test_the_claims_of_a_paper_are_judged_together(results, monkeypatch):
    one = Claim("OptRot", "once", Recipe(rotation="optrot"), Recipe(rotation="hadamard"))
    alone = [one, replace(one, paper="GSR")]
    monkeypatch.setattr(claims, "claims", lambda model, settings: alone)
    single = claims.verdicts("smollm2-135m")[0]["adjusted p"]
    assert single[0] == single[1]
    monkeypatch.setattr(claims, "claims", lambda model, settings: [*alone, replace(one, text="b")])
    together = claims.verdicts("smollm2-135m")[0]["adjusted p"]
    assert together.tolist() == pytest.approx([2 * single[0], single[0], 2 * single[0]])


def test_the_noise_of_every_class_is_told_with_what_seeds_can_show(results):
    told = claims.noise_by_class("smollm2-135m").set_index("class")
    row = told.loc["W4A16 GPTQ"]
    assert row["arms"] == 2
    assert row["degrees of freedom"] == pytest.approx(2)
    assert row["3 seeds, %"] > row["5 seeds, %"] > row["10 seeds, 32 windows, %"] > 0


def test_the_claims_are_about_arms_that_differ_in_what_is_claimed_alone():
    for claim in claims.claims("smollm2-135m"):
        better, worse = claim.better.spec(), claim.worse.spec()
        differing = {
            name for name in better.keys() | worse.keys() if better.get(name) != worse.get(name)
        }
        assert differing <= {"rotation", "steps", "R1_order", "block", "start"}, claim


def test_a_claim_takes_its_model():
    assert {claim.better.model for claim in claims.claims("org/model")} == {"org/model"}
    theirs = {"text": "wikitext2", "window": 2048, "calibration_windows": 128}
    assert {
        (claim.worse.text, claim.worse.calibration_windows)
        for claim in claims.claims("org/model", theirs)
    } == {("wikitext2", 128)}
    rivals = claims.claims("org/model", {"learning_windows": 800, "preset": "paper", "steps": None})
    presets = {(claim.worse.rotation, claim.worse.preset, claim.worse.steps) for claim in rivals}
    assert {("spinquant", "paper", None), ("hadamard", "laptop", None)} <= presets
    assert isinstance(claims.claims("org/model")[0], Claim)


def test_published_figures_stand_in_columns_of_their_own_with_their_model(results):
    frame, _ = claims.compared("smollm2-135m", "OptRot")
    published = [column for column in frame.columns if "paper" in column]
    assert published
    assert all("Llama" in column for column in published)
    measured = frame.set_index("rotation").loc["optrot", "smollm2-135m, W4A16 GPTQ"]
    assert measured == "0.200 ± 0.006 (20.20)"
    assert not any(
        "OptRot's paper" in column for column in frame.columns
    )  # its tables were not available


def test_tables_come_in_three_forms_and_the_manifest_names_what_they_were_made_from(results):
    found, used = claims.verdicts("smollm2-135m")
    digests = []
    for _ in range(2):
        claims.save_table(found, "claims")
        folder = results / "figures"
        (folder / "other.png").write_text("redrawn")
        claims.save_manifest({"claims": used}, {"other": ["figures/other.json", "quantize-1.json"]})
        digests.append(
            {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        )
    assert digests[0] == digests[1]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"claims.md", "claims.csv", "claims.tex", "other.png"}
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == digests[0][name]
        assert len(entry["results"]) == (2 if name == "other.png" else 6)
        for result, digest in entry["results"].items():
            path = files.results_folder() / "local" / result
            assert digest == (
                None if name == "other.png" else hashlib.sha256(path.read_bytes()).hexdigest()
            )  # those aren't in this store
    assert len(pandas.read_csv(folder / "claims.csv")) == len(found)
    assert (folder / "claims.tex").read_text().startswith("\\begin{tabular}")


def test_the_tables_can_say_what_results_were_computed_with(results):
    kept = store.load_results()
    for number, result in enumerate(kept):
        result.provenance |= {"versions": {"torch": "2.13.0"}, "model_commit": None}
        if number == 0:
            result.provenance |= {"unverified": "its commit is gone", "model_commit": "abc"}
    said = tables.provenance(kept)
    assert said == "6 results, 1 unverified, made with: model commit abc (1), torch 2.13.0 (6)"
