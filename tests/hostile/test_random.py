"""Whatever is given: a refusal is one sentence, and what is taken is what was given."""

import json
from contextlib import suppress
from dataclasses import fields

import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from test_hostile import refused

import rotlib as rl
from rotlib.study import store
from rotlib.study.sweep_file import read_sweep

FIELDS = [field.name for field in fields(rl.Recipe)]
PLAIN = (
    some.none()
    | some.booleans()
    | some.integers(-3, 2000)
    | some.floats()
    | some.sampled_from(["gptq", "rtn", "none", "optrot", "gsr", "spinquant", "full", "", "é\n"])
)


def _mappings(inner):
    names = some.sampled_from([*FIELDS, "base", "grid", "arms", "rotations", "task", "metrics"])
    return some.dictionaries(names, inner, max_size=4)


DATA = some.recursive(PLAIN, lambda of: some.lists(of, max_size=3) | _mappings(of), max_leaves=6)
often = settings(
    max_examples=300,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def taken_or_refused(call):
    """What the call returns, or None where it is refused in one sentence."""
    taken = []
    with suppress(TakenError), refused("."):
        taken.append(call())
        raise TakenError
    return taken[0] if taken else None


class TakenError(Exception):
    """Not a ValueError: the call went through."""


@often
@given(some.dictionaries(some.sampled_from(FIELDS), PLAIN, max_size=5))
def test_a_recipe_is_refused_or_is_its_own_specification(given):
    recipe = taken_or_refused(lambda: rl.Recipe(**given))
    if recipe is not None:
        spec = json.loads(json.dumps(recipe.spec()))
        assert (
            rl.Recipe(**{name: value for name, value in spec.items() if name != "task"}) == recipe
        )


@often
@given(_mappings(DATA) | DATA)
def test_a_sweep_of_any_data_is_refused_or_makes_recipes(tmp_path, data):
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(data))
    recipes = taken_or_refused(lambda: read_sweep(tmp_path / "sweep.yaml"))
    assert recipes is None or all(isinstance(recipe, rl.Recipe) for recipe in recipes)


@often
@given(some.text("abc:{}[]-&*!?#'\"\n\t %|>0", max_size=40))
def test_a_sweep_of_any_text_is_refused_or_makes_recipes(tmp_path, text):
    (tmp_path / "sweep.yaml").write_text(text)
    taken_or_refused(lambda: read_sweep(tmp_path / "sweep.yaml"))


@often
@given(_mappings(DATA) | DATA)
def test_a_result_file_of_any_data_is_refused(tmp_path, data):
    (tmp_path / "quantize-0.json").write_text(json.dumps(data))
    with refused("quantize-0.json"):
        store.read(tmp_path / "quantize-0.json")


@often
@given(some.lists(some.integers(0, 95), max_size=20), PLAIN, PLAIN)
def test_windows_are_refused_or_cut_from_the_stream(tokens, length, count):
    stream = torch.tensor(tokens, dtype=torch.long)
    found = taken_or_refused(lambda: rl.windows(stream, length, count))
    assert found is None or torch.equal(found.flatten(), stream[: length * count])


@often
@given(PLAIN, PLAIN, PLAIN, PLAIN)
def test_a_grid_is_refused_or_rounds_to_its_codes(bits, group_size, symmetric, convention):
    settings = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    quant = taken_or_refused(lambda: rl.WeightQuant(**settings, convention=convention))
    assert quant is None or quant.codes[1] - quant.codes[0] == 2**bits - 1
