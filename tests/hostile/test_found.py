"""What hunts found that went wrong without a word, each as it was found."""

import json
import os
from copy import deepcopy
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import save_tiny_model, tiny_model
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune
from transformers import LlamaForCausalLM

import rotlib as rl
from rotlib.checkpoints.folder import MARKER, _aside
from rotlib.models.text import text_content
from rotlib.models.zoo import load_tokenizer
from rotlib.quantization.gptq import Report
from rotlib.study import sweep, tables
from rotlib.study.canaries import WORDS
from rotlib.study.pipeline import run
from rotlib.study.recipe import Recipe


@pytest.fixture
def model():
    return tiny_model(dtype=torch.float32)


def refused(pattern: str):
    return pytest.raises(ValueError, match=pattern)


@pytest.mark.parametrize("norm", ["layers.0.input_layernorm", "norm"])
def test_a_hook_on_a_norm_is_seen_by_fuse(model, norm):
    gain = torch.rand(48) + 0.5
    module = model.model.get_submodule(norm)
    module.register_forward_hook(lambda module, args, output: output * gain)
    with refused("has a hook, which would see rotated states: remove it first"):
        rl.fuse(model, rl.random_rotation(model))


def test_a_pruned_weight_is_no_weight_to_quantize(model):
    prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.5)
    model.requires_grad_(False)
    with refused(r"the weight of layers\.0\.up is computed from other tensors"):
        rl.rtn(model, rl.WeightQuant(bits=2))


def test_models_that_share_a_config_are_marked_one_by_one(model):
    other = LlamaForCausalLM(model.config).eval().requires_grad_(False)
    rl.fuse(model, rl.random_rotation(model, R4=True))
    rl.rtn(model, rl.WeightQuant())
    assert rl.is_rotated(model)
    assert model.config.rotlib_online == ["R4"]
    assert not rl.is_rotated(other)
    assert model.model.layers[0].self_attn.config is model.config
    rl.rtn(other, rl.WeightQuant())  # it is neither rotated nor quantized


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_weights_of_another_kind_of_number_are_not_cast(dtype, tmp_path):
    save_tiny_model(tmp_path)
    file, key = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    weights = load_file(file)
    save_file(weights | {key: weights[key].to(dtype)}, file, {"format": "pt"})
    with refused(f"its weight {key} is of the type"):
        rl.load(str(tmp_path))


def test_an_index_names_files_of_its_own_folder(tmp_path):
    save_tiny_model(tmp_path)
    index = {"weight_map": {"lm_head.weight": "../other/weights.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused("names '../other/weights.safetensors', which isn't in the folder"):
        rl.load(str(tmp_path))


@pytest.mark.parametrize(
    "how",
    [
        {"signs": torch.full((48,), 1j)},
        {"order": torch.arange(48, dtype=torch.uint8)},
        {"order": torch.ones(48, dtype=torch.bool)},
        {"order": torch.arange(48, device="meta")},
    ],
)
def test_signs_are_real_and_an_order_is_whole_numbers(how):
    with refused("signs must be real|the order must hold whole numbers"):
        rl.BlockHadamard(48, 48, **how)


def test_what_is_kept_of_a_layer_has_its_shape(model, tokens):
    done = rl.gptq(deepcopy(model), tokens, rl.WeightQuant())
    first = done.weights["layers.0.q"]
    done.weights["layers.0.q"] = rl.QuantizedWeight(*(part[:1] for part in first))

    class Kept:
        def get(self, layer):
            return done

        def put(self, layer, report): ...

    with refused(r"what is kept of layer 0 lacks layers\.0\.q, or has another shape"):
        rl.gptq(model, tokens, rl.WeightQuant(), kept=Kept())
    done.weights.clear()
    with refused(r"what is kept of layer 0 lacks layers\.0\.q"):
        rl.gptq(tiny_model(dtype=torch.float32), tokens, rl.WeightQuant(), kept=Kept())
    Kept.get = lambda self, layer: "a layer"
    with refused("kept.get must return a Report or None, not a str"):
        rl.gptq(tiny_model(dtype=torch.float32), tokens, rl.WeightQuant(), kept=Kept())
    with refused("kept must hold layers by get and put"):
        rl.gptq(tiny_model(dtype=torch.float32), tokens, rl.WeightQuant(), kept=Report)


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        (lambda scale: scale * 0 + 3e38, "within torch.float32"),
        (lambda scale: scale.double() * 1e300, "within torch.float32"),
        (lambda scale: scale.round().long() + 1, "has scales of torch.int64"),
        (lambda scale: scale.to("meta"), "it is meta or sparse"),
    ],
)
def test_scales_that_no_weight_has_are_not_restored(model, scale, said):
    weights = rl.rtn(deepcopy(model), rl.WeightQuant())
    weights["layers.0.q"] = weights["layers.0.q"]._replace(scale=scale(weights["layers.0.q"].scale))
    with refused(said):
        rl.restore(model, weights)
    assert not getattr(model.config, "rotlib_quantized", False)


