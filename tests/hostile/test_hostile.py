"""Inputs that somebody will give one day: each is refused in one sentence that says what is wrong.

The YAML files beside this hold them: an input, and a regular expression or a piece of the sentence.
What is not defended against stands in SECURITY.md.
"""

import re
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from conftest import save_tiny_model, tiny_model, with_weights_in
from torch import nn

import rotlib as rl
from rotlib.models.zoo import load_tokenizer
from rotlib.study import reproduce
from rotlib.study.recipe import OWN
from rotlib.study.sweep_file import read_sweep

HERE = Path(__file__).parent


def cases(name: str) -> list:
    return [pytest.param(*case, id=str(case[0])[:80]) for case in read(name)]


def read(name: str) -> list:
    return yaml.safe_load((HERE / name).read_text(encoding="utf-8"))


@contextmanager
def refused(says: str):
    """The block raises ValueError with one sentence that says this: a piece of it, or a pattern."""
    try:
        yield
    except ValueError as error:
        text = str(error)
    else:
        pytest.fail("it was taken")
    assert says in text or re.search(says, text), text
    assert "\n" not in text
    assert len(text) < 500


# --- what calls.yaml names


def quantized(model):
    rl.rtn(model, rl.WeightQuant())
    return model


twice_quantized = quantized


def weights_of(model):
    return rl.rtn(deepcopy(model), rl.WeightQuant())


def changed(model, part, change):
    weights = weights_of(model)
    first = weights["layers.0.q"]
    return weights | {"layers.0.q": first._replace(**{part: change(getattr(first, part))})}


def with_nan(model):
    model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    return model


def with_one_layer_twice(model):
    model.model.layers[1] = model.model.layers[0]
    return model


def with_one_weight_twice(model):
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    return model


class Adapter(nn.Linear):
    """As an adapter's library would put it in a linear's place."""


def with_an_adapter(model):
    layer = model.model.layers[0].mlp
    adapter = Adapter(layer.up_proj.in_features, layer.up_proj.out_features, bias=False)
    layer.up_proj = adapter.eval().requires_grad_(False)
    return model


def asking_for_R4(model):
    model.config.rotlib_online = ["R4"]
    return model


def almost_too_large(model):
    model.model.layers[0].mlp.up_proj.weight.fill_(60000.0)
    return with_weights_in(torch.float16, model)


def hooked(model):
    model.model.layers[0].register_forward_hook(lambda module, args, output: output)
    return model


def saying(model, **config):
    for name, value in config.items():
        setattr(model.config, name, value)
    return model


def with_a_half_layer(model):
    model.model.layers[1].half()
    return model


def without_layers(model):
    del model.model.layers[:]
    return model


def times(model, factor):
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.mul_(factor)
    return model


def alone(model):
    return rl.random_rotation(model)


def nothing(model, seed=0, R3=False, R4=False):
    return None


def without_R4(model, seed=0, R3=False, R4=False):
    return rl.random_rotation(model, seed)


def zeroing(model, seed=0, R3=False, R4=False):
    model.model.layers[0].mlp.up_proj.weight.zero_()
    return rl.random_rotation(model, seed)


def own(name, make, R4=False):
    rl.register_rotation(name)(make)
    try:
        return rl.make_rotation(rl.Recipe(rotation=name, R4=R4), tiny_model(dtype=torch.float32))
    finally:
        OWN.clear()


def with_other_weights(model):
    model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    return model


def with_large_scales(model):
    linear = model.model.layers[0].mlp.up_proj
    linear.quantized = linear.quantized._replace(scale=linear.quantized.scale * 1e8)
    linear.weight.copy_(linear.quantized.dense())
    return model


def online(model):
    return rl.fuse(model, rl.hadamard_rotation(model, R4=True))


def from_folder(model, folder):
    model.config.name_or_path = folder
    return quantized(model)


