import os
import sys
from dataclasses import replace

import pytest

import rotlib as rl
from rotlib.disk import ROOT
from rotlib.study import engines, files, store, sweep
from rotlib.study.sweep_file import read_sweep


@pytest.fixture
def here(monkeypatch):
    """The local engine without its processes: test_faults and test_own have those."""

    def run(tasks, workers):
        return ((number, engines.work(*engines._parcel(task))) for number, task in enumerate(tasks))

    monkeypatch.setitem(sweep.ENGINES, "local", run)


def write(tmp_path, text):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return path


def test_a_sweep_crosses_its_arms_with_its_grid(tmp_path):
    path = write(
        tmp_path,
        "base: {bits: 3}\ngrid: {rotation: [none, hadamard], seed: [0, 1]}\n"
        "arms: [{}, {act_order: true}]\n",
    )
    three_bits = rl.Recipe(bits=3)
    expected = [
        replace(three_bits, act_order=order, rotation=name, seed=seed)
        for order in (False, True)
        for name in ("none", "hadamard")
        for seed in (0, 1)
    ]
    assert read_sweep(path) == expected


def test_a_list_in_an_arm_is_a_grid_of_its_own(tmp_path):
    path = write(
        tmp_path,
        "grid: {seed: [0, 1]}\n"
        "arms: [{bits: 2}, {bits: 3, seed: [4, 5, 6]}, {bits: [3, 4], seed: 7}]\n",
    )
    expected = [(2, 0), (2, 1), (3, 4), (3, 5), (3, 6), (3, 7), (4, 7)]
    assert [(recipe.bits, recipe.seed) for recipe in read_sweep(path)] == expected


def test_a_recipe_named_twice_is_run_once(tmp_path):
    assert read_sweep(write(tmp_path, "arms: [{bits: 4}, {}]")) == [rl.Recipe()]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_sweeps_of_this_project_can_be_read(path):
    assert len(read_sweep(path)) >= 40


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "base: {bits: 3}\ngird: {seed: [0]}\n",
            r"line 2: unknown part 'gird', a sweep has rotations, base, grid, arms",
        ),
        (
            "arms:\n  - {bits: 3}\n  - {rotaton: hadamard}\n",
            r"line 3: a recipe has no field 'rotaton', did you mean rotation\?",
        ),
        (
            "arms:\n  - {bits: 3}\n  - bits: 9\n",
            r"line 3: bits must be a whole number from 2 to 8, not 9",
        ),
        (
            "base: {rounding: rtn}\ngrid:\n  act_order: [false, true]\n",
            r"line 3: act_order orders GPTQ's columns.*\(in rounding: rtn",
        ),
        ("grid: {seed: 3}\n", r"line 1: seed must be a list"),
        ("grid: {seed: []}\n", r"line 1: seed must be a list"),
        ("arms:\n  - {bits: 3}\n  - {seed: []}\n", r"line 3: seed must be a list"),
        ("base: {seed: []}\n", r"line 1: seed must be a list"),
        ("arms:\n  - {bits: 3, bits: 4}\n", r"line 2: bits stands there a second time"),
        ("base: {bits: 3}\nbase: {bits: 4}\n", r"line 2: base stands there a second time"),
        ("base: {bits: !x 3}\n", r"line 1: tags ..x. aren't read"),
        ("base: [1]\n", r"line 1: this must map a recipe's fields to values"),
        ("arms: {bits: 3}\n", r"line 1: arms must be a list"),
        ("bits\n", r"must map rotations, base, grid, arms"),
        ("base: {bits: 3\n", r"isn't valid YAML"),
    ],
)
def test_a_sweep_that_cannot_run_is_refused_with_its_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as refusal:
        read_sweep(write(tmp_path, text))
    assert "\n" not in str(refusal.value)


def test_a_missing_file_and_a_filter_that_fits_nothing_are_one_sentence(tmp_path, capsys):
    path = write(tmp_path, "arms: [{bits: 3}]")
    for arguments, message in (
        ([str(tmp_path / "no.yaml")], "can't be read: No such file"),
        ([str(path), "--only", "rotation=optrot"], "no recipe of this sweep has rotation=optrot"),
        ([str(path), "--only", "rotation"], "--only takes a recipe's fields"),
        ([str(path), "--only", "seed=["], "can't be read: while parsing a flow node"),
        ([str(path), "--address", "auto"], "--address is of a Ray cluster: it needs --engine ray"),
        ([str(path), "--workers", "0"], "workers must be a whole number of at least 1"),
    ):
        with pytest.raises(SystemExit):
            sweep.main(arguments)
        assert message in capsys.readouterr().err


def test_several_values_of_a_field_choose_the_recipes_with_one_of_them(tmp_path):
    recipes = read_sweep(write(tmp_path, "grid: {seed: [0, 1, 2], asymmetry: [0.0, 0.25]}"))
    chosen = sweep._chosen(recipes, ["seed=0", "seed=2", "asymmetry=25e-2"])
    assert [(recipe.seed, recipe.asymmetry) for recipe in chosen] == [(0, 0.25), (2, 0.25)]


def test_recipes_that_share_what_is_costly_share_a_worker():
    learned = [rl.Recipe(rotation="optrot", bits=bits) for bits in (3, 4)]
    by_weights = [rl.Recipe(), rl.Recipe(activation_bits=8), rl.Recipe(seed=1)]
    assert sweep.tasks_of([*learned, *by_weights]) == [learned, by_weights[:2], by_weights[2:]]


