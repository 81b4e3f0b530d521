"""Files that were damaged, exchanged or put in the way: noticed, and never believed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import save_short_text, save_tiny_model, tiny_model
from test_hostile import quantized, refused

import rotlib as rl
from rotlib import disk
from rotlib.checkpoints import write
from rotlib.checkpoints.folder import _aside
from rotlib.models import content
from rotlib.study import files, store
from rotlib.study.kept import Kept

pytestmark = pytest.mark.slow
SHORT = {"window": 64, "calibration_windows": 2, "test_windows": 2, "text": "wikitext2"}
KEPT = {"task": "rotation", "model": "smollm2-135m", "rotation": "hadamard", "seed": 0}


@pytest.fixture
def recipe(folder) -> rl.Recipe:
    return rl.Recipe(model=str(folder / "model"), **SHORT)


def other_weights(folder: Path) -> None:
    """Other weights in the same folder, under the same names."""
    torch.manual_seed(7)
    model, tokenizer = rl.load(str(folder))
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) / 50)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_other_weights_in_the_same_folder_are_another_model(folder, recipe):
    before, kept = rl.run(recipe), rl.build(recipe)[0]
    other_weights(folder / "model")
    after = rl.run(recipe)
    assert after.metrics["perplexity"] != before.metrics["perplexity"]
    assert after.content["model"] != before.content["model"]
    assert not torch.equal(
        rl.build(recipe)[0].model.layers[0].mlp.up_proj.weight,
        kept.model.layers[0].mlp.up_proj.weight,
    )


def test_an_export_after_the_folder_changed_is_of_the_new_weights(folder, recipe):
    rl.export_recipe(recipe, folder / "first")
    other_weights(folder / "model")
    second = rl.export_recipe(recipe, folder / "second")
    built, _ = rl.build(recipe)
    measured = rl.run(recipe).metrics["perplexity"]
    assert f"{measured:.3f}" in (second / "README.md").read_text()
    assert built.config.rotlib_quantized


def test_a_card_is_of_the_weights_in_its_folder_even_where_the_measured_ones_are_gone(
    folder, recipe
):
    rl.run(recipe)
    store_path = files.local_path(recipe.spec())
    text = json.loads(store_path.read_text())
    text["provenance"]["weights"] = "others"
    text["metrics"]["perplexity"] = 1.0
    store_path.write_text(json.dumps(text))
    card = (rl.export_recipe(recipe, folder / "out") / "README.md").read_text()
    assert f"{rl.run(recipe).metrics['perplexity']:.3f}" in card
    assert "| 1.000 |" not in card


def test_one_relative_name_in_two_directories_is_two_models(tmp_path, folder, recipe, monkeypatch):
    results = []
    for number, place in enumerate(("one", "two")):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        save_tiny_model(Path("model"))
        if number:
            other_weights(Path("model"))
        results.append(rl.run(rl.Recipe(model="model", rounding="rtn", **SHORT)))
    assert results[0].file != results[1].file
    assert results[0].metrics != results[1].metrics


def test_a_model_that_was_moved_is_still_itself(folder, recipe):
    first = rl.run(recipe)
    (folder / "model").rename(folder / "elsewhere")
    moved = rl.Recipe(model=str(folder / "elsewhere"), **SHORT)
    assert store.find(moved.spec()).metrics == first.metrics


def test_a_replaced_text_is_another_text_and_no_row_averages_two(folder, recipe):
    from rotlib.study import tables

    first = rl.run(recipe)
    raw = folder / "wikitext2" / "wiki.test.raw"
    raw.write_text(raw.read_text().replace("the", "some"))
    second = rl.run(recipe)
    assert second.file != first.file
    assert len(tables.arms(store.load_results())) == 2
    (shown,) = tables.stored([recipe])
    assert shown.results == (second,)


def test_a_kept_rotation_is_not_given_to_a_model_with_other_weights(folder):
    recipe = rl.Recipe(model=str(folder / "model"), rotation="optrot", steps=4, **SHORT)
    model, _ = rl.load(recipe.model)
    first, _ = rl.make_rotation(recipe, model)
    for parameter in model.parameters():
        parameter.mul_(torch.rand_like(parameter))
    second, _ = rl.make_rotation(recipe, model)
    assert not torch.equal(first.R1, second.R1)


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Kept:
    monkeypatch.setenv("ROTLIB_RESULTS", str(tmp_path))
    kept = Kept(KEPT, torch.device("cpu"))
    kept.write({"R": torch.randn(40, 40), "seconds": 1.5, "names": ["a", ("b", None)]})
    return kept


@pytest.mark.parametrize("share", [position / 40 for position in range(40)])
def test_a_single_flipped_bit_of_what_is_kept_is_noticed_or_harmless(kept, share):
    whole = kept.read()
    damaged = bytearray(kept.path.read_bytes())
    damaged[int(share * len(damaged))] ^= 16
    kept.path.write_bytes(damaged)
    found = kept.read()
    assert found is None or torch.equal(found["R"], whole["R"])
    assert found is None or found["names"] == whole["names"]


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x04N.", b"{}", b"\0" * 4096])
def test_a_file_that_is_nothing_that_was_kept_counts_as_none(kept, content):
    kept.path.write_bytes(content)
    assert kept.read() is None


def test_a_pickle_in_a_kept_files_place_runs_no_code(kept, monkeypatch, tmp_path):
    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harmed",))

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"maker": Harm(), "sum": ""}, kept.path)
    assert kept.read() is None
    assert not (tmp_path / "harmed").exists()


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory) -> Path:
    """A result's file."""
    place = tmp_path_factory.mktemp("undamaged")
    save_tiny_model(place / "model")
    save_short_text(place)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ROTLIB_DATA", str(place))
        environment.setenv("ROTLIB_RESULTS", str(place))
        rl.run(rl.Recipe(model=str(place / "model"), rounding="rtn", **SHORT))
    (path,) = (place / "local").glob("quantize-*.json")
    return path


