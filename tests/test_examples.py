"""The examples in docstrings run, and every public name has one."""

import doctest
import importlib
import inspect
import pkgutil
from copy import deepcopy

import pytest
import torch
from conftest import SHAPE, save_tiny_model, small_tokenizer, tiny_model

import rotlib as rl
from rotlib.study.recipe import OWN

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    names = [found.name for found in pkgutil.walk_packages(rl.__path__, "rotlib.")]
    found = [test for name in names for test in finder.find(importlib.import_module(name), name)]
    return [test for test in found if test.examples]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """The folder of a tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    return str(folder)


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_an_example_prints_what_it_says(example, tiny, tmp_path, monkeypatch):
    """It sees a tiny `model`, windows of `tokens`, the folder of a `tiny` model, and a `folder`."""
    monkeypatch.setenv("ROTLIB_RESULTS", str(tmp_path / "results"))
    torch.manual_seed(0)
    example.globs |= {
        "torch": torch,
        "model": tiny_model(dtype=torch.float32),
        "tokens": torch.randint(0, SHAPE["vocab_size"], (4, 32)),
        "tokenizer": small_tokenizer(),
        "tiny": tiny,
        "folder": tmp_path,
    }
    if "tokenizer" in example.docstring and "zero_shot" in example.name:
        example.globs["model"], _ = rl.load(tiny)
    registered = deepcopy(dict(OWN))
    try:
        outcome = doctest.DocTestRunner(optionflags=FLAGS).run(example)
    finally:
        OWN.clear()
        OWN.update(registered)
    assert not outcome.failed


@pytest.mark.parametrize("name", [n for n in rl.__all__ if callable(getattr(rl, n))])
def test_a_public_name_has_an_example_and_a_summary_of_one_line(name):
    thing = getattr(rl, name)
    text = inspect.getdoc(thing) or ""
    summary = text.split("\n\n")[0]
    assert "\n" not in summary, summary
    assert len(summary) <= 100
    assert ">>> " in text


def test_importing_rotlib_brings_no_torch():
    import subprocess
    import sys
    import time

    script = "import sys, rotlib; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    start = time.perf_counter()
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    assert time.perf_counter() - start < 3  # 0.05 s; Python itself takes the rest


def test_packages_import_downward_only():
    """models → rotations → quantization → learning → measure → checkpoints → study."""
    import ast

    from rotlib.disk import ROOT

    order = ("models", "rotations", "quantization", "learning", "measure", "checkpoints", "study")
    for place, package in enumerate(order):
        for path in (ROOT / "rotlib" / package).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                module = getattr(node, "module", None) or ""
                parts = module.split(".")
                if isinstance(node, ast.ImportFrom) and parts[0] == "rotlib" and len(parts) > 1:
                    assert (
                        parts[1] in ("checks", "disk", "precision")
                        or order.index(parts[1]) <= place
                    ), (path.name, module)


def test_no_module_is_shadowed_by_a_function_of_its_name():
    for found in pkgutil.walk_packages(rl.__path__, "rotlib."):
        parent, _, name = found.name.rpartition(".")
        importlib.import_module(found.name)
        assert inspect.ismodule(getattr(importlib.import_module(parent), name)), found.name
