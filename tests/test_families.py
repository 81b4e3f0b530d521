"""Which of transformers' causal language models can be rotated: every one is tried."""

import re
from copy import deepcopy

import pytest
import torch
from conftest import SHAPE, exact_logits, tiny_model
from transformers import AutoModelForCausalLM, logging
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import rotlib as rl
from rotlib.disk import ROOT
from rotlib.models.families import FAMILIES
from rotlib.models.joined import open_joined
from rotlib.models.supported import adapt
from rotlib.models.zoo import load_tokenizer

KNOWN = [name for family in FAMILIES for name in family.model_types]


def outline(model_type):
    """A model of that type with two layers and no weights, or None where it can't be made so."""
    try:
        config = CONFIG_MAPPING[model_type]()
        config.num_hidden_layers = 2
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:2]
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception:  # each class has reasons of its own
        return None


def test_every_other_architecture_is_refused_by_the_module_that_stands_in_the_way():
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    made = {name: outline(name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in KNOWN}
    logging.set_verbosity(before)
    made = {name: model for name, model in made.items() if model is not None}
    assert len(made) > 120
    for name, model in made.items():
        with pytest.raises(ValueError, match="rotlib can't rotate") as refusal:
            adapt(model)
        path = re.search("the module ([\\w.]+) ", str(refusal.value))[1]
        assert path in dict(model.named_modules()), name


@pytest.mark.parametrize("model_type", KNOWN)
def test_every_known_architecture_computes_the_same_when_it_is_rotated(model_type, tokens):
    config = CONFIG_MAPPING[model_type](**SHAPE, head_dim=8)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    open_joined(model.requires_grad_(False))
    for parameter in model.parameters():
        parameter.copy_(
            torch.rand_like(parameter) + 0.5
        ) if parameter.ndim == 1 else parameter.mul_(5)
    before = exact_logits(deepcopy(model), tokens)
    rotated = rl.fuse(model, rl.random_rotation(model, R3=True, R4=True))
    assert (exact_logits(rotated, tokens) - before).abs().max() < 1e-9


def test_a_joined_projection_is_saved_and_read_as_the_familys_own(tmp_path, tokens):
    model = tiny_model("phi3, joined projections, part of a head turned", dtype=torch.float32)
    model.save_pretrained(tmp_path / "plain")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(stock(tokens).logits, model(tokens).logits)
    with pytest.raises(
        ValueError, match=r"isn\'t opened into its parts: load the model with rl\.load"
    ):
        adapt(stock)
    load_tokenizer("smollm2-135m").save_pretrained(tmp_path / "plain")
    read, _ = rl.load(str(tmp_path / "plain"), device="cpu")
    assert torch.equal(read(tokens).logits, stock(tokens).logits)
    read.load_state_dict(rl.fuse(model, rl.hadamard_rotation(model)).state_dict())
    assert torch.equal(read(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("group_size", [None, 16])
def test_a_checkpoint_of_joined_projections_is_packed_joined(group_size, tmp_path, tokens):
    model = tiny_model("phi3, joined projections, part of a head turned", dtype=torch.float32)
    rl.fuse(model, rl.optrot(model, steps=3))
    rl.gptq(model, tokens, rl.WeightQuant(group_size=group_size), act_order=True)
    rl.export(model, tmp_path / "W4")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "W4", dtype=torch.float32)
    assert (stock(tokens).logits - model(tokens).logits).abs().max() < 1e-4


def test_the_readme_names_the_families():
    said = (ROOT / "docs" / "your_model.md").read_text()
    assert all(f"`{name}`" in said for name in KNOWN)
