"""A GGUF file holds every code as it was; stock readers compute what the quantized model does."""

import json
from copy import deepcopy

import gguf
import pytest
import torch
from tokenizers import Regex
from tokenizers import pre_tokenizers as pre
from transformers import LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

import rotlib as rl
from rotlib.checkpoints.gguf_file import NAME, GgufFile, block_type, blocks
from rotlib.checkpoints.stock import has_llama_cpp, read_by_llama_cpp, read_by_transformers
from rotlib.models.gguf_tokenizer import cut_of
from rotlib.models.zoo import load_tokenizer
from rotlib.quantization.grids import QuantizedWeight, round_to_nearest
from rotlib.study import memory

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_stock")]
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "llama, biases everywhere": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama, scaled RoPE": LlamaConfig(
        **SHAPE, rope_parameters=LLAMA3 | {"original_max_position_embeddings": 32}
    ),
    "qwen2, biases": Qwen2Config(**SHAPE),
    "qwen3, q/k norms": Qwen3Config(
        **SHAPE, head_dim=128
    ),  # the head_dim that transformers takes every GGUF of Qwen3 to have
}
GRIDS = {
    "Q4_0, per channel": rl.WeightQuant(),
    "Q4_0, groups": rl.WeightQuant(group_size=32),
    "Q4_0, groups, signed scales": rl.WeightQuant(group_size=32, convention="signed"),
    "Q4_1, groups, 3 bits": rl.WeightQuant(bits=3, group_size=32, symmetric=False),
    "Q8_0, groups": rl.WeightQuant(bits=8, group_size=32),
}
EXPORTS = [
    *(("llama", grid) for grid in GRIDS),
    *((name, "Q4_0, groups") for name in CONFIGS if name != "llama"),
]


@pytest.fixture
def tokens():
    return torch.randint(
        0, SHAPE["vocab_size"], (2, 32), generator=torch.Generator().manual_seed(1)
    )


@pytest.fixture(scope="module")
def tokenizer():
    """The packaged one with a vocabulary as small as the models': a file's readers take seconds for
    49152 tokens.
    """
    text = [
        "a rotation of the residual stream and of the values of each head, fused into the weights"
    ]
    return load_tokenizer("smollm2-135m").train_new_from_iterator(
        text, SHAPE["vocab_size"], show_progress=False
    )


def quantized(name, quant, tokens, **other):
    torch.manual_seed(0)
    config = deepcopy(CONFIGS[name])
    config.update(other)
    model = (
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    )
    for parameter in model.parameters():
        parameter.copy_(
            torch.rand_like(parameter) + 0.5
        ) if parameter.ndim == 1 else parameter.mul_(3)
    rl.fuse(model, rl.hadamard_rotation(model))
    rl.gptq(model, tokens, quant)
    return model


def tensors_of(folder):
    tensors = gguf.GGUFReader(folder / NAME).tensors
    return {
        t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in tensors
    }


@pytest.mark.parametrize(
    ("bits", "symmetric", "name"), [(4, True, "Q4_0"), (3, False, "Q4_1"), (8, True, "Q8_0")]
)
@pytest.mark.parametrize("group_size", [None, 32, 64])
def test_blocks_hold_the_codes_and_float16_scales(bits, symmetric, name, group_size):
    W = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    weight = round_to_nearest(
        W, rl.WeightQuant(bits=bits, symmetric=symmetric, group_size=group_size)
    )
    kind = block_type("q", weight)
    assert kind.name == name
    halved = QuantizedWeight(weight.codes, weight.scale.half().float(), weight.zero)
    found = torch.from_numpy(gguf.dequantize(blocks(weight, kind), kind))
    if symmetric:
        assert torch.equal(found, halved.dense())
    else:
        assert (found - weight.dense()).abs().max() < 2e-3 * W.abs().max()


@pytest.mark.parametrize(("name", "grid"), EXPORTS)
def test_transformers_reads_the_file_as_the_quantized_model(
    name, grid, tokens, tokenizer, tmp_path
):
    model = quantized(name, GRIDS[grid], tokens)
    folder = rl.export(model, tmp_path / "out", format="gguf", tokenizer=tokenizer)
    wanted = model(tokens).logits
    if name not in (
        "llama, scaled RoPE",
        "llama, biases everywhere",
    ):  # transformers leaves those unread
        assert (
            read_by_transformers(folder, tokens, NAME).logits - wanted
        ).abs().max() < 2e-2 * wanted.abs().max()
    reader = gguf.GGUFReader(folder / NAME)
    kinds = {
        tensor.tensor_type.name
        for tensor in reader.tensors
        if ".ffn_" in tensor.name and tensor.n_elements > 96
    }
    assert kinds == {grid.split(",")[0]}


@pytest.mark.skipif(not has_llama_cpp(), reason="llama.cpp isn't installed")
@pytest.mark.parametrize(("name", "grid"), EXPORTS)
def test_llama_cpp_computes_what_the_quantized_model_does(name, grid, tokens, tokenizer, tmp_path):
    model = quantized(name, GRIDS[grid], tokens)
    folder = rl.export(model, tmp_path / "out", format="gguf", tokenizer=tokenizer)
    wanted = model(tokens).logits
    assert (
        read_by_llama_cpp(folder / NAME, tokens).logits - wanted
    ).square().mean() < 1e-3 * wanted.square().mean()


