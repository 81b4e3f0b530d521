"""What the seventeenth hunt and the eighteenth found."""

import json

import pytest
import torch
from conftest import refused, save_tiny_model, tiny_model

import rotlib as rl
from rotlib.disk import check_writable
from rotlib.study import store


@pytest.mark.parametrize(
    "held",
    [
        {"R1": torch.eye(48), "model": torch.ones(5)},
        {"R1": "notes"},
        {"R1": torch.eye(48), "model.layers.1.self_attn.R2": torch.eye(8)},
    ],
)
def test_a_file_that_holds_more_than_a_rotation_stays(held, tmp_path):
    torch.save(held, file := tmp_path / "R.bin")
    before = file.read_bytes()
    with refused("is there, and holds no rotation: name another file"):
        rl.save_rotation(rl.Rotation(torch.eye(48), None), file)
    assert file.read_bytes() == before


def test_attentions_that_torchs_attention_has_not_are_refused_before_the_work(tokens, tmp_path):
    save_tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"output_attentions": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = rl.load(str(tmp_path))
    with refused("output_attentions is on.* set it to false"):
        rl.gptq(model, tokens, rl.WeightQuant())


def test_a_format_without_rounded_inputs_is_named(tmp_path):
    model = tiny_model(dtype=torch.float32)
    eight = rl.ActivationQuant(bits=8, protocol="compressed-tensors")
    for format in ("gguf", "fused"):
        with refused(f"'{format}' can't ask its runtime to round activations"):
            rl.export(model, tmp_path / "x", format=format, activations=eight)


RESULT = {
    "spec": {"task": "quantize"},
    "metrics": {"perplexity": 2.0, "kl": 0.1, "reference_perplexity": 1.9},
    "seconds": {},
    "peak_memory_mb": 1,
    "provenance": {"stages": {"gptq": "0"}},
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("fallbacks", value) for value in ("1.0", -5, float("nan"), None, True)),
        ("perplexity", "1.0"),
        ("kl", None),
    ],
)
def test_a_results_numbers_are_numbers(name, value, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(RESULT | {"metrics": RESULT["metrics"] | {name: value}}))
    with refused(f"holds no number as its {name}"):
        store.read(path)


def test_a_model_without_its_head_is_told_so():
    model = tiny_model(dtype=torch.float32)
    with refused("this LlamaModel has no head .* AutoModelForCausalLM"):
        rl.rtn(model.model, rl.WeightQuant())


def test_a_missing_weight_is_named():
    weights = rl.rtn(tiny_model(dtype=torch.float32), rl.WeightQuant())
    del weights["layers.1.o"]
    with refused("lack layers.1.o: give those of a whole model"):
        rl.restore(tiny_model(dtype=torch.float32), weights)


def test_a_link_to_nowhere_is_no_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with refused("a link to nowhere, is in its way"):
        check_writable(tmp_path / "link" / "local", "name another")
