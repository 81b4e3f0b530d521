"""What the twelfth hunt found: wrong without a word, or refused in somebody else's words."""

import subprocess
import sys
from copy import copy
from enum import StrEnum

import accelerate
import numpy as np
import pytest
import torch
from conftest import refused, save_tiny_model, small_tokenizer, tiny_model, with_weights_in
from tokenizers import Tokenizer, models
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

import rotlib as rl
from rotlib.quantization.quantized import codes_of
from rotlib.study import reproduce


@pytest.mark.slow
@pytest.mark.parametrize(
    "default", ["set_default_dtype(torch.bfloat16)", "set_default_device('meta')"]
)
def test_what_torch_was_set_to_at_the_first_use_changes_nothing_later(default):
    script = (
        f"import torch, rotlib as rl; torch.{default}\n"
        "from rotlib.quantization.grids import CLIP_FACTORS\n"
        "try: rl.hadamard(12)\nexcept Exception: pass\n"
        "torch.set_default_dtype(torch.float32); torch.set_default_device(None)\n"
        "assert torch.equal(CLIP_FACTORS, 1 - torch.arange(80) / 100), CLIP_FACTORS\n"
        "assert (rl.hadamard(12) @ rl.hadamard(12).T - torch.eye(12)).abs().max() < 1e-12\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("change", ["rotated", "quantized"])
def test_a_shallow_copy_is_no_original(model, change, tokens):
    shallow = copy(model)
    if change == "rotated":
        rl.fuse(model, rl.random_rotation(model))
    else:
        rl.rtn(model, rl.WeightQuant(bits=2))
    for use in (
        lambda: rl.Reference(shallow, tokens),
        lambda: rl.gptq(shallow, tokens, rl.WeightQuant()),
        lambda: rl.optrot(shallow),
    ):
        with refused(r"shares its layers with a copy that was rotated or quantized"):
            use()
    rl.perplexity(model, tokens.flatten(), 32)  # the changed one goes on


def test_a_gguf_of_a_model_called_mistral_is_read(tmp_path):
    tokenizer = small_tokenizer()
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = MistralConfig(vocab_size=len(tokenizer), sliding_window=None, **shape)
    model = MistralForCausalLM(config).eval().requires_grad_(False)
    rl.rtn(model, rl.WeightQuant())
    assert rl.export(model, tmp_path / "out", "gguf", tokenizer).is_dir()


def test_a_model_of_fewer_layers_than_layer_types_is_refused_before_the_work(tokens):
    model = tiny_model("gemma3, tied", dtype=torch.float32)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    with refused("layer_types are 2, and there are 1 layers: give it one a layer"):
        rl.gptq(model, tokens, rl.WeightQuant())


def test_experts_in_float64_are_refused_before_the_work(tmp_path):
    model = tiny_model("mixtral, experts")
    rl.rtn(model, rl.WeightQuant())
    with refused("runs no experts in float64: pass dtype=torch.float32"):
        rl.export(model, tmp_path / "out")


def test_a_tokenizer_without_tokens_or_with_others_is_refused(model, tmp_path):
    rl.rtn(model, rl.WeightQuant())
    for made_of, what in (
        (models.BPE(), "this tokenizer has no tokens"),
        (models.WordLevel({"a": 0, "b": 500}, unk_token="a"), "this tokenizer has a token 500"),
    ):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(made_of))
        with refused(what):
            rl.export(model, tmp_path / "out", tokenizer=tokenizer)


def test_a_tokenizer_that_cannot_cut_the_texts_words(model, tmp_path):
    made_of = models.WordLevel({"a": 0, "b": 1}, unk_token="?")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(made_of))
    with refused("this tokenizer can't cut the text wikipedia-mini: .*UNK"):
        rl.load_tokens("wikipedia-mini", tokenizer)
    rl.rtn(model, rl.WeightQuant())
    rl.export(model, tmp_path / "out", tokenizer=tokenizer)  # it is the model's owner's


def test_states_beyond_float16_are_told(model, tokens):
    mlp = model.model.layers[0].mlp
    for linear, gain in ((mlp.gate_proj, 30), (mlp.up_proj, 30), (mlp.down_proj, 300)):
        linear.weight.mul_(gain)
    assert rl.perplexity(model, tokens.flatten(), 32) > 0
    with refused(r"or they are beyond float16 \(load it in float32\)"):
        rl.perplexity(with_weights_in(torch.float16, model), tokens.flatten(), 32)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_weights_that_nothing_is_computed_in_are_named(model, dtype):
    with refused(f"parameters are of {dtype}, which nothing is computed in"):
        rl.rtn(model.to(dtype), rl.WeightQuant())