@pytest.fixture
def saved(undamaged, tmp_path, monkeypatch) -> Path:
    """A copy of it to damage, in a store of its own."""
    monkeypatch.setenv("ROTLIB_RESULTS", str(tmp_path))
    path = tmp_path / "local" / undamaged.name
    path.parent.mkdir()
    path.write_text(undamaged.read_text())
    return path


DAMAGE = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "null": lambda text: "null",
    "no JSON": lambda text: "metrics",
    "without metrics": lambda text: edited(text, metrics={}),
    "metrics of another task": lambda text: edited(text, metrics={"modules": []}),
    "metrics that are a number": lambda text: edited(text, metrics=3),
    "without provenance": lambda text: edited(text, provenance={}),
    "without a task": lambda text: edited(text, spec={"bits": 3}),
    "an unknown task": lambda text: edited(text, spec={"task": "quantise"}),
    "another recipe": lambda text: edited(text, spec=json.loads(text)["spec"] | {"seed": 5}),
    "an unknown stage": lambda text: edited(
        text, provenance=json.loads(text)["provenance"] | {"stages": {"astrology": "0"}}
    ),
    "kl that is text": lambda text: with_metric(text, "abc"),
    "kl that is none": lambda text: with_metric(text, None),
    "kl below zero": lambda text: with_metric(text, -5.0),
    "kl that is no number": lambda text: with_metric(text, float("nan")),
    "windows that are words": lambda text: with_metric(text, ["a", "b"], "kl_windows"),
    "fewer windows than were tested on": lambda text: with_metric(text, [0.1], "kl_windows"),
    "a perplexity below 1": lambda text: with_metric(text, 0.5, "perplexity"),
    "metrics that are pairs": lambda text: edited(text, metrics=[["perplexity", 3], ["kl", 1]]),
    "memory that is text": lambda text: edited(text, peak_memory_mb="many"),
    "no stages": lambda text: edited(
        text, provenance=json.loads(text)["provenance"] | {"stages": {}}
    ),
    "stages that are a list": lambda text: edited(
        text, provenance=json.loads(text)["provenance"] | {"stages": []}
    ),
    "times that are text": lambda text: edited(text, seconds={"load": "x"}),
    "times below zero": lambda text: edited(text, seconds={"load": -5}),
    "times without end": lambda text: edited(text, seconds={"load": float("inf")}),
    "endless brackets": lambda text: "[" * 100_000,
    "one field more": lambda text: edited(text, comment="mine"),
}