def rounding(model, then):
    with rl.quantized_activations(model, rl.ActivationQuant(bits=4)):
        return then()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("hostile") / "tiny"
    save_tiny_model(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("smollm2-135m")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("ROTLIB_RESULTS", str(tmp_path / "results"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def folder(tmp_path) -> Path:
    """With a file, a folder of notes, and a foreign project that has a config.json."""
    (tmp_path / "a file").write_text("text")
    for name, file in {"full": "notes.txt", "project": "config.json", "edited": "x"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    (tmp_path / "edited" / "rotlib_export.json").write_text('{"files": {"x": "another sum"}}')
    return tmp_path


@pytest.mark.parametrize(("call", "says"), cases("calls.yaml"))
def test_a_call_that_cannot_be_right_is_refused_in_one_sentence(
    call, says, tiny, tokenizer, tokens, folder
):
    names = {"rl": rl, "torch": torch, "tiny": tiny, "tokenizer": tokenizer}
    names |= {"tokens": tokens, "folder": folder, "model": tiny_model(dtype=torch.float32)}
    before = listing(folder)
    with refused(says):
        eval(call, globals() | names)
    assert listing(folder) == before  # nothing was written, nothing is gone


def listing(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the store's."""
    return {
        str(path): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "results" not in path.parts
    }


@pytest.mark.parametrize(("settings", "says"), cases("recipes.yaml"))
def test_a_recipe_with_a_setting_of_no_effect_or_sense_is_refused(settings, says):
    with refused(says):
        rl.Recipe(**settings)


WRONG = {
    "int": (-1, 1.5, "4", True, [4], 10**30),
    "str": ("", "no such", 3, None, ["a"]),
    "bool": ("no", 0, 1, None),
    "float": (-0.1, 1.1, "half", float("nan"), float("inf")),
}


def wrong_values() -> list[tuple[str, object]]:
    found = []
    for field in fields(rl.Recipe):
        kind = str(field.type)
        name = next(name for name in WRONG if name in kind)
        found += [
            (field.name, value) for value in WRONG[name] if field.name != "model" or value == 3
        ]
    for name in ("clip_norm", "token_cap"):  # they are no shares
        found.remove((name, 1.1))
    return found


@pytest.mark.parametrize(("name", "value"), wrong_values())
def test_a_wrong_value_of_a_recipes_field_is_refused_by_the_fields_name(name, value):
    with refused(name):
        rl.Recipe(**{name: value})


@pytest.mark.parametrize(("text", "says"), cases("sweeps.yaml"))
def test_a_sweep_file_that_cannot_be_right_is_refused_in_one_sentence(text, says, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with refused(says):
        read_sweep(path)


def test_a_sweep_file_that_would_grow_is_refused_at_once(tmp_path):
    path = tmp_path / "sweep.yaml"
    doubling = "\n".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 25))
    lists = ", ".join(f"{name}: {list(range(1, 11))}" for name in rl.Recipe.__annotations__)
    for text, says in (
        (f"a0: &a0 [x]\n{doubling}", "anchors and aliases"),
        (f"grid: {{{lists}}}", "recipes, more than 100000: shorten its lists"),
        ("[" * 5000 + "]" * 5000, "nested more than 20 deep"),
        ("#" * 2**21, "is longer than"),
    ):
        path.write_text(text)
        with refused(says):
            read_sweep(path)


@pytest.mark.parametrize("name", ["no.yaml", ".", "bytes.yaml"])
def test_a_sweep_that_cannot_be_read_is_refused(name, tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"base: \xff\xfe")
    with refused("can't be read|isn't text in UTF-8"):
        read_sweep(tmp_path / name)


@pytest.mark.parametrize(("text", "says"), cases("scales.yaml"))
def test_a_scale_that_cannot_be_right_is_refused_in_one_sentence(text, says, tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text(text)
    monkeypatch.setattr(reproduce, "CONFIGS", tmp_path / "configs")
    with refused(says):
        reproduce.make_plan("mine")


def test_enough_inputs_are_kept():
    files = ("calls.yaml", "recipes.yaml", "sweeps.yaml", "scales.yaml")
    assert sum(len(read(name)) for name in files) + len(wrong_values()) >= 300
