"""Tiny random models of every family, in float64, and nothing from the network."""

import os
import subprocess
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path
from random import Random

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, at import

import pytest
import torch
from transformers import (
    Exaone4Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from rotlib.checkpoints import stock
from rotlib.disk import ROOT
from rotlib.models.joined import open_joined
from rotlib.models.walk import norms_in_model_dtype
from rotlib.models.zoo import load_tokenizer

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}

CONFIGS = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "llama, tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama, biases everywhere": LlamaConfig(
        **SHAPE, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3
    ),
    "llama, head_dim ≠ hidden/heads": LlamaConfig(**SHAPE, head_dim=16),
    "mistral": MistralConfig(**SHAPE, sliding_window=8),
    "qwen2, biases": Qwen2Config(**SHAPE),
    "qwen2, biases, tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3, q/k norms, own head_dim": Qwen3Config(**SHAPE, head_dim=20),
    "qwen3, tied": Qwen3Config(**SHAPE, head_dim=12, tie_word_embeddings=True),
    "granite, multipliers": GraniteConfig(
        **SHAPE,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
        logits_scaling=4.0,
        tie_word_embeddings=True,
    ),
    "phi3, joined projections, part of a head turned": Phi3Config(
        **SHAPE,
        rope_parameters={"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5},
    ),
    "mixtral, experts": MixtralConfig(**SHAPE, num_local_experts=4, sliding_window=8),
    "qwen3_moe, experts, q/k norms": Qwen3MoeConfig(
        **SHAPE,
        head_dim=16,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
    ),
    "olmoe, experts, norms over all heads": OlmoeConfig(
        **SHAPE, num_experts=4, num_experts_per_tok=2
    ),
    "smollm3, a layer without RoPE": SmolLM3Config(
        **SHAPE, no_rope_layers=[1, 0], tie_word_embeddings=True
    ),
}
# norms end their blocks, so R1 doesn't fit; layers of two types
POST_NORM = {
    "olmo2": Olmo2Config(**SHAPE),
    "olmo3": Olmo3Config(
        **SHAPE, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "exaone4, tied": Exaone4Config(
        **SHAPE,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=True,
    ),
    "gemma3, tied": Gemma3TextConfig(
        **SHAPE,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=True,
    ),
}


def tiny_model(
    name: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float64
) -> PreTrainedModel:
    """A random model of that configuration; gains and biases are random too, so that folding them
    matters.
    """
    torch.manual_seed(seed)
    model = (
        AutoModelForCausalLM.from_config(deepcopy((CONFIGS | POST_NORM)[name]), dtype=dtype)
        .eval()
        .requires_grad_(False)
    )
    for path, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.copy_(
                torch.rand_like(parameter) + 0.5 if "norm" in path else torch.randn_like(parameter)
            )
        else:
            parameter.mul_(5)
    return open_joined(model)


def with_weights_in(dtype, model):
    """The model with its weights in a dtype, as loading them in it leaves it."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def save_tiny_model(folder: Path, name: str = "llama", **settings: object) -> None:
    """A random model of that configuration in a folder, with a tokenizer of few tokens."""
    tokenizer = small_tokenizer()
    config = deepcopy((CONFIGS | POST_NORM)[name])
    config.update({"vocab_size": len(tokenizer)} | settings)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@cache
def small_tokenizer() -> PreTrainedTokenizerBase:
    """The packaged one with 384 tokens: a run with 49152 takes twice as long."""
    lines = (ROOT / "LICENSE").read_text().splitlines()
    whole = load_tokenizer("smollm2-135m")
    return whole.train_new_from_iterator(lines, 384, show_progress=False)


def save_short_text(folder: Path) -> None:
    """A text as wikitext2's files, of the words that this project uses, in a drawn order."""
    words = (ROOT / "LICENSE").read_text().split()
    draw = Random(0)
    (folder / "wikitext2").mkdir()
    for part in ("train", "test"):
        lines = (" ".join(draw.choices(words, k=40)) for _ in range(80))
        (folder / "wikitext2" / f"wiki.{part}.raw").write_text("\n".join(lines))


def pytest_collection_modifyitems(items: list) -> None:
    """The longest files first, so that none runs alone at the end."""
    longest = ("real_model", "faults", "zeroshot", "recipe", "numerics")
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in longest)


def exact_logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits with every operation in the model's dtype."""
    with norms_in_model_dtype(model):
        return model(tokens).logits


@pytest.fixture(autouse=True)
def same_environment():
    """What a test, or a command that it runs in this process, has set is gone behind it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(
        0, SHAPE["vocab_size"], (4, 32), generator=torch.Generator().manual_seed(1)
    )


@pytest.fixture(params=CONFIGS)
def any_model(request) -> PreTrainedModel:
    return tiny_model(request.param)


@pytest.fixture(params=[name for name in CONFIGS if "experts" not in name])
def dense_model(request) -> PreTrainedModel:
    return tiny_model(request.param)


def refused(pattern: str):
    """The block raises ValueError with a sentence like this."""
    return pytest.raises(ValueError, match=pattern)


@pytest.fixture
def model() -> PreTrainedModel:
    """A small one, as most people's are: in float32."""
    return tiny_model(dtype=torch.float32)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A tiny model with its tokenizer, a short text, a store of its own, and a sweep over
    them.
    """
    save_tiny_model(tmp_path / "model")
    save_short_text(tmp_path)
    monkeypatch.setenv("ROTLIB_DATA", str(tmp_path))
    monkeypatch.setenv("ROTLIB_RESULTS", str(tmp_path / "results"))
    (tmp_path / "sweep.yaml").write_text(
        f"base: {{model: {tmp_path / 'model'}, text: wikitext2, "
        "window: 64, calibration_windows: 2, test_windows: 2}\n"
        "grid: {rotation: [none, hadamard], seed: [0, 1]}\narms: [{}, {activation_bits: 8}]\n"
    )
    return tmp_path


@pytest.fixture(scope="session")
def reader():
    """The process of reader.py."""
    command = [sys.executable, "-I", Path(__file__).with_name("reader.py"), stock.__file__]
    quiet = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | quiet, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def quick_stock(reader, monkeypatch):
    """Let stock software read in forks of one process, instead of each time in a fresh one."""

    def run(command, **how):
        if command[1:3] != ["-I", stock.__file__]:
            return subprocess.run(command, **how)
        said = Path(how["cwd"]) / "said"
        reader.stdin.write("\t".join(map(str, (*command[3:], said))) + "\n")
        reader.stdin.flush()
        status = int(reader.stdout.readline())
        return subprocess.CompletedProcess(command, status, "", said.read_text())

    monkeypatch.setattr(stock, "run", run)