def edited(text: str, **changes) -> str:
    return json.dumps(json.loads(text) | changes)


def with_metric(text: str, value: object, name: str = "kl") -> str:
    return edited(text, metrics=json.loads(text)["metrics"] | {name: value})


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_result_is_told_by_its_files_name(saved, damage):
    saved.write_text(DAMAGE[damage](saved.read_text()))
    with refused(saved.name):
        store.load_results()


def test_a_result_under_a_second_name_is_no_second_seed(saved):
    saved.with_name("quantize-000000000000.json").write_bytes(saved.read_bytes())
    with refused("quantize-000000000000.json holds the result that belongs into"):
        store.load_results()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_model_whose_files_are_damaged_is_one_sentence(tmp_path, file):
    save_tiny_model(tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with refused("can't be loaded as a"):
        rl.load(str(tmp_path / "model"))


def model_with(folder: Path, **config) -> str:
    save_tiny_model(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return str(folder)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_hidden_layers": 1}, "has no place for the weight model.layers.1"),
        ({"num_hidden_layers": 3}, "lacks the weight model.layers.2"),
        ({"model_type": "nonsense"}, "can't be loaded"),
        ({"hidden_size": 47}, "can't be loaded"),
        ({"vocab_size": 100}, "and its config.json says"),
        ({"num_key_value_heads": 6}, "and its config.json says"),
        ({"hidden_act": "nope"}, "its files say 'nope', which transformers doesn't know"),
        ({"rotlib_online": ["R4"]}, "no rotation was fused into it"),
        (
            {"auto_map": {"AutoModelForCausalLM": "harm.Harm"}, "model_type": "harm"},
            "can't be loaded",
        ),
    ],
)
def test_a_config_that_does_not_fit_its_weights_is_refused(config, says, tmp_path):
    with refused(says):
        rl.load(model_with(tmp_path / "model", **config))


def test_a_config_that_makes_the_original_compute_no_numbers_is_refused(tmp_path):
    model, _ = rl.load(model_with(tmp_path / "model", rms_norm_eps=-1.0))
    with refused("computes NaN or infinite states"):
        rl.Reference(model, torch.arange(64).view(2, 32))


def test_weights_that_are_a_pointer_of_git_are_told(tmp_path):
    save_tiny_model(tmp_path / "model")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "model" / "model.safetensors").write_text(pointer)
    with refused("or only a pointer to weights: download it again"):
        rl.load(str(tmp_path / "model"))


def test_code_in_a_models_folder_is_not_run(tmp_path):
    code = f"from pathlib import Path\nPath({str(tmp_path / 'harmed')!r}).touch()\n"
    auto = {"AutoModelForCausalLM": "harm.Harm", "AutoConfig": "harm.Harm"}
    folder = model_with(tmp_path / "model", model_type="harm", auto_map=auto)
    (tmp_path / "model" / "harm.py").write_text(code)
    script = f"import rotlib as rl; rl.load({folder!r})"
    done = subprocess.run(
        [sys.executable, "-c", script],
        input="y\ny\ny\n",
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode
    assert not (tmp_path / "harmed").exists()


def test_weights_that_may_hold_code_are_refused(tmp_path):
    save_tiny_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "model" / "pytorch_model.bin")
    with refused("holds no \\*.safetensors"):
        rl.load(str(tmp_path / "model"))


