"""The suite for a GPU, as far as a CPU goes; what travels to a machine without a network."""

import json
import sys
from contextlib import suppress

import pytest
import torch
from conftest import refused, tiny_model

import rotlib as rl
from rotlib import precision
from rotlib.learning import network
from rotlib.models.supported import adapt
from rotlib.quantization.replayed import Replayed
from rotlib.rotations.rotation import newton_schulz, polar
from rotlib.study import bundle, gpu
from rotlib.study.recipe import Recipe


def suite(out, *more: str) -> bool:
    return gpu.main(["--device", "cpu", "--out", str(out), "--minutes", "5", *more])


def found(out, phase: str) -> dict:
    return json.loads((out / f"{phase}.json").read_text())


def test_a_device_agrees_with_the_committed_entries_and_a_phase_is_not_run_twice(tmp_path, capsys):
    assert suite(tmp_path, "--phases", "parity")
    parity = found(tmp_path, "parity")
    assert parity["complete"]
    assert parity["machine"]["device"] == "CPU"
    for line in parity["lines"]:
        assert line["difference"] <= line.get("tolerance", 1e-9), line
    names = {line["name"] for line in parity["lines"]}
    assert {"gptq", "exactness, float64", "KL after GPTQ, streamed"} <= names
    written = (tmp_path / "parity.json").stat().st_mtime_ns
    capsys.readouterr()
    assert suite(tmp_path, "--phases", "parity")
    assert capsys.readouterr().out == "parity: complete\n"
    assert (tmp_path / "parity.json").stat().st_mtime_ns == written


def test_every_stage_is_measured_and_one_that_fails_costs_only_itself(tmp_path, monkeypatch):
    def no_room(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "optrot", no_room)
    assert suite(tmp_path, "--phases", "stages")
    lines = {line["name"]: line for line in found(tmp_path, "stages")["lines"]}
    assert lines["optrot"]["error"] == "CUDA out of memory"
    for stage in ("draw", "reference", "fuse", "gptq", "evaluate", "gptaq"):
        assert lines[stage]["seconds"] >= 0
        assert lines[stage]["peak_mb"] > 0


