"""What is exported is read by stock transformers, in a process that never imports rotlib, as the
model it came from.
"""

import json
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from importlib import import_module

import pytest
import torch
import yaml
from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme
from conftest import CONFIGS, tiny_model, with_weights_in
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

import rotlib as rl
from rotlib.checkpoints import stock
from rotlib.checkpoints.stock import read_by_transformers
from rotlib.quantization.quantized import codes_of

exporting, checkpoint = (
    import_module("rotlib.checkpoints.write"),
    import_module("rotlib.checkpoints.packed"),
)  # rl.export is the function
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_stock")]
GRIDS = {
    "per channel": rl.WeightQuant(),
    "groups": rl.WeightQuant(group_size=16),
    "groups, asymmetric": rl.WeightQuant(group_size=16, symmetric=False),
    "per channel, asymmetric, 3 bits": rl.WeightQuant(bits=3, symmetric=False),
    "per channel, signed scales": rl.WeightQuant(convention="signed"),
    "groups, signed scales": rl.WeightQuant(group_size=16, convention="signed"),
    "8 bits": rl.WeightQuant(bits=8, group_size=16),
}

ROUNDING = rl.ActivationQuant(bits=8, protocol="compressed-tensors")
ASKED = {"activation_bits": 8, "protocol": "compressed-tensors"}


def quantized(quant, tokens, name="llama", act_order=True):
    model = tiny_model(name, dtype=torch.float32)
    rl.fuse(model, rl.hadamard_rotation(model))
    rl.gptq(model, tokens, quant, act_order=act_order)
    return model


@pytest.mark.parametrize("grid", GRIDS)
def test_stock_transformers_computes_what_the_quantized_model_does(grid, tokens, tmp_path):
    model = quantized(GRIDS[grid], tokens)
    folder = rl.export(model, tmp_path / "out")
    assert (read_by_transformers(folder, tokens).logits - model(tokens).logits).abs().max() < 1e-4
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("grid", [g for g in GRIDS if "asymmetric" not in g])
def test_stock_transformers_rounds_inputs_as_a_checkpoint_asks(grid, tokens, tmp_path):
    model = quantized(GRIDS[grid], tokens)
    folder = rl.export(model, tmp_path / "out", activations=ROUNDING)
    read = read_by_transformers(folder, tokens).logits
    assert (read - model(tokens).logits).abs().max() > 1e-2
    with rl.quantized_activations(model, ROUNDING):
        assert (read - model(tokens).logits).abs().max() < 1e-4


def test_a_rounding_that_no_checkpoint_can_ask_for_is_refused(tokens, tmp_path):
    for grid, format, activations, what in (
        ("groups", "compressed-tensors", rl.ActivationQuant(bits=8), "for no other rounding"),
        ("groups", "compressed-tensors", replace(ROUNDING, bits=4), "for no other rounding"),
        ("groups", "compressed-tensors", replace(ROUNDING, kv_bits=8), "for no other rounding"),
        ("groups", "compressed-tensors", 8, "such as 8"),
        ("groups", "gguf", ROUNDING, "'gguf' can't ask its runtime"),
        ("groups, asymmetric", "compressed-tensors", ROUNDING, "on symmetric integer grids alone"),
    ):
        model = quantized(GRIDS[grid], tokens)
        with pytest.raises(ValueError, match=what):
            rl.export(model, tmp_path / "out", format=format, activations=activations)
    assert not list(tmp_path.iterdir())


def test_transformers_reads_over_a_rotation_that_a_config_asks_for(tokens, tmp_path):
    """So a checkpoint that needs R4 is refused: the day this fails, it can be written."""
    folder = rl.export(quantized(rl.WeightQuant(), tokens), tmp_path / "out")
    before = read_by_transformers(folder, tokens).logits
    R4 = TransformArgs(targets=["re:.*down_proj$"], location="input")
    scheme = TransformScheme(type="hadamard", apply=[R4], head_dim=16)
    config = json.loads((folder / "config.json").read_text())
    asked = TransformConfig(config_groups={"R4": scheme}).model_dump(mode="json")
    config["quantization_config"]["transform_config"] = asked
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(read_by_transformers(folder, tokens).logits, before)