def test_a_folder_without_a_tokenizer_is_told(model, tmp_path):
    model.save_pretrained(tmp_path)
    with refused(r"holds no tokenizer \(tokenizer\.json, .*save the model's there"):
        rl.load(str(tmp_path))


def test_a_start_that_requires_gradients_is_a_start(model, tokens, tmp_path):
    start = rl.random_rotation(model)
    start.R1.requires_grad_()
    start.R2.requires_grad_()
    learned = rl.spinquant(model, tokens, quant=rl.WeightQuant(bits=3), steps=2, start=start)
    assert not learned.R1.requires_grad
    torch.save({"R1": torch.nn.Parameter(torch.eye(48))}, tmp_path / "R.bin")
    assert not rl.load_rotation(tmp_path / "R.bin", model).R1.requires_grad


def test_a_recipe_of_numpys_numbers_and_words_is_one_of_pythons():
    class Kind(StrEnum):
        OPTROT = "optrot"

    recipe = rl.Recipe(rotation=Kind.OPTROT, text=np.str_("wikitext2"), asymmetry=np.float64(0.25))
    assert recipe == rl.Recipe(rotation="optrot", text="wikitext2", asymmetry=0.25)
    assert {type(value) for value in recipe.spec().values()} == {str, float}
    shares = rl.Recipe(rotation="mixed", activation_share=np.float64(0.5))
    assert type(shares.activation_share) is float


def test_weights_that_are_not_contiguous_are_written(model, tmp_path):
    turned = model.lm_head.weight.t().contiguous().t()
    model.lm_head.weight = torch.nn.Parameter(turned, requires_grad=False)
    assert rl.export(model, tmp_path / "out", "fused").is_dir()


def test_a_model_that_accelerate_moves_about_is_told(model):
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with refused("is moved about by accelerate: load the model without device_map"):
        rl.optrot(model)


def test_a_run_under_another_default_dtype_is_refused_first():
    torch.set_default_dtype(torch.bfloat16)
    try:
        with refused("torch's default dtype is torch.bfloat16: set it back"):
            rl.run(rl.Recipe())
        with refused("torch's default dtype is torch.bfloat16: set it back"):
            rl.build(rl.Recipe())
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_tied_model_fused_in_inference_mode_goes_on_outside(tokens):
    model = tiny_model("llama, tied", dtype=torch.float32)
    before = rl.perplexity(model, tokens.flatten(), 32)
    with torch.inference_mode():
        rl.fuse(model, rl.random_rotation(model))
    assert rl.perplexity(model, tokens.flatten(), 32) == pytest.approx(before, rel=1e-4)


def test_a_fused_model_that_was_trained_since_is_told_what_to_do(model, tokens):
    rl.fuse(model, rl.random_rotation(model))
    model.model.norm.weight.mul_(1.01)
    with refused("or it was trained since"):
        rl.perplexity(model, tokens.flatten(), 32)
    del model.config.rotlib_rotated
    assert rl.gptq(model, tokens, rl.WeightQuant()).fallbacks == 0


def test_restored_codes_with_scales_of_16_bits_are_exported(model, tmp_path):
    weights = rl.rtn(tiny_model(dtype=torch.float32), rl.WeightQuant())
    narrow = {
        name: one._replace(scale=one.scale.half(), zero=one.zero.half())
        for name, one in weights.items()
    }
    rl.restore(model, narrow)
    assert {one.scale.dtype for one in codes_of(model).values()} == {torch.float32}
    assert rl.export(model, tmp_path / "out").is_dir()


def test_a_disk_that_takes_no_more_is_told_in_a_sentence(model, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rotlib.checkpoints.packed.save_file", full)
    with pytest.raises(RuntimeError, match=r"can't be written, so nothing was kept: .*No space"):
        rl.export(model, tmp_path / "out", "fused")
    assert not list(tmp_path.iterdir())


def test_a_model_of_a_short_context_is_refused_before_the_first_notebook(tmp_path):
    save_tiny_model(tmp_path)
    given = {"model": str(tmp_path), "text": "wikitext2", "window": 1024, "seeds": [0]}
    plan = [(reproduce.NOTEBOOKS / "03_optrot_w4.ipynb", given)]
    with refused("windows of 1024 tokens, but this model reads 64 at most"):
        reproduce.check_plan(plan)