def test_a_dry_run_says_what_would_run_and_runs_nothing(folder, capsys):
    assert sweep.main([str(folder / "sweep.yaml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "8 recipes: 8 missing; 8 to run in 4 tasks" in out
    assert len(out.splitlines()) == 10
    assert not (folder / "results").exists()


def test_a_reader_of_its_lines_may_leave(monkeypatch):
    read, write_end = os.pipe()
    os.close(read)
    with open(write_end, "w") as to_nobody:
        monkeypatch.setattr(sys, "stdout", to_nobody)
        with files.reader_may_leave():
            print("missing")


def test_the_time_is_estimated_by_runs_of_this_kind_of_device_tuned_where_the_recipe_is():
    def finished(device, seconds, **settings):
        origin = {"device": device, "stages": {}}
        return store.Result(rl.Recipe(**settings).spec(), {}, seconds, 0.0, origin)

    results = [
        finished("NVIDIA H100", {"quantize": 1.0}),
        finished("cpu, 2 threads", {"quantize": 50.0, "evaluate": 8.0}),
        finished("cpu, 2 threads", {"quantize": 90.0, "tune": 64.0}, tuning=32),
    ]
    plain = sweep.estimate(rl.Recipe(calibration_windows=32, test_windows=4), results)
    assert plain.seconds == {"quantize": 100.0, "evaluate": 4.0}
    tuned = sweep.estimate(rl.Recipe(tuning=64), results)
    assert tuned.seconds == {"quantize": 90.0, "tune": 128.0}
    assert sweep.estimate(rl.Recipe(), results[:1], "cpu").seconds is None


def test_what_several_recipes_share_is_forecast_once():
    seconds = {"rotate": 60.0, "quantize": 120.0, "evaluate": 60.0}
    learned = [
        rl.Recipe(rotation="optrot", bits=bits, activation_bits=activations)
        for bits in (3, 4)
        for activations in (16, 8)
    ]
    estimates = dict.fromkeys(learned, sweep.Estimate(seconds, None))
    assert sweep.forecast(estimates, workers=1).endswith(
        "about 9 minutes"
    )  # one rotation, two sets of weights, four evaluations


def test_a_sweep_runs_what_is_missing_and_damaged_and_leaves_what_is_stale(folder, here, capsys):
    path = folder / "sweep.yaml"
    assert sweep.main([str(path), "--only", "rotation=hadamard"]) == 0
    recipes = read_sweep(path)
    chosen = [recipe for recipe in recipes if recipe.rotation == "hadamard"]
    assert [sweep.state_of(recipe).name for recipe in chosen] == ["complete"] * 4
    complete, damaged, stale, partial = chosen
    before = files.local_path(complete.spec()).read_bytes()
    expected = store.find(damaged.spec()).metrics
    files.local_path(damaged.spec()).write_text('{"spec": ')
    older = files.local_path(stale.spec())
    fusing = store.find(stale.spec()).provenance["stages"]["fusing"]
    older.write_text(older.read_text().replace(fusing, "of old"))
    files.local_path(partial.spec()).unlink()
    states = ["complete", "damaged", "stale", "partial"]
    assert [sweep.state_of(recipe).name for recipe in chosen] == states
    assert sweep.state_of(stale).why == ("fusing has changed",)

    capsys.readouterr()
    assert sweep.main([str(path)]) == 0
    said = capsys.readouterr().out
    assert "1 of 8 recipes have a result that today's code stands behind" in said
    found = "4 missing, 1 complete, 1 damaged, 1 stale, 1 partial"
    assert f"8 recipes: {found}; 6 to run" in said
    assert "stale are 1 by fusing has changed" in said
    assert files.local_path(complete.spec()).read_bytes() == before
    assert store.find(damaged.spec()).metrics == expected
    assert sweep.state_of(stale).name == "stale"
    assert sweep.main([str(path), "--rerun-stale"]) == 0
    assert {sweep.state_of(recipe).name for recipe in recipes} == {"complete"}


def test_a_recipe_that_fails_is_told_and_the_others_run(folder, here, capsys):
    path = folder / "sweep.yaml"
    text = path.read_text().replace(
        "arms: [{}, {activation_bits: 8}]", "arms: [{group_size: 7}, {}]"
    )
    path.write_text(text.replace("rotation: [none, hadamard], seed: [0, 1]", "seed: [0]"))
    assert sweep.main([str(path)]) == 1
    assert "group_size 7 doesn't divide the 48 inputs of q_proj" in capsys.readouterr().err
    assert [sweep.state_of(recipe).name for recipe in read_sweep(path)] == ["refused", "complete"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("group_size: 7", "group_size 7 doesn't divide the 48 inputs of q_proj"),
        ("window: 65", "windows of 65 tokens, but this model reads 64 at most"),
        ("rotation: gsr, block: 32", "blocks of 32 don't divide the width 48"),
        ("R4: true, group_size: 7", "group_size 7 doesn't divide"),
    ],
)
def test_a_dry_run_says_what_the_model_cannot_do(folder, here, capsys, settings, said):
    path = folder / "sweep.yaml"
    path.write_text(
        f"base: {{model: {folder / 'model'}, text: wikitext2, test_windows: 2, {settings}}}\n"
    )
    sweep.main([str(path), "--dry-run"])
    assert said in capsys.readouterr().out


def test_a_dry_run_says_what_would_be_refused(tmp_path, capsys):
    path = write(tmp_path, "base: {model: no/where}\narms: [{}, {bits: 3}]")
    sweep.main([str(path), "--dry-run"])
    said = capsys.readouterr().out
    assert "2 refused" in said
    assert "refused are 2 by" in said
    assert "no/where" in said
