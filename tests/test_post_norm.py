"""Families whose blocks end in a norm: R1 is left out, all the rest is as elsewhere."""

from copy import deepcopy

import pytest
import torch
from conftest import POST_NORM, exact_logits, save_tiny_model, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rotlib as rl
from rotlib.models.supported import adapt
from rotlib.models.walk import final_hidden
from rotlib.study import memory

pytestmark = pytest.mark.parametrize("name", POST_NORM)


def test_every_layer_is_run_with_the_mask_and_the_rotary_embeddings_of_its_type(name, tokens):
    model = tiny_model(name, dtype=torch.float32)
    hidden = torch.stack(final_hidden(adapt(model), tokens))
    wanted = model(tokens).logits[:, :-1]
    assert (model.lm_head(hidden) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_rotation_of_heads_and_inner_widths_changes_nothing(name, tokens):
    model = tiny_model(name)
    before = exact_logits(deepcopy(model), tokens)
    rotation = rl.random_rotation(model, R3=True, R4=True)
    assert rotation.R1 is None
    rotated = rl.fuse(model, rotation)
    assert (exact_logits(rotated, tokens) - before).abs().max() < 1e-9 * before.abs().max()
    assert rotated.config.tie_word_embeddings == POST_NORM[name].tie_word_embeddings


@pytest.mark.parametrize("group_size", [None, 8])
def test_optrot_learns_R2_alone(name, group_size):
    model = tiny_model(name, dtype=torch.float32)
    rotation = rl.optrot(model, seed=1, steps=60, group_size=group_size)
    assert rotation.R1 is None
    assert rotation.history[-1] < rotation.history[0]
    assert rotation.orthogonality_error() < 1e-12


def test_a_checkpoint_is_read_by_stock_transformers(name, tokens, tmp_path):
    model = tiny_model(name, dtype=torch.float32)
    rl.fuse(model, rl.hadamard_rotation(model))
    rl.gptq(model, tokens, rl.WeightQuant(group_size=8), act_order=True, asymmetry=0.25)
    rl.export(model, tmp_path / "W4")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "W4", dtype=torch.float32)
    wanted = model(tokens).logits
    assert (stock(tokens).logits - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_a_recipe_is_exported_with_a_card_that_says_what_is_left_out(name, folder, tmp_path):
    save_tiny_model(tmp_path / "its own", name)
    recipe = rl.Recipe(
        **{"model": str(tmp_path / "its own"), "text": "wikitext2", "rotation": "optrot"},
        **{"steps": 20, "window": 32, "calibration_windows": 2, "test_windows": 1},
    )
    out = rl.export_recipe(recipe, tmp_path / "out")
    assert "R1 is left out, since post_attention_layernorm" in (out / "README.md").read_text()
    written = sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values())
    assert sum(memory.on_disk(recipe).values()) == pytest.approx(written, rel=0.02)


def test_what_needs_R1_is_refused_by_the_norm_in_its_way(name, tokens):
    model = tiny_model(name, dtype=torch.float32)
    R1 = rl.Rotation(torch.eye(48), None)
    for use in (
        lambda: rl.fuse(model, R1),
        lambda: rl.gsr_rotation(model, block=16),
        lambda: rl.kurtail(model, tokens, tokens=16),
        lambda: rl.optrot_plus(model, tokens),
        lambda: rl.spinquant(model, tokens, rl.WeightQuant()),
    ):
        with pytest.raises(
            ValueError, match=r"needs R1, and in \w+ model\.layers\.0\.post_attention_layernorm"
        ):
            use()
