import gc
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from itertools import product

import pytest
import torch
from conftest import save_short_text, save_tiny_model

import rotlib as rl
from rotlib import disk
from rotlib.models.content import weights_sample
from rotlib.models.families import Family
from rotlib.study import diagnostics, files, numerics, store, tables
from rotlib.study.recipe import READS, rotations

pipeline = importlib.import_module("rotlib.study.pipeline")


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe on a tiny model and a short text, with a store of its own."""
    save_tiny_model(tmp_path / "model", "qwen3, tied")
    save_short_text(tmp_path)
    monkeypatch.setenv("ROTLIB_DATA", str(tmp_path))
    monkeypatch.setenv("ROTLIB_RESULTS", str(tmp_path / "results"))
    windows = {"window": 64, "calibration_windows": 2, "test_windows": 2}
    return rl.Recipe(model=str(tmp_path / "model"), text="wikitext2", **windows)


def test_only_non_defaults_name_a_recipe():
    assert rl.Recipe().spec() == {"task": "quantize"}
    assert rl.Recipe(bits=4, seed=0, rotation="optrot").spec() == {
        "task": "quantize",
        "rotation": "optrot",
    }
    assert files.spec_hash({"a": 1, "b": 2}) == files.spec_hash({"b": 2, "a": 1})


def test_every_result_says_what_ran_where_on_which_tokens(recipe):
    result = rl.run(replace(recipe, rotation="optrot"))
    assert {"load", "rotate", "fuse", "quantize", "evaluate"} == set(result.seconds)
    assert result.metrics["fallbacks"] == 0
    assert result.metrics["kl"] > 0
    assert len(result.metrics["kl_windows"]) == 2
    assert result.peak_memory_mb > 1
    assert set(result.provenance) == {
        "commit",
        "uncommitted_changes",
        "stages",
        "versions",
        "device",
        "content",
        "tokens",
        "weights",
        "model_commit",
    }
    assert all(len(digest) == 64 for digest in result.provenance["tokens"].values())
    assert not result.stale
    assert tables.recipe_of(result) == replace(recipe, rotation="optrot")


def test_a_finished_recipe_is_not_computed_twice(recipe, monkeypatch):
    first = rl.run(recipe)
    monkeypatch.setattr(pipeline, "_compute", lambda *_: pytest.fail("computed again"))
    assert rl.run(recipe) == first


def test_a_changed_stage_makes_the_results_stale_that_read_it_and_they_are_run_again(
    recipe, monkeypatch
):
    plain, rotated = rl.run_all([recipe, replace(recipe, rotation="hadamard")])
    changed = {name: dict(entry) for name, entry in numerics.entries().items()}
    changed["fusing"]["digest"] = "another"
    monkeypatch.setattr(numerics, "entries", lambda: changed)
    assert not plain.stale
    assert rotated.stale
    assert store.find(rotated.spec) is None
    assert "stale" in tables.markdown(tables.arms(store.load_results()))


def test_this_machines_results_win_over_the_committed_ones(recipe):
    rl.run(recipe)
    local = files.local_path(recipe.spec())
    committed = files.results_folder() / "study" / local.name
    committed.parent.mkdir()
    other = json.loads(local.read_text()) | {"peak_memory_mb": 0.5}
    committed.write_text(json.dumps(other))
    assert store.load_results()[0].peak_memory_mb > 1
    local.unlink()
    assert store.load_results()[0].peak_memory_mb == 0.5
    assert (
        store.find(recipe.spec()) is None
    )  # a committed result is shown, but this machine still computes its own


def test_a_failed_write_leaves_neither_half_a_file_nor_the_old_one_broken(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")

    def fail(scratch):
        scratch.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        disk.write_atomically(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert path.read_text() == "old"


@pytest.mark.slow
def test_a_killed_run_leaves_no_result_and_the_next_one_finishes(recipe):
    settings = [vars(recipe), vars(replace(recipe, seed=1))]
    script = f"import rotlib as rl; rl.run_all([rl.Recipe(**how) for how in {settings!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ, stderr=subprocess.DEVNULL
    )
    first = files.local_path(recipe.spec())
    deadline = time.time() + 120
    while not first.exists() and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = first.stat().st_mtime_ns
    results = rl.run_all([recipe, replace(recipe, seed=1)])
    assert first.stat().st_mtime_ns == written  # the finished run was kept
    assert len(results) == len(store.load_results()) == 2
    assert all(result.metrics["kl"] > 0 for result in results)


def test_a_corrupt_result_is_named(recipe):
    rl.run(recipe)
    path = files.local_path(recipe.spec())
    path.write_text("{")
    with pytest.raises(ValueError, match=f"{path.name} isn't a result"):
        rl.run(recipe)


def test_groups_that_do_not_fit_are_refused_before_anything_is_learned(recipe, monkeypatch):
    monkeypatch.setattr(pipeline, "optrot", lambda *_, **__: pytest.fail("learned first"))
    with pytest.raises(ValueError, match="group_size 7 doesn't divide"):
        rl.run(replace(recipe, rotation="optrot", group_size=7))


def test_an_unwritable_store_is_refused_before_any_work(recipe, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ROTLIB_RESULTS", str(tmp_path / "file"))
    monkeypatch.setattr(pipeline, "_compute", lambda *_: pytest.fail("computed first"))
    with pytest.raises(ValueError, match="let ROTLIB_RESULTS name a writable folder"):
        rl.run(recipe)


def test_a_damaged_kept_rotation_is_learned_anew(recipe):
    model, _ = rl.load(recipe.model)
    rl.make_rotation(replace(recipe, rotation="optrot"), model)
    (path,) = files.results_folder().glob("local/rotation-*.pt")
    path.write_bytes(b"half")
    rotation, _ = rl.make_rotation(replace(recipe, rotation="optrot"), model)
    assert rotation.R1.shape == (48, 48)


def test_a_learned_rotation_is_learned_once(recipe, monkeypatch):
    model, _ = rl.load(recipe.model)
    first, seconds = rl.make_rotation(replace(recipe, rotation="optrot"), model)
    monkeypatch.setattr(pipeline, "optrot", lambda *_, **__: pytest.fail("learned again"))
    again, kept_seconds = rl.make_rotation(replace(recipe, rotation="optrot", bits=3), model)
    assert torch.equal(first.R1, again.R1)
    assert kept_seconds == seconds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"rotation": "hadamrd"},
            "unknown rotation 'hadamrd': choose one of none, random, hadamard, gsr, optrot",
        ),
        ({"rounding": "awq"}, "unknown rounding 'awq'"),
        ({"text": "wiki"}, "unknown text 'wiki'"),
        ({"bits": 9}, "bits must be"),
        ({"window": 1}, "window must be a whole number of at least 2"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"calibration_windows": True}, "calibration_windows must be"),
        ({"symmetric": "no"}, "symmetric must be True or False"),
        ({"act_order": "no"}, "act_order must be True or False"),
        (
            {"act_order": True, "rounding": "rtn"},
            "act_order orders GPTQ's columns: it needs rounding 'gptq'",
        ),
        (
            {"steps": 5, "rotation": "kurtail"},
            r"steps belongs to the rotations optrot, optrot\+, spinquant, ostquant, "
            r"not to 'kurtail'",
        ),
        (
            {"steps": 0, "rotation": "optrot"},
            r"steps \(unless it is None\) must be a whole number of at least 1",
        ),
        ({"form": "sum", "rotation": "optrot+"}, "unknown form 'sum'"),
        ({"learning_windows": 4}, "learning_windows belongs to the rotations"),
        (
            {"learned_on": "activations", "rotation": "spinquant"},
            "learned_on 'activations' needs activation_bits, kv_bits or learned_bits",
        ),
        (
            {"rounding": "none", "rotation": "ostquant"},
            "learned_on 'weights' needs weights that are rounded",
        ),
        (
            {"preset": "gpu", "rotation": "spinquant"},
            "unknown preset 'gpu': choose one of paper, laptop",
        ),
        ({"asymmetry": 0.25, "rounding": "rtn"}, "asymmetry corrects GPTQ for its inputs' drift"),
        ({"asymmetry": 2}, "asymmetry must be a number from 0 to 1, not 2"),
        ({"rotation": "mixed"}, "activation_share must be a number between 0 and 1"),
        (
            {"activation_share": 0.5},
            "activation_share belongs to the rotations mixed, not to 'none'",
        ),
        ({"R3": True}, "R3 turns keys for their quantizer: it needs kv_bits below 16"),
        ({"R4": "yes"}, "R4 must be True or False"),
        (
            {"activation_bits": 12},
            "activation_bits must be a whole number from 2 to 8, or 16 to leave them alone, not 12",
        ),
        ({"kv_bits": 1}, "kv_bits must be"),
        ({"sinks": 1}, "sinks needs activation_bits below 16"),
        ({"activation_bits": 4, "sinks": -1}, "sinks must be a whole number of at least 0"),
        ({"protocol": "quarot"}, "protocol says how activations are rounded"),
        (
            {"order": "activations-first"},
            "order needs rounding 'gptq', and activation_bits or kv_bits below 16",
        ),
        ({"order": "both"}, "unknown order 'both': choose one of weights-first, activations-first"),
        (
            {"rounding": "none", "bits": 3},
            "bits belongs to rounded weights, not to rounding 'none'",
        ),
        ({"model": None}, "named by a string"),
    ],
)
def test_a_recipe_outside_the_choices_is_refused_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        rl.Recipe(**arguments)


def test_one_gptq_serves_every_precision_of_the_activations(recipe, monkeypatch):
    runs = [
        replace(recipe, rotation="hadamard", R4=True, activation_bits=bits) for bits in (16, 8, 4)
    ]
    runs.append(replace(runs[-1], kv_bits=4, R3=True))
    assert [run.precision for run in runs] == ["W4A16", "W4A8", "W4A4", "W4A4KV4"]
    rl.run(runs[0])
    monkeypatch.setattr(pipeline, "gptq", lambda *_, **__: pytest.fail("quantized again"))
    together = [result.metrics["kl"] for result in rl.run_all(runs)]
    assert len(set(together)) == 4
    for run in runs[1:]:
        files.local_path(run.spec()).unlink()
    assert [rl.run(run).metrics["kl"] for run in runs] == together  # alone, from the kept weights


def test_kept_weights_are_the_quantized_ones_to_the_last_bit(recipe, monkeypatch):
    runs = [
        replace(recipe, rotation="hadamard", **grid)
        for grid in (
            {},
            {"group_size": 8, "symmetric": False},
            {"group_size": 4, "act_order": True},
        )
    ]
    first = [result.metrics["kl_windows"][:1] for result in rl.run_all(runs)]
    monkeypatch.setattr(pipeline, "gptq", lambda *_, **__: pytest.fail("quantized again"))
    again = [
        result.metrics["kl_windows"]
        for result in rl.run_all(replace(run, test_windows=1) for run in runs)
    ]
    assert again == first


def numbers_of(result):
    """What a run measured, but for the memory it took."""
    return {name: n for name, n in result.metrics.items() if name != "learning_memory_mb"}


@pytest.mark.parametrize("asymmetry", [0.0, 0.25])
def test_an_interrupted_gptq_goes_on_from_the_last_finished_layer(recipe, monkeypatch, asymmetry):
    run = replace(recipe, rotation="optrot", steps=5, group_size=8, asymmetry=asymmetry)
    undisturbed = numbers_of(rl.run(run))
    for path in (*files.results_folder().glob("local/weights-*.pt"), files.local_path(run.spec())):
        path.unlink()
    gptq = importlib.import_module("rotlib.quantization.gptq")
    quantize, layers = gptq._quantize_layer, []

    def interrupted(family, layer, *rest):
        layers.append(layer)
        if layers == [0, 1]:
            raise KeyboardInterrupt
        return quantize(family, layer, *rest)

    monkeypatch.setattr(gptq, "_quantize_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rl.run(run)
    assert len(list(files.results_folder().glob("local/*.layer-*.pt"))) == 1
    assert numbers_of(rl.run(run)) == undisturbed
    assert layers == [0, 1, 1]
    assert not list(files.results_folder().glob("local/*.layer-*.pt"))


def test_kept_weights_are_not_put_under_another_rotation(recipe):
    run = replace(recipe, rotation="optrot", steps=5)
    rl.run(run)
    kept = files.local_path({"task": "rotation"} | run.rotation_reads, ".pt")
    parts = torch.load(kept)
    parts["rotation"]["R1"] = parts["rotation"]["R1"].flip(
        1
    )  # as good a rotation, and not the one the weights were quantized under
    torch.save(parts, kept)
    beside = replace(run, activation_bits=8)
    under_the_other = rl.run(beside).metrics["kl"]
    for path in (*kept.parent.glob("weights-*.pt"), files.local_path(beside.spec())):
        path.unlink()
    assert rl.run(beside).metrics["kl"] == under_the_other


def test_a_full_disk_costs_the_kept_weights_and_not_the_result(recipe, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(UserWarning, match="couldn't be written, so it won't be reused"):
        assert rl.run(recipe).metrics["kl"] > 0


def test_one_model_is_held_at_a_time(recipe, monkeypatch):
    alive = weakref.WeakSet()
    counts = []

    def counting(*arguments):
        model, tokenizer = rl.load(*arguments)
        alive.add(model)
        gc.collect()
        counts.append(len(alive))
        return model, tokenizer

    monkeypatch.setattr(pipeline, "load", counting)
    rl.run_all(
        [
            recipe,
            replace(recipe, rotation="hadamard"),
            replace(recipe, rotation="hadamard", test_windows=1),
        ]
    )
    assert counts == [1, 1, 1]


def test_only_what_leaves_the_weights_alone_shares_them(recipe):
    run = replace(recipe, rotation="hadamard", activation_bits=4, kv_bits=4, R4=True)
    for change in (
        {"R3": True},
        {"kv_bits": 8},
        {"activation_bits": 8},
        {"protocol": "quarot"},
        {"sinks": 1},
    ):
        assert replace(run, **change).sharing_weights() == run.sharing_weights()
        seen = replace(run, order="activations-first")
        assert replace(seen, **change).sharing_weights() != seen.sharing_weights()
    for change in (
        {"R4": False},
        {"bits": 3},
        {"seed": 1},
        {"act_order": True},
        {"calibration_windows": 1},
    ):
        assert replace(run, **change).sharing_weights() != run.sharing_weights()


RIVAL = {"window": 32, "learning_windows": 6, "steps": 2}


@pytest.mark.parametrize("rotation", ["optrot+", "spinquant", "ostquant"])
def test_a_rotation_learned_on_data_is_a_recipe_like_any_other(recipe, rotation):
    result = rl.run(replace(recipe, rotation=rotation, **RIVAL))
    assert result.metrics["learning_tokens"] == 6 * 32
    assert result.metrics["learning_memory_mb"] > 0
    assert result.metrics["kl"] > 0
    again = rl.run(replace(recipe, rotation=rotation, rounding="rtn", **RIVAL))
    assert (
        again.metrics["objective_history"] == result.metrics["objective_history"]
    )  # kept, not learned again
    assert again.seconds["rotate"] == result.seconds["rotate"]


def test_the_last_good_rotation_of_a_failed_learning_is_kept(recipe, monkeypatch):
    def fail(model, *_, **__):
        raise rl.LearningFailed(
            "the loss is nan at step 3", rl.hadamard_rotation(model, 7) if good else None
        )

    monkeypatch.setattr(pipeline, "spinquant", fail)
    for good in (False, True):
        with pytest.raises(rl.LearningFailed, match="at step 3"):
            rl.run(replace(recipe, rotation="spinquant", **RIVAL))
        assert len(list(files.results_folder().glob("local/*.last-good.pt"))) == good
    assert not list(files.results_folder().glob("local/*.json"))


def test_a_kept_rotation_brings_its_scales(recipe):
    model, _ = rl.load(recipe.model)
    run = replace(recipe, rotation="ostquant", **RIVAL)
    first, again = (rl.make_rotation(run, model)[0] for _ in range(2))
    assert set(first.scales) == {"attention_norm", "mlp_norm", "up", "value", "query_key"}
    assert all(torch.equal(first.scales[name], again.scales[name]) for name in first.scales)


def test_what_a_network_is_rounded_to_while_learning_tells_rotations_apart(recipe):
    run = replace(recipe, rotation="spinquant", activation_bits=4)
    assert replace(run, activation_bits=8).rotation_reads == run.rotation_reads
    assert replace(run, bits=3).rotation_reads != run.rotation_reads
    assert replace(run, activation_bits=8).sharing_weights() == run.sharing_weights()
    seen = replace(run, learned_on="activations")
    assert replace(seen, activation_bits=8).rotation_reads != seen.rotation_reads
    assert replace(seen, bits=3).rotation_reads == seen.rotation_reads
    assert replace(seen, activation_bits=8).sharing_weights() != seen.sharing_weights()


def test_bounds_are_kept_like_runs_and_read_only_what_they_need(recipe, monkeypatch):
    run = replace(recipe, rotation="hadamard", clip_search=False)
    result = rl.bounds(run)
    assert [(module["layer"], module["site"]) for module in result.metrics["modules"]] == list(
        product(range(2), Family.linear_paths)
    )
    for module in result.metrics["modules"]:
        assert module["floor"] < module["tr_D"] < 1.02 * module["tr_H"]
        assert 0 < module["gptq_error"] < module["rtn_bound"]
    monkeypatch.setattr(diagnostics, "module_bounds", lambda *_: pytest.fail("computed again"))
    assert rl.bounds(replace(run, activation_bits=4, test_windows=5)) == result


def test_the_order_of_weights_and_activations_is_in_the_result(recipe):
    runs = [
        replace(recipe, activation_bits=4, order=order)
        for order in ("weights-first", "activations-first")
    ]
    results = rl.run_all(runs)
    assert [result.metrics["order"] for result in results] == ["weights-first", "activations-first"]
    assert results[0].metrics["kl"] != results[1].metrics["kl"]


def test_unrounded_weights_with_unrounded_activations_are_the_original(recipe):
    run = replace(recipe, rotation="hadamard", R4=True, rounding="none")
    assert run.precision == "W16A16"
    assert rl.run(run).metrics["kl"] < 1e-6
    assert rl.run(replace(run, activation_bits=4)).metrics["kl"] > 1e-5


@pytest.mark.slow
def test_every_rotation_runs_as_a_recipe(recipe):
    own = {name: {"steps": 8} for name, read in READS.items() if "steps" in read}
    own |= {"mixed": {"activation_share": 0.5}}
    runs = [
        replace(recipe, rotation=name, R4=True, activation_bits=4, **own.get(name, {}))
        for name in rotations()
    ]
    assert all(result.metrics["kl"] > 0 for result in rl.run_all(runs))


def test_outliers_are_kept_like_runs(recipe):
    result = rl.outliers(replace(recipe, rotation="random"))
    assert len(result.metrics["modules"]) == 14
    for module in result.metrics["modules"]:
        assert module["kurtosis"] > 1
        assert module["incoherence"] >= 1
        assert module["input_kurtosis"] > 1
        assert module["sink_kurtosis"] > 1
    assert store.find(result.spec) == result


def test_arms_measured_on_other_text_are_not_compared():
    a, b = fake_arm("optrot", [0.1, 0.2]), fake_arm("hadamard", [0.2, 0.3])
    b = replace(b, recipe=replace(b.recipe, test_windows=2))
    with pytest.raises(ValueError, match="optrot and hadamard differ in test_windows"):
        tables.judge(a, b)


def test_a_claim_about_arms_that_were_not_run_says_so():
    arms = {
        ("optrot", 4): fake_arm("optrot", [0.1, 0.2, 0.3]),
        ("hadamard", 4): fake_arm("hadamard", [0.2, 0.3, 0.5]),
    }
    assert tables.verdict(arms, ("optrot", 4), ("random", 4)) == "undecided (no run of random, 4)"
    said = tables.verdict(arms, ("optrot", 4), ("hadamard", 4))
    assert re.fullmatch(r"yes \(KL -42 %, -\d+ to -\d+; p = 0\.0\d+, 3 seeds\)", said)


def test_a_result_of_another_version_is_named(recipe):
    path = files.local_path({"task": "quantize", "foo": 1})
    disk.write_atomically(
        path,
        lambda scratch: scratch.write_text(
            json.dumps(
                {
                    "spec": {"task": "quantize", "foo": 1},
                    "metrics": {"perplexity": 1, "kl": 0, "reference_perplexity": 1},
                    "seconds": {},
                    "peak_memory_mb": 0,
                    "provenance": {"stages": {"recipe": "0"}},
                }
            )
        ),
    )
    with pytest.raises(
        ValueError, match=f"{path.name} comes from another version of rotlib: delete it"
    ):
        tables.stored([recipe])


def fake_arm(rotation, kls):
    results = [
        store.Result(
            {"task": "quantize", "rotation": rotation} | ({"seed": seed} if seed else {}),
            {"kl": kl, "perplexity": 30.0},
            {},
            0,
            {"stages": {}},
        )
        for seed, kl in enumerate(kls)
    ]
    return tables.arms(results)[0]


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        ([0.10, 0.11, 0.12], [0.20, 0.22, 0.21], "yes"),
        ([0.20, 0.22, 0.21], [0.10, 0.11, 0.12], "no"),
        ([0.10, 0.30, 0.20], [0.21, 0.22, 0.20], "undecided"),
        ([0.10, 0.101, 0.10], [0.10, 0.10, 0.101], "equivalent"),
        ([0.10, 0.11], [0.20, 0.22], "undecided, 2 seeds"),
    ],
)
def test_the_verdict_rule(better, worse, verdict):
    both = fake_arm("optrot", better), fake_arm("hadamard", worse)
    assert tables.judge(*both, among=[]).word == verdict


def test_other_arms_of_the_class_tell_the_noise():
    both = fake_arm("optrot", [0.10, 0.11, 0.12]), fake_arm("hadamard", [0.12, 0.14, 0.13])
    alone = tables.judge(*both, among=[]).difference
    noisy = [fake_arm("random", [0.10, 0.20, 0.30]), fake_arm("kurtail", [0.30, 0.20, 0.10])]
    assert tables.judge(*both, among=noisy).difference.p > alone.p
    calm = [fake_arm("random", [0.20, 0.23, 0.23]), fake_arm("kurtail", [0.30, 0.34, 0.34])]
    assert tables.judge(*both, among=calm).difference.p < alone.p
    coarser = replace(noisy[0], recipe=replace(noisy[0].recipe, bits=3))  # of another class
    assert tables.judge(*both, among=[coarser]).difference.p == alone.p


def test_arms_of_other_machines_decide_nothing():
    here, there = fake_arm("optrot", [0.10, 0.11, 0.12]), fake_arm("hadamard", [0.2, 0.22, 0.21])
    for result in there.results:
        result.provenance["device"] = "NVIDIA H100"
    assert tables.judge(here, there).word == "undecided, on other machines"
    for result in there.results[1:]:  # the seeds that both have on one machine count
        result.provenance["device"] = ""
    assert tables.judge(here, there, among=[]).word == "undecided, 2 seeds"


def test_a_divergence_of_nothing_is_not_compared():
    both = fake_arm("optrot", [0.10, 0.11, 0.0]), fake_arm("hadamard", [0.2, 0.22, 0.21])
    assert tables.judge(*both).word == "undecided, no divergence to compare"


def test_a_margin_is_not_in_the_ratio_that_is_told():
    both = fake_arm("optrot", [0.101, 0.111, 0.121]), fake_arm("hadamard", [0.10, 0.11, 0.12])
    assert str(tables.judge(*both, margin=1.1, among=[])).startswith("yes (KL +1 %")


def test_the_table_has_a_line_a_rotation_and_a_column_a_precision():
    learned = fake_arm("spinquant", [0.1, 0.2, 0.3])
    for result in learned.results:
        result.metrics.update(learning_tokens=32768, learning_memory_mb=2048)
        result.seconds["rotate"] = 170.4
    rows = {
        "none": {"W4": fake_arm("none", [0.6])},
        "spinquant": {"W4": learned, "W4A8": fake_arm("spinquant", [0.4])},
    }
    header, _, none, spinquant = tables.kl_by_precision(rows).splitlines()
    assert header == "| rotation | tokens | learning, s | memory, GB | W4 | W4A8 |"
    assert none == "| none | – | – | – | 0.600 |  |"
    assert spinquant == "| spinquant | 32,768 | 170 | 2.0 | 0.200 ± 0.058 | 0.400 |"


def test_a_tuned_recipe_is_kept_and_put_back(recipe, monkeypatch):
    run = replace(recipe, rotation="hadamard", tuning=3)
    plain = rl.run(replace(run, tuning=0))
    result = rl.run(run)
    held_out = result.metrics["tuning_held_out"]
    assert next(iter(held_out)) == "0"
    assert held_out[str(result.metrics["tuning_step"])] == min(held_out.values())
    assert result.metrics["kl"] != plain.metrics["kl"]
    assert result.seconds["tune"] > 0
    model, _ = rl.build(run)
    assert result.provenance["weights"] == weights_sample(model)

    def unwanted(*_, **__):
        raise AssertionError("it is kept")

    monkeypatch.setattr(pipeline, "tune", unwanted)
    monkeypatch.setattr(pipeline, "gptq", unwanted)
    again, _ = rl.build(run)
    assert weights_sample(again) == weights_sample(model)


def test_tuning_needs_text_behind_the_calibration(recipe):
    with pytest.raises(ValueError, match=r"windows of .* were asked for, but this text has"):
        rl.run(replace(recipe, tuning=10**6))


def test_tuning_belongs_to_rounded_weights():
    with pytest.raises(ValueError, match="tuning belongs to rounded weights"):
        rl.Recipe(rounding="none", tuning=4)