def test_an_export_replaces_its_own_and_keeps_the_old_one_when_it_fails(tmp_path, monkeypatch):
    model = quantized(tiny_model(dtype=torch.float32))
    first = rl.export(model, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in first.iterdir()}

    def fail(*_):
        raise RuntimeError("the lights went out")

    with monkeypatch.context() as patched:
        patched.setattr(write, "_check_logits", fail)
        with pytest.raises(RuntimeError):
            rl.export(model, tmp_path / "out", overwrite=True, card="another")
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    rl.export(model, tmp_path / "out", overwrite=True, card="another")
    assert (first / "README.md").read_text() == "another"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_killed_between_its_two_renames_loses_nothing(tmp_path):
    model = quantized(tiny_model(dtype=torch.float32))
    first = rl.export(model, tmp_path / "out")
    first.rename(_aside(first))
    with refused("isn't an empty folder"):  # it is back
        rl.export(model, tmp_path / "out")
    assert (first / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["out", "x" * 150])
def test_a_folder_that_is_named_like_one_put_aside_is_left_alone(name, tmp_path):
    aside = _aside(tmp_path / name)
    aside.mkdir()
    (aside / "notes.txt").write_text("mine")
    model = quantized(tiny_model(dtype=torch.float32))
    assert _aside(tmp_path / (name + "y")) != aside
    with refused("is in the way, and no export: move it"):
        rl.export(model, tmp_path / name)
    assert (aside / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["link", "folder link", "empty folder", "file"])
def test_an_export_with_anything_of_somebody_elses_in_it_is_not_replaced(kind, tmp_path):
    model = quantized(tiny_model(dtype=torch.float32))
    folder = rl.export(model, tmp_path / "out")
    stranger = folder / "stranger"
    {
        "link": lambda: stranger.symlink_to("/nowhere"),
        "folder link": lambda: stranger.symlink_to(tmp_path),
        "empty folder": stranger.mkdir,
        "file": stranger.touch,
    }[kind]()
    with refused("isn't as rotlib wrote it"):
        rl.export(model, tmp_path / "out", overwrite=True)


def test_a_bias_that_the_config_does_not_announce_is_noticed(tmp_path):
    model = quantized(tiny_model(dtype=torch.float32))
    bias = torch.nn.Parameter(torch.full((48,), 1e-5), requires_grad=False)
    model.model.layers[0].self_attn.q_proj.bias = bias
    with refused(
        r"model\.layers\.0\.self_attn\.q_proj has a bias of \(48,\), and the config makes"
    ):
        rl.export(model, tmp_path / "out")


def test_kept_weights_under_another_recipes_name_count_as_none(recipe):
    first, second = (rl.Recipe(model=recipe.model, seed=seed, **SHORT) for seed in (0, 1))
    true = [rl.run(one).metrics["kl"] for one in (first, second)]
    specs = (one.sharing_weights().spec() | {"task": "weights"} for one in (first, second))
    weights = [files.local_path(spec, ".pt") for spec in specs]
    weights[1].write_bytes(weights[0].read_bytes())
    files.local_path(second.spec()).unlink()
    assert rl.run(second).metrics["kl"] == true[1]


def test_a_constant_that_a_rotation_of_ones_own_reads_is_part_of_it(tmp_path):
    from rotlib.study import own

    (tmp_path / "shifted.py").write_text(
        "import rotlib as rl\nSHIFT = 0\n"
        "@rl.register_rotation('shifted', replace=True)\n"
        "def shifted(model, seed=0, R3=False, R4=False):\n"
        "    return rl.random_rotation(model, seed + SHIFT, R3, R4)\n"
    )
    digests = []
    for shift in (0, 5):
        text = (tmp_path / "shifted.py").read_text().replace("SHIFT = 0", f"SHIFT = {shift}")
        (tmp_path / f"shifted{shift}.py").write_text(text)
        own.read_rotations(tmp_path / f"shifted{shift}.py")
        digests.append(own.source_digest(sys.modules[f"rotlib_rotations_shifted{shift}"].shifted))
    own.OWN.clear()
    assert digests[0] != digests[1]


