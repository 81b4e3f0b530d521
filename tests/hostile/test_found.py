"""What hunts found that went wrong without a word, each as it was found."""

import json
import os
from copy import copy, deepcopy
from dataclasses import replace
from functools import wraps
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import refused, save_tiny_model, tiny_model
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP

import rotlib as rl
from rotlib.checkpoints.folder import MARKER, _aside
from rotlib.disk import folder_of
from rotlib.models.text import text_content
from rotlib.models.zoo import load_tokenizer
from rotlib.quantization.activations import round_tokens
from rotlib.quantization.gptq import Report
from rotlib.quantization.grids import round_to_nearest
from rotlib.study import gpu, numerics, reproduce, store, sweep, tables
from rotlib.study.canaries.inputs import WORDS
from rotlib.study.engines import ENGINES, NoCluster
from rotlib.study.own import read_rotations, source_digest
from rotlib.study.pipeline import run
from rotlib.study.recipe import OWN, Recipe


@pytest.mark.parametrize("norm", ["layers.0.input_layernorm", "norm"])
def test_a_hook_on_a_norm_is_seen_by_fuse(model, norm):
    gain = torch.rand(48) + 0.5
    module = model.model.get_submodule(norm)
    module.register_forward_hook(lambda module, args, output: output * gain)
    with refused(
        "has a hook, or a forward of its own, which would see rotated states: remove it first"
    ):
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
    with refused("names '../other/weights.safetensors', no safetensors of this folder"):
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
    with refused("kept.get must return a whole Report or None"):
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
    from rotlib.models.content import weights_sample

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


# from here on: the fifth hunt

_FILE = """import functools, torch, rotlib as rl
from functools import partial, singledispatch, wraps

def helper(n, value=1.0):
    return torch.eye(n, dtype=torch.float64).roll({shift}, 0)

class Base:
    def make(self, n): return helper(n)

class Maker(Base):
    pass

def twice(f):
    @wraps(f)
    def inner(*args): return f(*args)
    return inner

@singledispatch
def by_kind(n): return helper(n)

decorated, given, one = twice(helper), partial(helper, value=2.0), Maker()
bound, listed, named = one.make, [helper], {{"a": helper}}

@rl.register_rotation("turned")
def turned(model, seed=0, R3=False, R4=False):
    return rl.Rotation({call}(model.config.hidden_size), None, R3, R4)
"""
_CALLS = ("decorated", "given", "one.make", "bound", "listed[0]", 'named["a"]', "by_kind")


@pytest.fixture
def turned():
    yield lambda: source_digest(OWN["turned"])
    OWN.clear()


@pytest.mark.parametrize("call", _CALLS)
def test_a_rotation_of_ones_own_is_known_by_all_of_its_file(call, tmp_path, turned):
    digests = []
    for shift in (1, 1, 2):
        OWN.clear()
        (tmp_path / "mine.py").write_text(_FILE.format(call=call, shift=shift))
        read_rotations(tmp_path / "mine.py")
        digests.append(turned())
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("call", _CALLS)
def test_in_a_notebook_it_is_known_by_all_that_it_calls(call, tmp_path, turned, monkeypatch):
    monkeypatch.setattr("rotlib.study.own._file_of", lambda make: "")  # no file, but cells
    test_a_rotation_of_ones_own_is_known_by_all_of_its_file(call, tmp_path, turned)


def test_a_rotation_whose_file_was_changed_after_its_import_is_the_one_that_was_imported(
    tmp_path, turned
):
    file = tmp_path / "mine.py"
    file.write_text(_FILE.format(call="helper", shift=1))
    read_rotations(file)
    before = turned()
    file.write_text(_FILE.format(call="helper", shift=2))
    assert turned() == before
    OWN.clear()
    read_rotations(file)
    assert turned() != before


@pytest.mark.parametrize("kind", [torch.nn.LayerNorm, GemmaRMSNorm])
@pytest.mark.parametrize("path", ["layers.1.input_layernorm", "norm"])
def test_a_norm_of_another_kind_is_refused(model, kind, path):
    model.model.set_submodule(path, kind(48).eval().requires_grad_(False))
    with refused("isn't llama's own RMSNorm, so its gain can't be folded"):
        rl.fuse(model, rl.random_rotation(model))


def test_a_config_with_other_heads_is_refused(model):
    model.config.num_attention_heads *= 2
    model.config.num_key_value_heads *= 2
    model.config.head_dim = 48 // model.config.num_attention_heads
    with refused("it was changed since the model was loaded"):
        rl.fuse(model, rl.random_rotation(model))