def test_the_study_keeps_its_results_and_goes_on_after_its_time(folder, monkeypatch):
    monkeypatch.setattr(gpu, "SWEEP", folder / "sweep.yaml")
    out = folder / "out"
    one_line = iter([False, True])
    monkeypatch.setattr(gpu.Job, "time_is_up", property(lambda job: lambda: next(one_line)))
    assert not suite(out, "--phases", "study")
    assert not found(out, "study")["complete"]
    assert len(list((out / "results" / "local").glob("quantize-*.json"))) == 1
    monkeypatch.setattr(gpu.Job, "time_is_up", property(lambda job: lambda: False))
    assert suite(out, "--phases", "study")
    lines = found(out, "study")["lines"]
    assert len(lines) == 8
    assert all(line["kl"] >= 0 for line in lines)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--minutes", "0"], "--minutes must be a positive number, not 0.0"),
        (["--device", "cuda:9"], "use 'auto' or 'cpu'"),
        (["--device", "auto"], "torch sees no GPU here ("),
        (["--layers", "0"], "--layers must be a whole number of at least 1"),
        (["--shape", "7b"], "invalid choice: '7b'"),
    ],
)
def test_a_suite_asked_for_nonsense_says_so_at_once(tmp_path, capsys, monkeypatch, options, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        suite(tmp_path, *options)
    assert said in capsys.readouterr().err


def test_no_phase_begins_when_the_time_is_up(tmp_path, capsys):
    assert not suite(tmp_path, "--minutes", "1e-9")
    assert capsys.readouterr().out == "parity: not begun, the time is up\n"


# --- the bundle -----------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A bundle of two files, cut into parts of 1 MiB."""

    def gather(place):
        (place / "data").mkdir()
        (place / "data" / "large").write_bytes(bytes(range(256)) * 10_000)
        (place / "data" / "none").touch()

    monkeypatch.setattr(bundle, "gather", gather)
    monkeypatch.setattr(bundle, "PYTHON", "{}.{}".format(*sys.version_info))
    bundle.main(["pack", str(tmp_path / "parts"), "--part-mb", "1"])
    return sorted((tmp_path / "parts").iterdir())


def test_parts_are_joined_to_the_same_bytes(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "_pip", lambda *_: None)  # there are no wheels
    assert len(parts) == 3
    for part in parts:
        assert sum(path.stat().st_size for path in part.iterdir()) < 1.1 * 2**20
    bundle.main(["unpack", str(tmp_path / "there"), *map(str, reversed(parts))])
    assert (tmp_path / "there/data/large").read_bytes() == bytes(range(256)) * 10_000
    assert (tmp_path / "there/data/none").read_bytes() == b""


def test_a_file_that_stands_is_not_replaced_by_a_damaged_or_a_foreign_one(parts, tmp_path, capsys):
    there = tmp_path / "there" / "data" / "none"
    there.parent.mkdir(parents=True)
    there.write_text("mine")
    with pytest.raises(SystemExit):
        bundle.main(["unpack", str(tmp_path / "there"), *map(str, parts)])
    assert "is there already, and is another one: name a new folder" in capsys.readouterr().err
    assert there.read_text() == "mine"
    assert not (there.parent / "large").exists()


def test_what_pip_said_last_is_the_error(parts, tmp_path, capsys):
    with pytest.raises(SystemExit):
        bundle.main(["unpack", str(tmp_path / "there"), *map(str, parts)])
    assert "pip can't install the bundle's wheels: ERROR: You must give" in capsys.readouterr().err


def test_a_bundle_that_is_not_whole_says_what_is_wrong(parts, tmp_path, capsys):
    def said(*given):
        with pytest.raises(SystemExit):
            bundle.main(["unpack", str(tmp_path / "there"), *map(str, given)])
        return capsys.readouterr().err

    assert "the piece 0.1 of data/large is missing: the bundle has 3 parts, and 2 were" in said(
        parts[0], parts[2]
    )
    assert "holds no manifest.json: it is no part of a bundle" in said(tmp_path)
    (parts[1] / "0.1").write_bytes(b"another")
    assert "data/large isn't what was packed (its sha256 differs): send it again" in said(*parts)
    manifest = parts[0] / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"parts": 3', '"parts": 4'))
    assert "these parts are of several bundles" in said(*parts)
    manifest.write_text("{")
    assert "manifest.json" in said(*parts)


def test_a_whole_bundle_says_which_python_its_wheels_are_for(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "PYTHON", "3.1")
    with refused("the bundle's wheels are for Python 3.1"):
        bundle.unpack(parts, tmp_path / "there")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", ""])
def test_a_bundle_writes_nothing_outside_its_place(parts, tmp_path, capsys, name):
    for part in parts:
        manifest = json.loads((part / "manifest.json").read_text())
        manifest["files"] = {name: manifest["files"]["data/none"]}
        (part / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit):
        bundle.main(["unpack", str(tmp_path / "there"), *map(str, parts)])
    assert "would lie outside" in (said := capsys.readouterr().err) or "is damaged" in said
    assert not (tmp_path / "escaped").exists()


def test_a_bundle_is_not_packed_into_a_folder_that_is_there(tmp_path, capsys):
    for options in ([str(tmp_path)], [str(tmp_path / "new"), "--part-mb", "0"]):
        with pytest.raises(SystemExit):
            bundle.main(["pack", *options])
    told = capsys.readouterr().err
    assert "is there already: name a new folder" in told
    assert "--part-mb must be at least 1, not 0" in told


def test_the_small_text_is_read_from_a_folder_where_gensim_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("ROTLIB_DATA", str(tmp_path))
    (tmp_path / "wikipedia-mini").mkdir()
    (tmp_path / "wikipedia-mini" / "test.txt").write_text("as it was packed")
    from rotlib.models.text import CORPORA

    assert CORPORA["wikipedia-mini"]("test") == "as it was packed"


# --- what a GPU is spared -------------------------------------------------------------------------


def test_the_polar_factor_by_products_is_the_one_by_svd():
    near = torch.linalg.qr(torch.randn(2, 30, 30, dtype=torch.float64)).Q
    near = near + 1e-3 * torch.randn(2, 30, 30, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(near)
    assert (polar(near) - U @ Vh).abs().max() < 1e-14
    far = torch.randn(30, 30, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(far)
    assert (polar(far) - U @ Vh).abs().max() < 1e-12
    assert (newton_schulz(near, 3) - polar(near)).abs().max() < 1e-12


def test_a_models_layer_comes_back_as_it_was_or_as_it_is_by_then(monkeypatch):
    model = tiny_model()
    family = adapt(model)
    layer = family.layers[0]
    before = [parameter.data_ptr() for parameter in layer.parameters()]
    # a CPU doesn't equal its name, so that it stands for another device
    monkeypatch.setattr(type(family), "device", property(lambda _: "cpu"))
    for changed in (False, True):
        kept = layer.mlp.up_proj.weight.clone()
        with family.on_device(layer, changed=changed):
            layer.mlp.up_proj.weight.data = kept + 1
        assert torch.equal(layer.mlp.up_proj.weight, kept + changed)
        assert [parameter.data_ptr() for parameter in layer.parameters()] == before


@pytest.mark.parametrize("learn", [rl.spinquant, rl.ostquant])
def test_windows_learned_from_at_once_give_what_they_give_one_by_one(learn, tokens, monkeypatch):
    def learned(logits: int) -> list[float]:
        monkeypatch.setitem(network._LOGITS, "cpu", logits)
        model = tiny_model(dtype=torch.float32)
        return learn(model, tokens, rl.WeightQuant(bits=3), steps=2).history

    assert learned(2**20) == pytest.approx(learned(0), rel=1e-3)


def test_products_are_as_exact_as_their_stage_asks_for():
    def asked(context) -> str:
        with context:
            return torch.get_float32_matmul_precision()

    before = torch.get_float32_matmul_precision()
    assert asked(precision.coarse_products()) == "medium"
    assert asked(precision.model_products(torch.device("cpu"))) == before
    assert asked(precision.model_products(torch.device("cuda"))) == "high"
    assert precision.slope_dtype(torch.device("cuda")) == torch.float32
    with precision.model_products(torch.device("cuda")):
        assert asked(precision.exact_products()) == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    with precision.float32_everywhere():
        assert asked(precision.coarse_products()) == "highest"
        assert precision.slope_dtype(torch.device("cpu")) == torch.float32
    with suppress(KeyError), precision.coarse_products():
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


def test_off_cuda_a_replayed_function_is_the_function():
    calls = []
    twice = Replayed(lambda x: calls.append(x) or (2 * x,))
    assert [twice(torch.ones(2))[0].sum().item() for _ in range(2)] == [4, 4]
    assert len(calls) == 2


def test_a_rate_names_another_rotation_of_the_rivals_and_of_nobody_else():
    plain, rated = (Recipe(rotation="spinquant", lr=lr) for lr in (None, 0.4))
    assert "lr" not in plain.rotation_reads  # so what was kept before keeps its name
    assert rated.rotation_reads == plain.rotation_reads | {"lr": 0.4}
    assert rated.of_rotation().lr == 0.4
    with pytest.raises(ValueError, match="lr belongs to the rotations spinquant, ostquant"):
        Recipe(rotation="optrot", lr=0.4)
    with pytest.raises(ValueError, match=r"lr .* must be a positive number, not 0"):
        Recipe(rotation="ostquant", lr=0)
