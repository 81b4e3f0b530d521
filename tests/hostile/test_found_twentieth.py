"""What the twentieth and the twenty-first hunt found."""

import json

import pytest
import torch
from conftest import refused, save_tiny_model
from torch import nn

import rotlib as rl


def other_multiplier(model):
    model.config.residual_multiplier = 0.45  # the modules go on with 0.4


def other_activation(model):
    model.config.hidden_act = "gelu"


def other_scaling(model):
    model.model.layers[1].self_attn.scaling *= 1.5


def other_padding(model):
    model.config.pad_token_id = 5000


def bias_of_the_head(model):
    rows = model.lm_head.out_features
    model.lm_head.bias = nn.Parameter(torch.full((rows,), 1e-3), requires_grad=False)


def bias_of_queries(model):
    q = model.model.layers[0].self_attn.q_proj
    q.bias = nn.Parameter(torch.full((q.out_features,), 1e-3), requires_grad=False)


CHANGES = {
    other_multiplier: "residual_multiplier is 0.4, and the config makes it 0.45",
    other_activation: "act_fn is a SiLUActivation, and the config makes a GELUActivation there",
    other_scaling: r"layers.1.self_attn.scaling is .*, and the config makes it",
    other_padding: "config makes no model any more: Padding_idx must be within num_embeddings",
    bias_of_the_head: r"lm_head has a bias of \(\d+,\), and the config makes none there",
    bias_of_queries: r"q_proj has a bias of \(\d+,\), and the config makes none there",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("format", ["compressed-tensors", "gguf"])
def test_what_the_config_does_not_say_is_named_before_the_export(change, format, tmp_path):
    kind = "granite, multipliers" if change is other_multiplier else "llama"
    save_tiny_model(tmp_path, kind)
    model, tokenizer = rl.load(str(tmp_path))
    rl.rtn(model, rl.WeightQuant(group_size=16))
    change(model)
    with refused(CHANGES[change]):
        rl.export(model, tmp_path.with_name("out"), format, tokenizer)
    assert not tmp_path.with_name("out").exists()


def test_another_padding_token_is_no_other_model(model, tmp_path):
    rl.rtn(model, rl.WeightQuant(group_size=16))
    model.config.pad_token_id = 2  # as training scripts set it
    assert rl.export(model, tmp_path / "out").is_dir()


def test_a_bias_of_another_length_than_its_weight_is_named(model):
    q = model.model.layers[0].self_attn.q_proj
    q.bias = nn.Parameter(torch.zeros(q.out_features + 1), requires_grad=False)
    with refused(r"layers.0.q has a bias of \(49,\), and its weight has 48 rows"):
        rl.rtn(model, rl.WeightQuant())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1e4}}, "rope_theta -10000.0"),
        ({"rope_theta": 0}, "rope_theta 0"),
        ({"rope_scaling": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 0}}, "factor 0"),
        ({"pad_token_id": -500}, "pad_token_id -500, beyond its vocab_size"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder True, and only decoders alone"),
    ],
)
def test_settings_that_make_no_numbers_are_named_as_the_model_is_loaded(settings, says, tmp_path):
    save_tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | settings
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused(f"its config.json says {says}"):
        rl.load(str(tmp_path))


def test_the_damaged_one_of_several_files_is_named(tmp_path):
    save_tiny_model(tmp_path)
    (tmp_path / "notes.safetensors").touch()
    with refused("its notes.safetensors is damaged, .* take it away where it isn't the model's"):
        rl.load(str(tmp_path))


def test_a_tokenizer_cut_short_is_named(tmp_path):
    save_tiny_model(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:100])
    with refused("its tokenizer.json is not a valid JSON file"):
        rl.load(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_an_R1_of_no_real_numbers_is_named_by_its_type(dtype, model):
    width = model.config.hidden_size
    with refused(f"R1 must be a real floating-point tensor or None, not {dtype}"):
        rl.fuse(model, rl.Rotation(torch.eye(width, dtype=dtype), None))