def test_every_file_of_an_export_can_be_read_by_whom_the_folder_lets(tmp_path):
    folder = rl.export(quantized(tiny_model(dtype=torch.float32)), tmp_path / "out")
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    assert {path.stat().st_mode for path in folder.iterdir()} == {usual}
    assert (folder / "README.md").read_text().strip()


def test_a_head_of_its_own_under_a_tie_flag_is_written(tmp_path):
    model = tiny_model("llama, tied", dtype=torch.float32)
    model.lm_head.weight = torch.nn.Parameter(
        torch.randn_like(model.lm_head.weight), requires_grad=False
    )
    folder = rl.export(quantized(model), tmp_path / "out")
    assert not json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


def test_an_activation_function_that_gguf_cannot_name_is_refused(tmp_path):
    model, tokenizer = rl.load(model_with(tmp_path / "model", hidden_act="gelu"))
    rl.rtn(model, rl.WeightQuant(group_size=16))
    with refused("hidden_act 'gelu'|GGUF's blocks"):
        rl.export(model, tmp_path / "out", "gguf", tokenizer)


def test_a_hook_that_takes_part_in_the_model_is_noticed_before_the_export_has_its_name(tmp_path):
    model = quantized(tiny_model(dtype=torch.float32))
    model.model.layers[0].register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(RuntimeError, match="computes other logits from the folder"):
        rl.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_model_whose_numbers_have_no_end_is_a_flagged_result(folder, recipe):
    path = folder / "model" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    weights["lm_head.weight"] *= 1e5
    save_file(weights, path, {"format": "pt"})
    result = rl.run(rl.Recipe(model=recipe.model, rounding="rtn", bits=2, **SHORT))
    assert result.metrics["diverged"] is True


@pytest.mark.parametrize("named", ["~/rotlib-results", "results/elsewhere", "/tmp/rotlib-results"])
def test_a_folder_of_the_environment_is_the_same_from_every_directory(named, tmp_path, monkeypatch):
    monkeypatch.setenv("ROTLIB_RESULTS", named)
    before = files.results_folder()
    monkeypatch.chdir(tmp_path)
    assert files.results_folder() == before
    assert before.is_absolute()
    assert "~" not in str(before)


def test_what_a_killed_process_left_goes_and_what_a_living_one_fills_stays(tmp_path):
    script = (
        "import os, sys, time; from pathlib import Path; from rotlib import disk\n"
        "with disk.scratch_beside(Path(sys.argv[1]) / 'file') as scratch:\n"
        "    print(scratch, flush=True)\n"
        "    time.sleep(60)\n"
    )
    start = [sys.executable, "-c", script, str(tmp_path)]
    both = [subprocess.Popen(start, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    killed, living = (Path(process.stdout.readline().strip()) for process in both)
    both[0].kill()
    both[0].wait()
    for path in (killed, living):
        os.utime(path, (time.time() - 60, time.time() - 60))
    (tmp_path / ".notes.partial").write_text("mine")
    try:
        disk.clear_leftovers(tmp_path)
        assert not killed.exists()
        assert living.exists()
        assert (tmp_path / ".notes.partial").exists()
    finally:
        both[1].kill()
        both[1].wait()


def test_a_digest_is_computed_once_and_again_when_the_file_changes(tmp_path, monkeypatch):
    save_tiny_model(tmp_path / "model")
    monkeypatch.setenv("ROTLIB_CACHE", str(tmp_path / "cache"))
    weights = tmp_path / "model" / "model.safetensors"
    for path in weights.parent.iterdir():
        os.utime(path, (1e9, 1e9))
    monkeypatch.setattr(disk, "_SETTLED", -1e18)  # they are settled, whatever their ctime
    first = content.model_content(str(tmp_path / "model"))
    read = []
    monkeypatch.setattr(disk, "file_digest", lambda path: read.append(path.name) or "0")
    assert content.model_content(str(tmp_path / "model")) == first
    assert not read
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    assert content.model_content(str(tmp_path / "model")) != first
    assert read == ["model.safetensors"]