def test_a_text_that_is_replaced_under_a_pinned_name_is_seen(tmp_path, monkeypatch):
    assert numerics.drift("wikipedia-mini") is None
    (tmp_path / "wikipedia-mini").mkdir()
    for split in ("calibration", "test"):
        (tmp_path / "wikipedia-mini" / f"{split}.txt").write_text(f"another {split} text")
    monkeypatch.setenv("ROTLIB_DATA", str(tmp_path))
    with refused(
        "the text wikipedia-mini is another one here than the study's: look at the folder"
    ):
        numerics.check(["wikipedia-mini"])
    monkeypatch.delenv("ROTLIB_DATA")
    numerics.check(["wikipedia-mini"])


def test_an_index_names_no_pickle(tmp_path):
    save_tiny_model(tmp_path)
    index = {"weight_map": {"lm_head.weight": "weights.bin"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused("names 'weights.bin', no safetensors of this folder"):
        rl.load(str(tmp_path))


def test_a_weight_in_two_files_is_refused(tmp_path):
    save_tiny_model(tmp_path)
    key = "model.layers.0.mlp.up_proj.weight"
    weights = load_file(tmp_path / "model.safetensors")
    save_file({key: weights[key] + 1}, tmp_path / "other.safetensors", {"format": "pt"})
    with refused(f"its weight {key} is in model.safetensors and in other.safetensors"):
        rl.load(str(tmp_path))


@pytest.mark.parametrize("method", ["evil", "gptq"])
def test_a_folder_that_says_it_is_quantized_is_not_loaded(method, tmp_path):
    save_tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused("is quantized already: load the original model it was made from"):
        rl.load(str(tmp_path))


@pytest.mark.parametrize("attention", ["flex_attention", "somebody/kernels"])
def test_a_config_cannot_choose_the_code_of_attention(attention, tmp_path):
    save_tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["attn_implementation"] = config["_attn_implementation"] = attention
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = rl.load(str(tmp_path))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_export_in_16_bits_still_computes_what_the_model_does(dtype, model, tmp_path):
    rl.rtn(model, rl.WeightQuant())
    rl.export(model, tmp_path / "sound", dtype=dtype)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, out: (1.3 * out[0], *out[1:]))
    with pytest.raises(RuntimeError, match="computes other logits from the folder"):
        rl.export(model, tmp_path / "hooked", dtype=dtype)


def test_hadamard_in_float16_stays_within_its_range():
    x = torch.zeros(1, 4096, dtype=torch.float16)
    x[0, :64] = 1100
    exact = rl.apply_hadamard(x.double())
    torch.testing.assert_close(rl.apply_hadamard(x).double(), exact, rtol=1e-3, atol=1)


def test_a_hadamard_matrix_first_used_in_inference_mode_has_slopes_later():
    with torch.inference_mode():
        rl.apply_hadamard(torch.randn(2, 1536))
    x = torch.randn(2, 1536, requires_grad=True)
    rl.apply_hadamard(x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach(), rtol=1e-4, atol=1e-4)


def test_a_folder_that_the_environment_names_has_no_blanks_around_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ROTLIB_RESULTS", f" {tmp_path} ")
    assert folder_of("ROTLIB_RESULTS", "results") == tmp_path


def test_an_export_whose_marker_holds_notes_is_not_replaced(model, tmp_path):
    rl.rtn(model, rl.WeightQuant())
    folder = rl.export(model, tmp_path / "out")
    marker = json.loads((folder / MARKER).read_text())
    (folder / MARKER).write_text(json.dumps(marker | {"notes": "the one for the talk"}))
    with refused("isn't as rotlib wrote it"):
        rl.export(model, folder, overwrite=True)


def test_a_model_that_has_shown_its_hidden_states_can_be_fused(model, tokens):
    before = model(tokens, output_hidden_states=True).logits
    rl.fuse(model, rl.random_rotation(model))
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [1e-12, 1e25])
def test_a_rotation_is_not_learned_of_weights_without_fourth_powers(model, size):
    for layer in model.model.layers:
        layer.mlp.up_proj.weight *= size
    with refused("beyond what a rotation can be learned of: scale the model first"):
        rl.optrot(model, steps=2)


def test_a_forward_of_ones_own_is_not_rotated_past(model):
    layer = model.model.layers[0]
    before = layer.forward
    layer.forward = lambda x, *given, **named: before(2 * x, *given, **named)
    with refused("model.layers.0 has a hook, or a forward of its own"):
        rl.fuse(model, rl.random_rotation(model))


@pytest.mark.parametrize("part", ["", "model"])
def test_a_hook_on_the_whole_model_is_not_left_out_of_a_measure(model, tokens, part):
    model.get_submodule(part).register_forward_hook(lambda module, args, output: output)
    with refused("isn't called here, where its layers run one by one"):
        rl.evaluate(model, tokens)


