"""What the twelfth hunt left and the thirteenth found: wrong in silence, or in others' words."""

import copy
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import refused, save_tiny_model, tiny_model

import rotlib as rl
from rotlib.disk import ROOT, folder_of


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


def test_a_failed_learning_reaches_another_process_whole():
    rotation = rl.Rotation(torch.eye(4), None)
    failure = pickle.loads(pickle.dumps(rl.LearningFailed("diverged", rotation)))
    assert str(failure) == "diverged"
    assert torch.equal(failure.rotation.R1, rotation.R1)


def test_a_rotation_is_not_read_from_a_pipe_nor_written_over_one(model, tmp_path):
    os.mkfifo(pipe := tmp_path / "R.bin")
    with refused("a folder or a pipe"):
        rl.load_rotation(pipe, model)
    with refused("a folder or a pipe"):
        rl.save_rotation(rl.Rotation(torch.eye(48), None), pipe)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "~nobodyx/R.bin"])
def test_a_rotation_is_not_written_where_no_file_can_be(name):
    with refused("is no place for a rotation"):
        rl.save_rotation(rl.Rotation(torch.eye(48), None), name)


def test_a_rotations_file_may_be_named_from_home(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rl.save_rotation(rl.Rotation(torch.eye(48), None), "~/R.bin") == tmp_path / "R.bin"
    assert torch.equal(rl.load_rotation("~/R.bin", model).R1, torch.eye(48).double())


def test_codes_of_other_weights_are_not_put_back(model, tokens):
    rotated = tiny_model(dtype=torch.float32)
    rl.fuse(rotated, rl.hadamard_rotation(rotated))
    weights = rl.rtn(rotated, rl.WeightQuant(bits=8))
    before = model(tokens).logits
    for other in (model, tiny_model(seed=1, dtype=torch.float32)):
        with refused("was made from another weight"):
            rl.restore(other, weights)
    assert torch.equal(model(tokens).logits, before)
    assert rl.restore(rl.fuse(model, rl.hadamard_rotation(model)), weights)


def test_codes_made_with_R4_are_not_put_into_a_model_without(model, tokens):
    turned = tiny_model(dtype=torch.float32)
    rl.fuse(turned, rl.hadamard_rotation(turned, R4=True))
    rl.fuse(model, rl.hadamard_rotation(model))
    with refused("down was made from another weight"):
        rl.restore(model, rl.rtn(turned, rl.WeightQuant(bits=8)))


@pytest.mark.parametrize("how", ["a linear replaced", "hooks cleared"])
def test_a_model_that_has_lost_R4_is_refused(model, tokens, how):
    rl.fuse(model, rl.hadamard_rotation(model, R4=True))
    rl.perplexity(copy.deepcopy(model), tokens.flatten(), tokens.shape[1])
    mlp = model.model.layers[1].mlp
    if how == "hooks cleared":
        mlp.down_proj._forward_pre_hooks.clear()
    else:
        weight, mlp.down_proj = mlp.down_proj.weight, torch.nn.Linear(80, 48, bias=False)
        mlp.down_proj.weight = weight
    for use in (
        lambda: rl.perplexity(model, tokens.flatten(), tokens.shape[1]),
        lambda: rl.gptq(model, tokens, rl.WeightQuant()),
        lambda: rl.Reference(model, tokens),
    ):
        with refused("down has lost the online rotation R4"):
            use()


def test_layers_kept_of_another_model_are_not_put_back(model, tokens):
    class Kept(dict):
        put = dict.__setitem__

    rl.gptq(model, tokens, rl.WeightQuant(), kept=(kept := Kept()))
    with refused("was made from another weight"):
        rl.gptq(tiny_model(seed=1, dtype=torch.float32), tokens, rl.WeightQuant(), kept=kept)


def test_hadamard_matrices_are_the_same_under_any_default_device():
    with torch.device("meta"):
        for order in (12, 28, 16):
            H = rl.hadamard(order)
            assert torch.allclose(H @ H.T, torch.eye(order, dtype=torch.float64, device="cpu"))
            assert rl.walsh(order).device.type == "cpu"


@pytest.mark.parametrize(
    "R1", [np.eye(4), [[1.0]], "x", torch.ones(3, 4), torch.full((3, 3), torch.nan)]
)
def test_a_rotation_of_no_matrix_says_so(R1):
    rotation = rl.Rotation(R1, None)
    with refused("R1 must|finite numbers"):
        rotation.projected()


def test_rotations_can_be_compared():
    one, other = (rl.Rotation(torch.eye(3), None) for _ in range(2))
    assert one == one
    assert one != other


@pytest.mark.parametrize(
    "file", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json"]
)
def test_a_folders_settings_that_are_a_list_are_named(tmp_path, file):
    save_tiny_model(tmp_path)
    (tmp_path / file).write_text("[1]")
    with refused(f"its {file} is not a valid JSON file"):
        rl.load(str(tmp_path))


def test_a_pad_token_beyond_the_vocabulary_is_named(tmp_path):
    save_tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": 100_000}))
    with refused("pad_token_id 100000, beyond its vocab_size of 384"):
        rl.load(str(tmp_path))


def test_a_results_folder_that_no_file_system_takes_is_told(monkeypatch):
    monkeypatch.setenv("ROTLIB_RESULTS", "x" * 300)
    with refused("ROTLIB_RESULTS can't name a folder"):
        folder_of("ROTLIB_RESULTS", "results")


def test_names_beyond_ascii_are_printed_on_any_terminal(tmp_path):
    sweep = tmp_path / "é.yaml"
    sweep.write_text("base: {model: /nowhere/é}\narms:\n  - {rotation: none}\n", encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-m", "rotlib.study.sweep", str(sweep), "--dry-run"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "/nowhere/" in run.stdout