def test_two_folders_of_texts_are_two_texts_whatever_their_times_say(tmp_path, monkeypatch):
    found = []
    for name, word in (("a", "the"), ("b", "teh")):
        (tmp_path / name / "wikitext2").mkdir(parents=True)
        for part in ("train", "test"):
            file = tmp_path / name / "wikitext2" / f"wiki.{part}.raw"
            file.write_text(f"{word} {part}")
            os.utime(file, (1e9, 1e9))
        monkeypatch.setenv("ROTLIB_DATA", str(tmp_path / name))
        found.append(text_content("wikitext2"))
    assert found[0] != found[1]


def test_an_export_put_aside_is_removed_only_as_it_was_written(model, tmp_path):
    rl.rtn(model, rl.WeightQuant())
    folder = rl.export(model, tmp_path / "export")
    aside = _aside(folder)
    aside.mkdir()
    (aside / MARKER).write_text("{}")
    (aside / "thesis.txt").write_text("years of work")
    with refused("holds something else than an export of rotlib"):
        rl.export(model, folder, overwrite=True)
    assert (aside / "thesis.txt").read_text() == "years of work"


def test_nothing_is_exported_into_the_models_own_folder(tmp_path):
    save_tiny_model(tmp_path)
    model, _ = rl.load(str(tmp_path))
    rl.rtn(model, rl.WeightQuant())
    with refused("lies in the model's own folder: name another one"):
        rl.export(model, tmp_path / "W4")


def test_a_tokenizer_larger_than_the_model_is_another_models(model, tmp_path):
    rl.rtn(model, rl.WeightQuant())
    with refused("this tokenizer has 49152 tokens and the model 96"):
        rl.export(model, tmp_path / "export", tokenizer=load_tokenizer("smollm2-135m"))


@pytest.mark.parametrize(
    "option", ["seed=010", "seed=1:30", "seed=2026-13-45", "seed=" + "9" * 5000]
)
def test_a_filter_reads_numbers_as_a_sweep_file_does(option, tmp_path, capsys):
    path = tmp_path / "sweep.yaml"
    path.write_text("grid: {seed: [8, 90]}")
    with pytest.raises(SystemExit):
        sweep.main([str(path), "--dry-run", "--only", option])
    assert "can't be read" in capsys.readouterr().err


def test_slopes_that_vanish_agree_on_nothing(model, tokens):
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.zero_()
    with refused("a window has no slope"):
        rl.slope_agreement(model, tokens, quant=rl.WeightQuant())


def test_settings_of_torch_that_change_numbers_are_refused_before_anything_is_marked(model, tokens):
    with torch.autocast("cpu", torch.bfloat16), refused("torch.autocast is on"):
        rl.gptq(model, tokens, rl.WeightQuant())
    torch.set_default_dtype(torch.float64)
    try:
        with refused("torch's default dtype is torch.float64"):
            rl.gptq(model, tokens, rl.WeightQuant())
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"), refused("torch's default device is 'meta'"):
        rl.optrot(model)
    with torch.inference_mode(), refused("torch.inference_mode is on"):
        rl.spinquant(model, tokens, rl.WeightQuant())
    assert not getattr(model.config, "rotlib_quantized", False)
    with torch.no_grad():
        assert len(rl.spinquant(model, tokens, rl.WeightQuant(), steps=1).history) == 1


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_a_measure_does_not_change_with_a_weights_size(size):
    W = torch.eye(4, dtype=torch.float64)
    assert rl.incoherence(W * size) == pytest.approx(2)
    assert rl.kurtosis(W * size) == pytest.approx(4)
    assert rl.group_spread(W * size, 2) == pytest.approx(rl.group_spread(W, 2))


def test_arms_whose_seeds_all_diverged_have_a_row(folder):
    model = Path(folder / "model")
    weights = load_file(model / "model.safetensors")
    key = min({"lm_head.weight", "model.embed_tokens.weight"} & weights.keys())
    weights[key] = weights[key][torch.randperm(len(weights[key]))] * 1e6
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    settings = {"model": str(model), "text": "wikitext2", "window": 64, "test_windows": 2}
    results = [
        run(Recipe(**settings, bits=2, seed=seed, rotation="random", rounding="rtn"))
        for seed in (0, 1)
    ]
    (arm,) = tables.arms(results)
    assert arm.diverged
    assert "inf" in tables.markdown([arm]) or "e+" in tables.markdown([arm])


