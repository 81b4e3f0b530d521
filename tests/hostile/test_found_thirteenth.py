"""What the twelfth hunt left and the thirteenth found: wrong in silence, or in others' words."""

import pytest
import torch
from conftest import save_tiny_model, tiny_model

import rotlib as rl


@pytest.fixture
def model():
    return tiny_model(dtype=torch.float32)


def refused(pattern: str):
    return pytest.raises(ValueError, match=pattern)


@pytest.mark.parametrize("strange", [torch.float16, torch.tensor(3.0), {1, 2}])
def test_a_config_that_json_cannot_hold_is_refused_before_the_work(model, strange, tmp_path):
    model.config.strange = strange
    with refused("can't be written as JSON"):
        rl.export(model, tmp_path / "x")


def test_choices_longer_than_the_models_context_are_told(tmp_path):
    save_tiny_model(tmp_path, max_position_embeddings=4)
    model, tokenizer = rl.load(str(tmp_path))
    with refused("context of 4 tokens"):
        rl.zero_shot(model, tokenizer, ["continuation"], limit=2)
