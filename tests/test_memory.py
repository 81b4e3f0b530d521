"""Models that don't fit: what a recipe needs is known before it runs, and a device is sent a layer
at a time.
"""

from contextlib import contextmanager
from dataclasses import replace

import psutil
import pytest
import torch
from conftest import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config

import rotlib as rl
from rotlib.checkpoints.packed import Checkpoint
from rotlib.disk import ROOT
from rotlib.learning.network import Student
from rotlib.models import zoo
from rotlib.models.families import Family
from rotlib.models.supported import adapt
from rotlib.quantization.hessian import hessians
from rotlib.study import memory
from rotlib.study.recipe import Recipe
from rotlib.study.sweep_file import read_sweep

WIDE = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def size(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def test_a_model_that_does_not_fit_stays_on_the_host_and_one_that_does_goes_to_the_device(
    monkeypatch,
):
    model = tiny_model(dtype=torch.float32)
    moved = []
    monkeypatch.setattr(type(model), "to", lambda self, device: moved.append(device) or self)
    for free, goes in ((3 * size(model), True), (2 * size(model), False)):
        monkeypatch.setattr(zoo, "free_memory", lambda device, free=free: free)
        placed = zoo._placed(model, torch.device("cuda"))
        assert bool(moved) == goes
        moved.clear()
    assert adapt(placed).device == torch.device("cuda") != placed.device


def test_a_streamed_run_holds_a_layer_at_a_time_and_gives_the_same_numbers(tokens, monkeypatch):
    """The device is the CPU here: what would be there is what stands between on_device's two ends,
    and what goes there by `to`.
    """

    def numbers(model):
        reference = rl.Reference(model, tokens)
        rl.fuse(model, rl.optrot(model, seed=0, steps=20))
        rl.gptq(model, tokens, rl.WeightQuant(bits=4), asymmetry=0.25)
        return rl.evaluate(model, tokens, reference)

    expected = numbers(tiny_model(dtype=torch.float32))
    there, peak = [], 0

    @contextmanager
    def watched(self, *modules, changed=False):
        nonlocal peak
        there.extend(modules)
        peak = max(peak, sum(map(size, there)))
        yield
        del there[-len(modules) :]

    monkeypatch.setattr(Family, "on_device", watched)
    model = tiny_model(dtype=torch.float32)
    model.rotlib_device = torch.device("cpu")
    assert numbers(model) == expected
    family = adapt(model)
    assert max(size(family.layers[0]), 2 * size(family.lm_head)) >= peak > 0


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rotation": "none"},
        {"bits": 3, "group_size": 16},
        {"bits": 8, "symmetric": False, "group_size": 32},
        {"grid": "nvfp4"},
        {"grid": "mxfp4"},
        {"activation_bits": 8, "protocol": "compressed-tensors", "group_size": 16},
    ],
    ids=str,
)
def test_a_checkpoint_is_as_large_as_its_bits_predict(settings, tie, tmp_path):
    config = LlamaConfig(**WIDE, tie_word_embeddings=tie)
    config.save_pretrained(tmp_path)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    told = {"model": str(tmp_path), "rotation": settings.get("rotation", "hadamard")}
    recipe, whole = Recipe(**told | settings), Recipe(**told, rounding="none")
    if recipe.rotation != "none":
        rl.fuse(model, rl.hadamard_rotation(model))
    predicted = sum(memory.on_disk(whole, "fused").values())
    assert predicted == Checkpoint(model, None, None, packed=False).size
    rl.rtn(model, recipe.quant)
    predicted = sum(memory.on_disk(recipe).values())
    written = Checkpoint(model, None, None, packed=True, inputs=recipe.of_runtime is not None)
    assert predicted == pytest.approx(written.size, rel=0.01)


def test_every_walk_through_the_layers_sends_them_to_the_device(tokens, monkeypatch):
    for walk in (
        lambda model: list(hessians(adapt(model), tokens)),
        lambda model: rl.gptq(model, tokens, rl.WeightQuant(bits=4)),
        lambda model: rl.Reference(model, tokens),
    ):
        model = tiny_model(dtype=torch.float32)
        seen = []
        monkeypatch.setattr(Family, "on_device", _recorded(seen))
        walk(model)
        assert [layer for layer in adapt(model).layers if layer not in seen] == []


def _recorded(seen: list):
    @contextmanager
    def on_device(self, *modules, changed=False):
        seen.extend(modules)
        yield

    return on_device


def test_learning_through_the_network_refuses_a_model_that_does_not_fit(tokens):
    model = tiny_model(dtype=torch.float32)
    model.rotlib_device = torch.device("meta")
    with pytest.raises(
        ValueError, match=r"needs the whole model on meta, where it doesn't fit: .* rl\.optrot"
    ):
        Student(adapt(model), None, [], checkpointing=False)


def test_a_recipe_that_does_not_fit_says_how_much_it_needs_before_anything_is_loaded(monkeypatch):
    recipe = Recipe(rotation="optrot", calibration_windows=1, test_windows=1)
    needed = memory.estimate(recipe).host
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: type("Free", (), {"available": 0.5 * needed})()
    )
    monkeypatch.setattr(
        psutil,
        "Process",
        lambda: type("Self", (), {"memory_info": lambda _: type("Info", (), {"rss": 0})})(),
    )
    monkeypatch.setattr("rotlib.study.pipeline.load", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("rotlib.study.store.find", lambda _: None)
    needs = r"smollm2-135m needs about \d\.\d GB of memory for this recipe"
    with pytest.raises(ValueError, match=rf"{needs}, and \d\.\d GB are free"):
        rl.run(recipe)


def test_a_damaged_config_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(
        ValueError, match=r"can't be loaded as a causal language model: .* is not a valid JSON file"
    ):
        rl.run(Recipe(model=str(tmp_path)))


def test_the_estimate_grows_with_what_a_recipe_holds():
    recipe = Recipe(rotation="optrot")
    base = memory.estimate(recipe)
    longer = memory.estimate(Recipe(rotation="optrot", test_windows=16))
    assert longer.host > base.host
    assert longer.weights > base.weights
    assert memory.estimate(Recipe(rotation="none", rounding="none")).host < base.host
    assert base.streamed < base.device < base.host + base.working
    assert base.beside < base.host


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_key_value_heads=8,
            vocab_size=128256,
        ),
        Qwen3Config(
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=36,
            num_key_value_heads=8,
            vocab_size=151936,
        ),
    ],
    ids=["Llama-3.1-8B", "Qwen3-8B"],
)
def test_the_paper_scale_of_an_8B_model_fits_on_a_device_of_24_GB(config, tmp_path):
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.save_pretrained(tmp_path)
    for recipe in read_sweep(ROOT / "configs" / "sweeps" / "paper.yaml"):
        if recipe.model == "meta-llama/Llama-3.1-8B":
            assert memory.estimate(replace(recipe, model=str(tmp_path))).streamed < 24e9, (
                recipe.spec()
            )