def test_a_tied_weight_held_twice_is_rotated_once_each(tokens):
    model = tiny_model("llama, tied", dtype=torch.float32)
    model.load_state_dict(model.state_dict(), assign=True)
    model.requires_grad_(False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    before = model(tokens).logits
    after = rl.fuse(model, rl.random_rotation(model))(tokens).logits
    assert (after - before).norm() < 1e-4 * before.norm()


def test_weights_that_overlap_are_refused(model):
    both = torch.randn(97, 48)
    model.model.embed_tokens.weight = torch.nn.Parameter(both[:96], requires_grad=False)
    model.lm_head.weight = torch.nn.Parameter(both[1:], requires_grad=False)
    with refused("share memory"):
        rl.fuse(model, rl.random_rotation(model))


def test_weights_that_cannot_be_changed_are_refused_before_any_is():
    with torch.inference_mode():
        made = tiny_model(dtype=torch.float32)
    with refused("was made in torch.inference_mode"):
        rl.fuse(made, rl.random_rotation(made))
    model = tiny_model(dtype=torch.float32)
    norm = model.model.layers[0].input_layernorm
    norm.weight = torch.nn.Parameter(torch.ones(1).expand(48), requires_grad=False)
    with refused("the entries of model.layers.0.input_layernorm.weight share memory"):
        rl.fuse(model, rl.random_rotation(model))


def test_a_tokenizer_that_draws_lots_is_refused(tmp_path):
    save_tiny_model(tmp_path)
    path = tmp_path / "tokenizer.json"
    held = json.loads(path.read_text())
    held["model"]["dropout"] = 0.3
    path.write_text(json.dumps(held))
    with refused("leaves merges out at random"):
        rl.load(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "config", "says"),
    [
        ("granite, multipliers", {"logits_scaling": 0}, "logits_scaling is 0"),
        ("llama", {"num_key_value_heads": 4}, "which doesn't divide them"),
    ],
)
def test_a_config_that_divides_by_nothing_is_refused(name, config, says):
    model = tiny_model(name, dtype=torch.float32)
    model.config.update(config)
    with refused(says):
        rl.fuse(model, rl.random_rotation(tiny_model(dtype=torch.float32)))


def test_a_gguf_export_that_cannot_be_is_refused_before_the_run(tmp_path, monkeypatch):
    save_tiny_model(tmp_path / "granite", "granite, multipliers")
    monkeypatch.setattr("rotlib.study.checkpoint.run", None)
    with refused("GGUF files of granite models aren't written here"):
        rl.export_recipe(rl.Recipe(model=str(tmp_path / "granite")), tmp_path / "out", "gguf")
    save_tiny_model(tmp_path / "llama")
    with refused("q reads 48 inputs, and GGUF's blocks hold 32"):
        rl.export_recipe(rl.Recipe(model=str(tmp_path / "llama")), tmp_path / "out", "gguf")


class Doubled(LlamaForCausalLM):
    def forward(self, *args, **settings):
        out = super().forward(*args, **settings)
        out.logits = 2 * out.logits
        return out


class Bent(LlamaMLP):
    def forward(self, x):
        return super().forward(x) + x.relu()


def test_a_class_with_a_forward_of_its_own_is_neither_measured_nor_rotated(model, tokens):
    model.__class__ = Doubled
    with refused("the model is a Doubled with a forward of its own"):
        rl.perplexity(model, tokens.flatten(), 32)
    model = tiny_model(dtype=torch.float32)
    model.model.layers[1].mlp.__class__ = Bent
    with refused(r"model\.layers\.1\.mlp is a Bent with a forward of its own"):
        rl.fuse(model, rl.random_rotation(tiny_model(dtype=torch.float32)))


def test_a_class_whose_forward_was_patched_is_known_by_where_the_code_was_written(
    model, tokens, monkeypatch
):
    original = LlamaMLP.forward

    @wraps(original)  # which copies the name of transformers' module
    def patched(self, x):
        return original(self, x) + x.relu()

    monkeypatch.setattr(LlamaMLP, "forward", patched)
    with refused(r"model\.layers\.0\.mlp is a LlamaMLP with a forward of its own"):
        rl.perplexity(model, tokens.flatten(), 32)


def test_tuning_replaces_no_forward_of_ones_own(model, tokens):
    reference = rl.Reference(model, tokens)
    rl.rtn(model, rl.WeightQuant(bits=3))
    linear = model.model.layers[1].mlp.up_proj
    linear.forward = own = lambda x: 2 * torch.nn.functional.linear(x, linear.weight)
    with refused(r"layers\.1\.up has a forward of its own, which tuning would replace"):
        rl.tune(model, reference, steps=2, held_out=1)
    assert linear.forward is own