def test_scaled_rotary_embeddings_travel_as_factors(tokens, tokenizer, tmp_path):
    model = quantized("llama, scaled RoPE", rl.WeightQuant(), tokens)
    rl.export(model, tmp_path / "out", format="gguf", tokenizer=tokenizer)
    factors = tensors_of(tmp_path / "out")["rope_freqs.weight"]
    plain = 1e4 ** (-torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain / factors, model.model.rotary_emb.inv_freq, rtol=1e-5)
    assert factors.min() == pytest.approx(1, rel=1e-5)
    assert factors.max() == pytest.approx(LLAMA3["factor"], rel=1e-5)


def test_biases_of_queries_turn_with_their_rows(tokens, tokenizer, tmp_path):
    model = quantized("llama, biases everywhere", rl.WeightQuant(), tokens)
    rl.export(model, tmp_path / "out", format="gguf", tokenizer=tokenizer)
    found = tensors_of(tmp_path / "out")
    q = model.model.layers[1].self_attn.q_proj
    joined = torch.cat([q.weight, q.bias[:, None]], dim=1)
    pairs = (
        joined.view(4, 2, 8, 65).transpose(1, 2).reshape(64, 65)
    )  # RoPE's two halves of a head, side by side
    assert (
        torch.cat([found["blk.1.attn_q.weight"], found["blk.1.attn_q.bias"][:, None]], dim=1)
        - pairs
    ).abs().max() < 1e-2
    assert torch.equal(found["blk.0.ffn_down.bias"], model.model.layers[0].mlp.down_proj.bias)


SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([pre.ByteLevel(add_prefix_space=False)], "gpt-2"),
        ([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)], "smollm"),
        (
            [
                pre.Split(Regex(SPLIT % r"\p{N}{1,3}"), "isolated"),
                pre.ByteLevel(add_prefix_space=False, use_regex=False),
            ],
            "llama-bpe",
        ),
        (
            [
                pre.Split(Regex(SPLIT % r"\p{N}"), "isolated"),
                pre.ByteLevel(add_prefix_space=False, use_regex=False),
            ],
            "qwen2",
        ),
        (
            [
                pre.Split(Regex(r"\p{N}{1,3}|\p{L}+"), "isolated"),
                pre.ByteLevel(add_prefix_space=False, use_regex=False),
            ],
            None,
        ),
        ([pre.ByteLevel(add_prefix_space=True)], None),
        ([pre.Whitespace()], None),
    ],
)
def test_a_tokenizers_way_of_cutting_has_a_name_or_is_refused(steps, name, tokenizer):
    tokenizer = deepcopy(tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre.Sequence(steps)
    if name:
        assert cut_of(tokenizer) == name
    else:
        with pytest.raises(ValueError, match="known to share"):
            cut_of(tokenizer)


@pytest.mark.parametrize("damage", ["blk.1.ffn_up.weight", "token_embd.weight"])
def test_a_file_that_reads_back_otherwise_is_not_kept(
    damage, tokens, tokenizer, tmp_path, monkeypatch
):
    def write(self, folder):
        intact(self, folder)
        reader = gguf.GGUFReader(folder / NAME, "r+")
        next(tensor for tensor in reader.tensors if tensor.name == damage).data[0, 4] += 1
        reader.data.flush()

    intact = GgufFile.write
    monkeypatch.setattr(GgufFile, "write", write)
    with pytest.raises(RuntimeError, match=f"{damage} doesn't read back"):
        rl.export(
            quantized("llama", rl.WeightQuant(), tokens),
            tmp_path / "out",
            format="gguf",
            tokenizer=tokenizer,
        )
    assert not list(tmp_path.iterdir())


def test_the_file_carries_the_tokenizer(tokens, tokenizer, tmp_path):
    model = quantized("llama", rl.WeightQuant(), tokens, vocab_size=len(tokenizer))
    rl.export(model, tmp_path / "out", format="gguf", tokenizer=tokenizer)
    fields = gguf.GGUFReader(tmp_path / "out" / NAME).fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.tokens"].contents() == tokenizer.convert_ids_to_tokens(
        list(range(len(tokenizer)))
    )
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"].contents() == [" ".join(pair) for pair in merges]


def test_the_file_is_as_large_as_its_bits_predict(tokens, tokenizer, tmp_path):
    CONFIGS["llama"].save_pretrained(tmp_path)
    for bits, symmetric in ((3, True), (4, False), (8, True)):
        recipe = rl.Recipe(model=str(tmp_path), bits=bits, symmetric=symmetric, group_size=32)
        folder = tmp_path / f"{bits} {symmetric}"
        model = quantized("llama", recipe.quant, tokens)
        rl.export(model, folder, format="gguf", tokenizer=tokenizer)
        tensors = gguf.GGUFReader(folder / NAME).tensors
        predicted = sum(memory.on_disk(recipe, "gguf").values())
        assert predicted == pytest.approx(sum(int(tensor.n_bytes) for tensor in tensors), rel=0.01)


def test_what_llama_cpp_cannot_hold_is_refused_by_name(tokens, tokenizer, tmp_path):
    for quant, settings, message in (
        (
            rl.WeightQuant(group_size=16),
            {"tokenizer": tokenizer},
            r"layers.0.q has a scale for every 16 weights, and GGUF's blocks hold 32",
        ),
        (
            rl.WeightQuant(bits=8, symmetric=False),
            {"tokenizer": tokenizer},
            "asymmetric grid of more than 4 bits",
        ),
        (rl.WeightQuant(), {}, "pass tokenizer=tokenizer"),
        (
            rl.WeightQuant(),
            {"tokenizer": tokenizer, "dtype": torch.float16},
            "GGUF has its own types",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            rl.export(
                quantized("llama", quant, tokens), tmp_path / "out", format="gguf", **settings
            )
    assert not list(tmp_path.iterdir())
