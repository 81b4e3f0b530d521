"""What the sixteenth hunt found: other frequencies, codes of other weights, late words."""

import copy

import pytest
import torch
from conftest import refused, save_tiny_model, tiny_model
from transformers import AutoModelForCausalLM

import rotlib as rl
from rotlib.study.sweep_file import read_sweep

EIGHT = rl.WeightQuant(bits=8)


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_a_model_cast_to_16_bits_with_its_frequencies_is_refused(model, tokens, cast):
    getattr(model, cast)().float()
    for use in (
        lambda: rl.perplexity(model, tokens.flatten(), 16),
        lambda: rl.fuse(model, rl.Rotation(None, None)),
        lambda: rl.gptq(model, tokens, EIGHT),
    ):
        with refused(r"rotary_emb.inv_freq isn't what the config says.*rl.load"):
            use()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_loaded_in_another_dtype_keeps_its_frequencies(dtype, tokens, tmp_path):
    save_tiny_model(tmp_path)
    model, _ = rl.load(str(tmp_path), dtype=dtype)
    rl.perplexity(model, tokens.flatten(), 16)


def folded(model):
    return rl.fuse(model, rl.Rotation(None, None))


def finetuned(model):
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.add_(torch.randn(p.shape, generator=generator) * p.std() * 0.1)
    return model


@pytest.mark.parametrize(("theirs", "ours"), [(folded, copy.copy), (copy.copy, folded)])
def test_codes_of_folded_weights_are_told_from_those_before(model, theirs, ours):
    weights = rl.rtn(theirs(tiny_model(dtype=torch.float32)), EIGHT)
    with refused("was made from another weight"):
        rl.restore(ours(model), weights)


def test_codes_of_the_base_model_are_not_put_into_a_finetune(model):
    weights = rl.rtn(tiny_model(dtype=torch.float32), EIGHT)
    with refused("was made from another weight"):
        rl.restore(finetuned(model), weights)


def test_codes_fit_the_same_model_in_16_bits(tokens, tmp_path):
    save_tiny_model(tmp_path)
    weights = rl.rtn(rl.load(str(tmp_path), dtype=torch.float32)[0], EIGHT)
    again = rl.load(str(tmp_path), dtype=torch.bfloat16)[0]
    assert rl.restore(again, weights)


def test_tuned_codes_are_still_those_of_their_weights(model, tokens):
    original = copy.deepcopy(model)
    rl.gptq(model, tokens, rl.WeightQuant())
    tuned = rl.tune(model, rl.Reference(original, tokens), steps=2, held_out=1)
    assert rl.restore(copy.deepcopy(original), tuned.weights)


def test_attention_that_looks_ahead_is_refused(model, tokens):
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with refused("lets tokens see those behind them"):
        rl.perplexity(model, tokens.flatten(), 16)


def test_an_embedding_that_changes_when_it_is_read_is_refused(model):
    model.model.embed_tokens.max_norm = 1.0
    with refused("max_norm"):
        rl.fuse(model, rl.Rotation(None, None))


def test_hadamard_products_keep_their_precision_under_autocast():
    x = torch.randn(5, 48)
    exact = rl.apply_hadamard(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rl.apply_hadamard(x), exact)
        assert torch.equal(rl.BlockHadamard(48, 48)(x), exact)


def test_a_field_under_base_and_grid_is_refused(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("base: {seed: 5}\ngrid: {seed: [0]}\n")
    with refused("sweep.yaml, line 1: seed stands under base and under grid"):
        read_sweep(file)


def test_a_packed_checkpoint_is_refused_by_that(model, tokens, tmp_path):
    rl.rtn(model, rl.WeightQuant())
    rl.export(model, tmp_path / "packed")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with refused("packed .*: load the original"):
        rl.perplexity(packed, tokens.flatten(), 16)


def test_a_generation_config_that_contradicts_itself_is_refused_before_the_work(model, tmp_path):
    rl.rtn(model, rl.WeightQuant())
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, False
    with refused("generation_config contradicts itself"):
        rl.export(model, tmp_path / "x")


def test_a_wrapped_model_is_named_by_what_it_wraps(model):
    for wrap, part in ((torch.nn.DataParallel, "module"), (torch.compile, "_orig_mod")):
        with refused(f"give what it wraps, its .{part}"):
            rl.rtn(wrap(model), EIGHT)


def test_a_file_or_an_address_is_no_models_name(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with refused("is a file, and no GGUF file: name the model's folder"):
        rl.load(str(tmp_path / "config.json"))
    with refused("is an address: name a model as organisation/model"):
        rl.load("https://huggingface.co/Qwen/Qwen3-0.6B")