def test_zero_shot_items_are_those_of_the_text_as_it_is(tmp_path, monkeypatch):
    from rotlib.measure.offline_tasks import offline_items

    monkeypatch.setenv("ROTLIB_DATA", str(tmp_path))
    (tmp_path / "wikitext2").mkdir()
    found = []
    for seed in (0, 1):
        draw = Random(seed)
        lines = [" ".join(draw.choices(WORDS, k=15)).capitalize() + "." for _ in range(400)]
        text = "\n\n".join(" ".join(lines[i : i + 5]) for i in range(0, 400, 5))
        for part in ("train", "test"):
            (tmp_path / "wikitext2" / f"wiki.{part}.raw").write_text(f"{part} {text}")
        found.append(offline_items("last_word", "wikitext2"))
    assert found[0] != found[1]


def test_options_given_twice_are_added_up(tmp_path, capsys):
    path = tmp_path / "sweep.yaml"
    path.write_text("grid: {rotation: [none, hadamard], seed: [0, 1]}")
    sweep.main([str(path), "--dry-run", "--only", "rotation=none", "--only", "seed=1"])
    assert "1 recipes:" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        sweep.main([str(path), "--dry-run", "--only", "rotation=none", "rotation=hadamrd"])
    assert "no recipe of this sweep has rotation=hadamrd" in capsys.readouterr().err


@pytest.mark.parametrize("power", [-66, 66])
def test_clip_search_finds_the_same_for_a_weight_of_any_size(model, power):
    W = model.model.layers[0].mlp.up_proj.weight
    from rotlib.quantization.grids import fit_grid

    quant = rl.WeightQuant(bits=3)
    usual, scaled = (fit_grid(w, quant).scale for w in (W, W * 2.0**power))
    assert torch.equal(scaled, usual * 2.0**power)


def test_factors_of_a_rotation_are_nobody_elses(model, tokens):
    signs, order = torch.ones(48), torch.arange(48)
    R1 = rl.BlockHadamard(48, 48, signs=signs, order=order)
    signs.mul_(2)
    order.zero_()
    before = model(tokens).logits
    assert torch.allclose(rl.fuse(model, rl.Rotation(R1, None))(tokens).logits, before, atol=1e-3)


def test_a_reference_is_of_an_unrounded_model(model, tokens):
    with (
        rl.quantized_activations(model, rl.ActivationQuant(bits=3)),
        refused("activations are being rounded"),
    ):
        rl.Reference(model, tokens)


def test_a_model_that_computes_nan_is_neither_measured_nor_quantized(model, tokens):
    model.model.layers[0].input_layernorm.variance_epsilon = -1e9
    for use in (
        lambda: rl.perplexity(model, tokens.flatten(), 32),
        lambda: rl.gptq(model, tokens, rl.WeightQuant()),
    ):
        with refused("this model computes NaN or infinite states"):
            use()


def test_a_weights_digest_sees_every_entry(model):
    from rotlib.models.families import weights_sample

    before = weights_sample(model)
    model.model.layers[0].mlp.up_proj.weight.view(-1)[1] *= 2
    assert weights_sample(model) != before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("version https://git-lfs.github.com/spec/v1\n", "is a git-LFS pointer"),
        ("<!DOCTYPE html><html>not found</html>", "is a web page"),
        ("\0" * 4096, "holds NUL characters"),
        ("\ufeffA text", "has a byte order mark"),
    ],
)
def test_a_file_that_is_no_text_is_told(text, said, tmp_path, monkeypatch):
    monkeypatch.setenv("ROTLIB_DATA", str(tmp_path))
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "wiki.test.raw").write_text(text)
    with refused(f"the test split of wikitext2 {said}"):
        rl.load_tokens("wikitext2", load_tokenizer("smollm2-135m"), "test")


def test_test_text_is_not_calibration_text(tmp_path, monkeypatch):
    monkeypatch.setenv("ROTLIB_DATA", str(tmp_path))
    (tmp_path / "wikitext2").mkdir()
    for part in ("train", "test"):
        (tmp_path / "wikitext2" / f"wiki.{part}.raw").write_text("one text")
    with refused("both splits of wikitext2 are one text"):
        text_content("wikitext2")