@pytest.mark.parametrize(
    "name", [name for name in CONFIGS if name.startswith("qwen") or "bias" in name]
)
def test_biases_and_other_families_survive(name, tokens, tmp_path):
    model = quantized(rl.WeightQuant(group_size=8), tokens, name)
    folder = rl.export(model, tmp_path / "out")
    assert (read_by_transformers(folder, tokens).logits - model(tokens).logits).abs().max() < 1e-4


def test_a_fused_model_is_a_plain_folder_with_an_untied_head(tokens, tmp_path):
    model = tiny_model("llama, tied", dtype=torch.float32)
    before = model(tokens).logits
    rl.fuse(model, rl.random_rotation(model))
    folder = rl.export(model, tmp_path / "out", format="fused")
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "quantization_config" not in config
    assert (read_by_transformers(folder, tokens).logits - before).abs().max() < 1e-3


def test_sixteen_bits_outside_the_codes_stay_within_their_rounding(tokens, tmp_path):
    model = quantized(rl.WeightQuant(group_size=16), tokens)
    folder = rl.export(model, tmp_path / "out", dtype=torch.bfloat16)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert (
        read_by_transformers(folder, tokens).logits.float() - model(tokens).logits
    ).abs().max() < 0.1 * model(tokens).logits.abs().max()


def test_a_sixteen_bit_model_is_exported_by_its_codes(tokens, tmp_path):
    model = with_weights_in(torch.bfloat16, quantized(rl.WeightQuant(group_size=16), tokens))
    for dtype in (None, torch.float32, torch.float16):
        rl.export(model, tmp_path / str(dtype), dtype=dtype)


def test_a_group_as_wide_as_a_row_is_a_group(tokens, tmp_path):
    model = quantized(rl.WeightQuant(group_size=16), tokens, "llama, head_dim ≠ hidden/heads")
    weights = codes_of(model)
    codes, scale, zero = weights["layers.0.k"].stored
    weights["layers.0.k"] = rl.QuantizedWeight(codes[:, :16], scale[:, :1], zero[:, :1])
    assert checkpoint._packing(weights).group_size == 16