def test_a_forward_of_ones_own_is_not_copied_with_its_module(model, tokens):
    linear = model.model.layers[0].mlp.up_proj
    linear.forward = linear.forward  # it changes nothing, and a copy of it calls this linear
    with refused(r"model\.layers\.0\.mlp\.up_proj has a forward of its own, which a copy"):
        rl.gptq(model, tokens, rl.WeightQuant(), asymmetry=0.25)
    rl.gptq(model, tokens, rl.WeightQuant())
    other = tiny_model(dtype=torch.float32)
    other.lm_head.forward = other.lm_head.forward
    with refused("lm_head has a forward of its own, which a copy"):
        rl.Reference(other, tokens)


@pytest.mark.parametrize("learn", [rl.spinquant, rl.ostquant])
def test_learning_through_the_network_passes_no_hook_over(model, tokens, learn):
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: 3 * output)
    with refused(r"model\.embed_tokens has a hook, or a forward of its own, which would see"):
        learn(model, tokens, rl.WeightQuant(bits=3))


def test_a_quantized_model_is_no_reference_for_itself(model, tokens):
    alias, shallow = model, copy(model)
    rl.rtn(model, rl.WeightQuant(bits=2))
    for reference, says in (
        (alias, "the reference is the quantized model itself, or shares its layers"),
        (shallow, "shares its layers with a copy that was rotated or quantized"),
    ):
        with refused(says):
            rl.kl_divergence(reference, model, tokens.flatten(), 32)


def test_a_rotated_model_whose_weights_were_loaded_back_is_told(model, tokens):
    before = deepcopy(model.state_dict())
    rl.fuse(model, rl.random_rotation(model, R4=True))
    model.load_state_dict(before, strict=False)
    with refused("marked as rotated, and its final norm isn't folded"):
        rl.perplexity(model, tokens.flatten(), 32)


@pytest.mark.parametrize("damage", ["a NaN", "another shape", "a word for the curve", "no Adam"])
def test_a_damaged_state_of_tuning_is_not_gone_on_from(model, tokens, damage):
    class Kept:
        state = None

        def get(self):
            return self.state

        def put(self, state):
            self.state = state

    kept, reference = Kept(), rl.Reference(model, tokens)
    how = {"steps": 2, "held_out": 1, "kept": kept}
    rl.rtn(model, rl.WeightQuant(bits=3))
    rl.tune(deepcopy(model), reference, **how)
    best = kept.state["best"]
    kept.state |= {
        "a NaN": {"best": [value * float("nan") for value in best]},
        "another shape": {"leaves": [value[:1] for value in best]},
        "a word for the curve": {"kl": "0.2"},
        "no Adam": {"adam": {}},
    }[damage]
    with refused("kept.get must return None, or what kept.put was given, unchanged"):
        rl.tune(model, reference, **how)


def test_a_model_that_was_compiled_in_place_is_told(model, tokens):
    model.model.layers[1].mlp.compile(backend="eager")
    with refused(r"model\.layers\.1\.mlp was compiled in place"):
        rl.fuse(model, rl.random_rotation(tiny_model(dtype=torch.float32), R4=True))


def test_a_model_with_a_layer_taken_out_is_told(model, tokens):
    model.model.layers = model.model.layers[1:]
    model.config.num_hidden_layers = 1
    model.eval()
    with refused(r"layers\.0 takes itself for layer 1"):
        rl.rtn(model, rl.WeightQuant())
    model.model.layers[0].self_attn.layer_idx = 0
    rl.rtn(model, rl.WeightQuant())


def test_an_adapter_beside_the_weights_is_not_passed_over(tmp_path):
    save_tiny_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with refused("an adapter lies beside its weights"):
        rl.load(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("config.json", "null", "is not a valid JSON file of settings by name"),
        ("config.json", '{"model_type": "llama", "num_key_value_heads": 0}', "no number above 0"),
        ("model.safetensors.index.json", "[]", "is not a valid JSON file of settings by name"),
    ],
)
def test_a_file_that_says_nothing_is_named(tmp_path, file, text, said):
    save_tiny_model(tmp_path)
    (tmp_path / file).write_text(text)
    with refused(said):
        rl.load(str(tmp_path))


def test_a_folder_of_texts_that_is_none_is_told_for_every_text(monkeypatch):
    monkeypatch.setenv("ROTLIB_DATA", "/no/where")
    with refused("ROTLIB_DATA names '/no/where', which is no folder"):
        rl.load_tokens("wikipedia-mini", load_tokenizer("smollm2-135m"), "test")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_rotation_of_any_dtype_has_a_digest(dtype):
    R1 = torch.nn.Parameter(torch.eye(48, dtype=dtype).flip(0))
    assert len(rl.Rotation(R1, None).digest()) == 12