def test_a_big_model_is_written_in_shards(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD", "20KB")
    model = quantized(rl.WeightQuant(group_size=16), tokens)
    folder = rl.export(model, tmp_path / "out")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert (read_by_transformers(folder, tokens).logits - model(tokens).logits).abs().max() < 1e-4


def test_a_folder_that_stock_software_cannot_read_is_one_sentence(tmp_path):
    with pytest.raises(RuntimeError, match=r"transformers can't read .*: .*config\.json"):
        read_by_transformers(tmp_path)


def test_the_stock_process_knows_nothing_of_rotlib(tmp_path):
    script = (
        f"import runpy; main = runpy.run_path({stock.__file__!r})['_main']; import sys, rotlib\n"
    )
    script += "try: main('nowhere', '')\nexcept FileNotFoundError: pass\nimport rotlib"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert "import of rotlib halted" in done.stderr


def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    tokens, tmp_path, monkeypatch
):
    plain, done = tiny_model(dtype=torch.float32), quantized(rl.WeightQuant(), tokens)
    online = rl.fuse(tiny_model(dtype=torch.float32), rl.hadamard_rotation(tiny_model(), R4=True))
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    for model, folder, settings, message in (
        (plain, "out", {}, "layers.0.q has no codes: quantize the model"),
        (done, "out", {"format": "fused"}, "is quantized already"),
        (
            done,
            "out",
            {"format": "onnx"},
            "unknown format 'onnx': choose one of compressed-tensors, gguf, fused",
        ),
        (online, "out", {"format": "fused"}, "needs R4 while it runs"),
        (done, "full", {}, "isn't an empty folder"),
        (done, "full", {"overwrite": True}, "holds something else than an export"),
        (done, "full/notes.txt/out", {}, "a file, or a link to nowhere, is in its way"),
        (done, "out", {"dtype": torch.int8}, r"dtype must be one of torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            rl.export(model, tmp_path / folder, **settings)
    usage = namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match="0 MiB left"):
        rl.export(done, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (full / "notes.txt").read_text() == "mine"


def test_a_checkpoint_that_reads_back_otherwise_fails_loudly_and_leaves_what_was_there(
    tokens, tmp_path, monkeypatch
):
    model = quantized(rl.WeightQuant(), tokens)
    folder = rl.export(model, tmp_path / "out", card="the first")

    def damaged(tensors, path, **settings):
        name = "model.layers.1.mlp.up_proj.weight_packed"
        save(tensors | {name: tensors[name] + 1}, path, **settings)

    save = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", damaged)
    with pytest.raises(
        RuntimeError, match=r"model\.layers\.1\.mlp\.up_proj\.weight doesn't read back"
    ):
        rl.export(model, folder, overwrite=True, card="the second")
    assert (folder / "README.md").read_text() == "the first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_recipe_is_exported_with_a_card_that_says_what_was_measured(folder, tokens, tmp_path):
    recipe = rl.Recipe(
        model=str(folder / "model"),
        rotation="hadamard",
        group_size=16,
        window=64,
        calibration_windows=2,
        test_windows=2,
    )
    out = rl.export_recipe(recipe, tmp_path / "out")
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model is None  # a folder of this machine means nothing elsewhere
    assert str(folder) not in card.content
    measured = rl.run(recipe).metrics
    assert f"| {measured['reference_perplexity']:.3f} | {measured['perplexity']:.3f} |" in card.text
    assert yaml.safe_load(card.text.split("```yaml")[1].split("```")[0])["rotation"] == "hadamard"
    model, tokenizer = rl.build(recipe)
    assert (read_by_transformers(out, tokens).logits - model(tokens).logits).abs().max() < 1e-4
    assert AutoTokenizer.from_pretrained(out).encode("one two") == tokenizer.encode("one two")


def test_a_recipe_of_8_bit_inputs_asks_whoever_runs_it_to_round_them(folder, tokens, tmp_path):
    how = {"window": 32, "test_windows": 2, "text": "wikitext2", "rounding": "rtn"}
    recipe = rl.Recipe(model=str(folder / "model"), **how, **ASKED)
    out = rl.export_recipe(recipe, tmp_path / "out")
    assert "rounded to 8 bits, token by token" in (out / "README.md").read_text()
    model, _ = rl.build(recipe)
    with rl.quantized_activations(model, recipe.activations):
        assert (read_by_transformers(out, tokens).logits - model(tokens).logits).abs().max() < 1e-4


def test_experts_with_8_bit_inputs_are_refused(tokens, tmp_path):
    model = quantized(rl.WeightQuant(), tokens, "mixtral, experts")
    with pytest.raises(ValueError, match="gives all tokens of an expert one scale"):
        rl.export(model, tmp_path / "out", activations=ROUNDING)


def test_a_recipe_that_no_checkpoint_can_hold_is_refused_before_it_runs(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for recipe, settings, message in (
        (rl.Recipe(R4=True), {}, "a plain checkpoint has no R4"),
        (rl.Recipe(rounding="none"), {}, "goes with the rounding 'none'"),
        (rl.Recipe(), {"format": "fused"}, "goes with the rounding 'none'"),
        (rl.Recipe(), {"folder": tmp_path}, "isn't an empty folder"),
        (rl.Recipe(group_size=16), {"format": "gguf"}, "GGUF's blocks hold 32 weights"),
        (rl.Recipe(**ASKED), {"format": "gguf"}, "can't ask its runtime"),
        (rl.Recipe(**ASKED, kv_bits=8), {}, "for no other rounding"),
        (rl.Recipe(**ASKED, symmetric=False), {}, "on symmetric integer grids alone"),
        (
            rl.Recipe(bits=5, symmetric=False),
            {"format": "gguf"},
            "no type of GGUF's holds an asymmetric grid of 5 bits",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            rl.export_recipe(recipe, **{"folder": tmp_path / "out"} | settings)