def test_a_copy_made_while_activations_are_rounded_is_refused(model, tokens):
    with rl.quantized_activations(model, rl.ActivationQuant(bits=4)):
        copy = deepcopy(model)
    for call in (
        lambda: rl.perplexity(copy, tokens.flatten(), 32),
        lambda: rl.rtn(copy, rl.WeightQuant()),
    ):
        with refused("was copied inside quantized_activations"):
            call()


@pytest.mark.parametrize("change", ["rtn", "gptq", "fuse"])
def test_a_model_left_half_changed_is_not_measured(model, tokens, change, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    changes = {
        "rtn": lambda: rl.rtn(model, rl.WeightQuant()),
        "gptq": lambda: rl.gptq(model, tokens, rl.WeightQuant()),
        "fuse": lambda: rl.fuse(model, rl.random_rotation(model)),
    }
    where = {"rtn": "quantized.set_together", "gptq": "gptq.set_together"}
    if change == "fuse":
        monkeypatch.setattr("rotlib.rotations.fuse.norm_gains", interrupted)
    else:
        monkeypatch.setattr(f"rotlib.quantization.{where[change]}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        changes[change]()
    with refused("was interrupted, so it is neither the original nor done"):
        rl.perplexity(model, tokens.flatten(), 32)


def test_weights_that_would_vanish_beside_their_neighbours_unit_are_told(model, tokens):
    model.model.layers[1].mlp.up_proj.weight.mul_(1e-6)
    quant = rl.WeightQuant(grid="nvfp4")
    for call in (lambda: rl.rtn(model, quant), lambda: rl.gptq(model, tokens, quant)):
        with refused(
            r"the weights of layers\.1\.up are more than 4096 times smaller than those of"
        ):
            call()
    rl.rtn(model, rl.WeightQuant(group_size=16))


@pytest.mark.parametrize("grid", ["nvfp4", "mxfp4"])
def test_infinite_activations_are_not_made_finite(grid):
    x = torch.ones(2, 64)
    x[1, 3] = torch.inf
    quant, clip = rl.ActivationQuant(bits=4, grid=grid).input_grid()
    assert not torch.isfinite(round_tokens(x, quant, clip, quant.group_size)).all()


def test_a_model_with_a_sparse_or_a_meta_weight_is_told_by_its_name(tokens):
    for there, says in (
        (torch.Tensor.to_sparse, "is sparse"),
        (to_meta, "lies on the device 'meta'"),
    ):
        model = tiny_model(dtype=torch.float32)
        up = model.model.layers[1].mlp.up_proj
        up.weight = torch.nn.Parameter(there(up.weight), requires_grad=False)
        for call in (
            lambda m=model: rl.perplexity(m, tokens.flatten(), 32),
            lambda m=model: rl.rtn(m, rl.WeightQuant()),
        ):
            with refused(rf"model\.layers\.1\.mlp\.up_proj\.weight {says}"):
                call()


def to_meta(weight):
    return weight.to("meta")


def test_a_quantized_model_that_was_saved_without_its_codes_is_told_what_to_do(model, tmp_path):
    rl.rtn(model, rl.WeightQuant())
    model.save_pretrained(tmp_path / "saved")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved").requires_grad_(False)
    with refused("was saved without them; load the original again"):
        rl.export(again, tmp_path / "out")


def test_a_pipe_in_a_files_place_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("ROTLIB_RESULTS", str(tmp_path))
    (tmp_path / "local").mkdir()
    os.mkfifo(tmp_path / "local" / "quantize-000000000000.json")
    with refused("is no file"):
        store.load_results()
    monkeypatch.setenv("ROTLIB_DATA", str(tmp_path))
    (tmp_path / "wikipedia-mini").mkdir()
    (tmp_path / "wikipedia-mini" / "calibration.txt").write_text("words")
    os.mkfifo(tmp_path / "wikipedia-mini" / "test.txt")
    with refused(r"there is no file test\.txt"):
        text_content("wikipedia-mini")


def test_a_cluster_that_does_not_answer_is_told_at_once():
    with pytest.raises(NoCluster, match="nobody answers at localhost:1"):
        next(ENGINES["ray"]([[Recipe()]], 1, address="localhost:1"))


def test_nothing_of_somebody_elses_is_replaced_by_a_phase(tmp_path, capsys):
    notes = tmp_path / "stages.json"
    notes.write_text("my notes")
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--device", "cpu", "--minutes", "1"])
    assert "holds something else than a phase's lines" in capsys.readouterr().err
    assert notes.read_text() == "my notes"


@pytest.mark.parametrize(
    ("rotation", "says"),
    [
        (rl.Rotation(torch.full((4, 4), torch.nan), None), "isn't orthogonal"),
        (rl.Rotation("x", None), "R1 must be a floating-point tensor"),
        (rl.Rotation(None, [torch.eye(4)]), "R2 must be a floating-point tensor"),
        (rl.Rotation(None, torch.eye(4)), "R2 must be a tensor of layers x heads x n x n"),
    ],
)
def test_what_is_no_rotation_is_not_kept_as_one(rotation, says, tmp_path):
    with refused(says):
        rl.save_rotation(rotation, tmp_path / "R.bin")
    assert not list(tmp_path.iterdir())


def test_a_rotation_is_kept_in_a_file(tmp_path):
    for place in (tmp_path, "", None):
        with refused(r"is a folder|a file with a name"):
            rl.save_rotation(rl.Rotation(torch.eye(4), None), place)


def test_a_history_that_is_none_is_refused(model):
    with refused("history must list objectives as numbers"):
        rl.fuse(model, rl.Rotation(torch.eye(48), None, history="abc"))


def test_a_reference_of_a_quantized_model_is_told(model, tokens):
    rl.rtn(model, rl.WeightQuant())
    with pytest.warns(UserWarning, match="this reference is of a quantized model"):
        rl.Reference(model, tokens)


@pytest.mark.parametrize("value", ['"256"', "[2]", "true", "-1"])
def test_a_count_of_a_config_is_a_whole_number_above_zero(tmp_path, value):
    save_tiny_model(tmp_path)
    (tmp_path / "config.json").write_text(f'{{"model_type": "llama", "vocab_size": {value}}}')
    with refused("its config.json says vocab_size .*, no number above 0"):
        rl.load(str(tmp_path))


def test_a_rotation_that_passes_its_seed_over_is_not_exported_under_another_ones_numbers(
    folder, tmp_path
):
    @rl.register_rotation("chance", replace=True)
    def by_chance(model, seed=0, R3=False, R4=False):
        return rl.Rotation(torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64)).Q, None)

    recipe = rl.Recipe(
        **{"model": str(folder / "model"), "text": "wikitext2", "rotation": "chance"},
        **{"rounding": "rtn", "window": 32, "test_windows": 1},
    )
    try:
        with refused("the rotation 'chance' is another one each time it is made"):
            rl.export_recipe(recipe, tmp_path / "out")
    finally:
        OWN.pop("chance")


def test_a_tokenizer_of_another_model_is_told_before_the_run(folder, tmp_path, monkeypatch):
    config = json.loads((folder / "model" / "config.json").read_text())
    LlamaForCausalLM(LlamaConfig(**config | {"vocab_size": 96})).save_pretrained(folder / "model")
    monkeypatch.setattr("rotlib.study.checkpoint.run", None)
    recipe = rl.Recipe(model=str(folder / "model"), text="wikitext2", window=32)
    with refused("this tokenizer has 384 tokens and the model 96"):
        rl.export_recipe(recipe, tmp_path / "out")


def test_an_olmoe_takes_no_scale_of_its_heads(model):
    mixture = tiny_model("olmoe, experts, norms over all heads", dtype=torch.float32)
    rotation = rl.hadamard_rotation(mixture)
    rotation.scales = {"query_key": torch.full((2, 1, 4), 2.0)}
    before = {name: value.clone() for name, value in mixture.state_dict().items()}
    with refused("unknown scale 'query_key'"):
        rl.fuse(mixture, rotation)
    assert all(torch.equal(value, before[name]) for name, value in mixture.state_dict().items())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda gains: gains[:-1],
        lambda gains: [gain[:1] for gain in gains],
        lambda gains: [gain.long() for gain in gains],
        lambda gains: [gain * float("nan") for gain in gains],
        lambda gains: [gain.numpy() for gain in gains],
    ],
)
def test_gains_of_another_model_are_refused_before_its_codes_are_put_in(model, tokens, spoil):
    quantized, fresh = deepcopy(model), deepcopy(model)
    rl.rtn(quantized, rl.WeightQuant(bits=3))
    tuning = rl.tune(quantized, rl.Reference(model, tokens), steps=2, held_out=2)
    with refused("these gains belong to another model"):
        replace(tuning, gains=spoil(tuning.gains)).put_into(fresh)
    assert torch.equal(fresh(tokens).logits, model(tokens).logits)
    assert torch.equal(tuning.put_into(fresh)(tokens).logits, quantized(tokens).logits)


@pytest.mark.parametrize("size", [1e-24, 1e20])
def test_inputs_whose_squares_float32_cant_hold_are_refused(model, tokens, size):
    for layer in model.model.layers:  # the model computes the same
        layer.self_attn.v_proj.weight.mul_(size)
        layer.self_attn.o_proj.weight.mul_(1 / size)
    with refused("float32 can't hold its squares"):
        rl.gptq(model, tokens, rl.WeightQuant(bits=8))


def test_weights_that_read_nothing_but_zeros_are_rounded_to_nearest(model):
    model.model.embed_tokens.weight[0] = 0
    rounded = deepcopy(model)
    rl.rtn(rounded, rl.WeightQuant())
    pads = torch.zeros(2, 16, dtype=torch.long)
    report = rl.gptq(model, pads, rl.WeightQuant())
    assert report.fallbacks == len(report.modules)
    both = (one.model.layers[1].mlp.down_proj.weight for one in (model, rounded))
    assert torch.equal(*both)


@pytest.mark.parametrize("learn", [rl.klt_rotation, rl.kurtail])
def test_nothing_is_learned_on_zeros(model, learn):
    model.model.embed_tokens.weight[0] = 0
    with refused("all zero on these tokens"):
        learn(model, torch.zeros(2, 16, dtype=torch.long))


@pytest.mark.parametrize("power", [6, 10])
@pytest.mark.parametrize("size", [2.0**-12, 2.0**20])
def test_a_high_clip_norm_finds_the_same_for_weights_of_any_size(power, size):
    W = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) / 20
    quant = rl.WeightQuant(clip_norm=power)
    codes = (round_to_nearest(values, quant).codes for values in (W, size * W, W.double()))
    one, other, exact = codes
    assert torch.equal(one, other)
    assert torch.equal(one, exact)


@pytest.mark.parametrize(
    ("name", "edit", "says"),
    [
        ("llama", {"is_causal": False}, "lets tokens see those behind them"),
        ("gemma3, tied", {"use_bidirectional_attention": True}, "lets tokens see those behind"),
        ("olmo3", {"sliding_window": None}, "no sliding_window for them"),
        ("gemma3, tied", {"query_pre_attn_scalar": -4}, "query_pre_attn_scalar is -4"),
        ("mixtral, experts", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ("mixtral, experts", {"num_experts_per_tok": 5}, "a layer has 4 experts"),
        ("mixtral, experts", {"num_local_experts": 5}, "has 4 experts and a router of"),
    ],
)
def test_a_config_under_which_a_model_is_another_is_refused(name, edit, says, tokens):
    model = tiny_model(name, dtype=torch.float32)
    for key, value in edit.items():
        setattr(model.config, key, value)
    with refused(says):
        rl.rtn(model, rl.WeightQuant())


def test_a_sound_mixture_in_sixteen_bits_is_no_other_model(tmp_path):
    for seed in range(3):  # rounding gives a token to another expert
        model = tiny_model("olmoe, experts, norms over all heads", seed, torch.float32)
        rl.rtn(rl.fuse(model, rl.hadamard_rotation(model)), rl.WeightQuant(bits=3))
        rl.export(model, tmp_path / str(seed), dtype=torch.float16)


def test_slopes_of_a_mixture_of_experts_are_refused_as_learning_on_them_is(tokens):
    mixture = tiny_model("mixtral, experts", dtype=torch.float32)
    with refused("doesn't know mixtures of experts"):
        rl.slope_agreement(mixture, tokens, rl.WeightQuant())


def test_slopes_of_a_network_that_rounds_nothing_are_refused(model, tokens):
    with refused("nothing is rounded"):
        rl.slope_agreement(model, tokens)


@pytest.fixture
def coarse_process():
    torch.set_float32_matmul_precision("medium")  # as training scripts do
    yield
    torch.set_float32_matmul_precision("highest")


def test_how_a_process_multiplies_changes_no_measure_and_no_learning(model, tokens, coarse_process):
    seen = set()
    watch = model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda *_: seen.add(torch.get_float32_matmul_precision())
    )
    rl.perplexity(model, tokens.flatten(), 32)
    watch.remove()
    assert seen == {"highest"}
    assert rl.optrot(model, steps=20).orthogonality_error() < 1e-6
    assert torch.get_float32_matmul_precision() == "medium"


def test_torchs_second_way_to_say_how_to_multiply_is_refused_before_any_work(model, tokens):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        for use in (rl.optrot, lambda model: rl.gptq(model, tokens, rl.WeightQuant())):
            with refused("set torch.backends.fp32_precision and those of its parts back to 'none'"):
                use(model)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
    rl.gptq(model, tokens, rl.WeightQuant())  # the model was left as it was


@pytest.mark.parametrize(("fused", "claimed"), [(["R4"], None), ([], ["R4"]), (["R4"], ["R3"])])
def test_a_config_that_contradicts_itself_about_online_rotations_is_refused(
    fused, claimed, tmp_path
):
    save_tiny_model(tmp_path)
    model, _ = rl.load(str(tmp_path))
    rl.fuse(model, rl.hadamard_rotation(model, R4="R4" in fused)).save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(told | {"rotlib_online": claimed}))
    with refused("contradicts itself: its rotlib_online is"):
        rl.load(str(tmp_path))


@pytest.mark.parametrize("shared", ["all", "one layer"])
def test_a_reference_that_shares_weights_with_the_quantized_model_is_none(model, tokens, shared):
    reference = LlamaForCausalLM(model.config).eval().requires_grad_(False)
    reference.load_state_dict(model.state_dict(), assign=shared == "all")
    if shared == "one layer":
        reference.model.layers[1] = model.model.layers[1]
    rl.rtn(model, rl.WeightQuant(bits=2))
    with refused("is the quantized model itself, or shares its layers"):
        rl.kl_divergence(reference, model, tokens.flatten(), 32)


def test_a_gain_that_brings_weights_out_of_reach_is_seen_before_they_are_folded(model):
    for layer in model.model.layers:
        layer.input_layernorm.weight.fill_(1e12)
    with refused(r"layers\.0\.q has weights of size .* with its norm's gain, beyond what a"):
        rl.optrot(model, steps=2)


def test_a_folded_weight_beyond_float32_is_refused_before_any_is_changed(model):
    model.model.norm.weight[0] = 1e38
    model.lm_head.weight[:, 0] = 10
    before = deepcopy(model.state_dict())
    with refused(r"the rotated weight of lm_head is beyond torch\.float32"):
        rl.fuse(model, rl.hadamard_rotation(model))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("learn", "says"),
    [
        (lambda model, tokens: rl.kurtail(model, tokens), "computes NaN or infinite states"),
        (
            lambda model, tokens: rl.spinquant(model, tokens, rl.WeightQuant(), steps=1),
            "where learning starts: this model computes NaN",
        ),
    ],
)
def test_learning_on_a_model_that_computes_nan_blames_the_model(model, tokens, learn, says):
    model.model.layers[0].self_attn.scaling = float("nan")
    with pytest.raises((ValueError, rl.LearningFailed), match=says):
        learn(model, tokens)


@pytest.mark.parametrize(
    ("name", "edit", "says"),
    [
        ("llama", {"return_dict": False}, "return_dict is false"),
        ("llama", {"num_key_value_heads": 0}, "num_key_value_heads is 0, no number above 0"),
        ("gemma3, tied", {"layer_types": ["full_attention"]}, "layer_types are 1, and there are 2"),
    ],
)
def test_a_config_changed_in_memory_is_named(name, edit, says, tokens):
    model = tiny_model(name, dtype=torch.float32)
    for key, value in edit.items():
        setattr(model.config, key, value)
    with refused(says):
        rl.perplexity(model, tokens.flatten(), 32)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"rope_parameters": {"rope_theta": "x"}}, "says rope_theta 'x', no number"),
        ({"model_type": ["llama"]}, r"says model_type \['llama'\], no word"),
        ({"dtype": "foo"}, "says dtype 'foo', no dtype of torch"),
    ],
)
def test_a_setting_of_the_wrong_kind_is_named(edit, says, tmp_path):
    save_tiny_model(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(told | edit))
    with refused(says):
        rl.load(str(tmp_path))


@pytest.mark.parametrize("make", [rl.hadamard, rl.walsh])
def test_an_order_that_is_a_list_is_no_whole_number(make):
    with refused("order must be a whole number"):
        make([12])


@pytest.mark.parametrize(
    ("notebook", "given", "says"),
    [
        ("13_your_model", {"quality": "ultra"}, "quality"),
        ("13_your_model", {"window": 1}, "window must be"),
        ("10_export", {"bits": 99}, "bits must be"),
        ("90_report", {"settings": {"foo": 1}}, "foo"),
        ("12_fp4", {"text": "nope"}, "nope"),
        ("07_bounds", {"every": 0}, "every must be"),
    ],
)
def test_a_scale_that_a_late_notebook_would_refuse_is_refused_before_the_first(
    notebook, given, says
):
    plan = [(reproduce.NOTEBOOKS / f"{notebook}.ipynb", given)]
    with refused(f"{notebook}: .*{says}"):
        reproduce.check_plan(plan)
