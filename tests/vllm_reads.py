"""vLLM on a CPU computes from every checkpoint that it can read what the model in memory does.
`make test-vllm`, outside CI.

It computes in bfloat16, so that log-probabilities agree to that. The table of what was seen goes to
build/vllm.md.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

import rotlib as rl
from rotlib.disk import ROOT

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
TABLE = ROOT / "build" / "vllm.md"
WINDOWS, LENGTH = 4, 64
# nats: bfloat16 in transformers moves a token by 0.06 and the mean by 0.003, vLLM's kernel for
# packed codes on a CPU three times as much; what is read wrongly is off by whole nats
ONE, MEAN = 0.25, 0.06
QUIET = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
GRIDS = {
    "not quantized": None,
    "W4, groups of 64": rl.WeightQuant(group_size=64),
    "W4, groups of 32": rl.WeightQuant(group_size=32),
    "W4, whole rows": rl.WeightQuant(),
    "W4, whole rows, signed scales": rl.WeightQuant(convention="signed"),
    "W4, groups of 64, asymmetric": rl.WeightQuant(group_size=64, symmetric=False),
    "W8, whole rows": rl.WeightQuant(bits=8),
    "W8A8, whole rows": rl.WeightQuant(bits=8),
    "W4A8, whole rows": rl.WeightQuant(),
    "NVFP4": rl.WeightQuant(grid="nvfp4"),
    "MXFP4": rl.WeightQuant(grid="mxfp4"),
}


@pytest.fixture(scope="module")
def table():
    TABLE.parent.mkdir(exist_ok=True)
    lines = ["| checkpoint | vLLM | log-probabilities, nats off | goes on |", "|---|---|---|---|"]
    yield lines
    TABLE.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def windows():
    _, tokenizer = rl.load("smollm2-135m")
    return rl.windows(rl.load_tokens("wikipedia-mini", tokenizer, "test"), LENGTH, WINDOWS)


def read(folder: Path, windows: torch.Tensor, out: Path) -> dict | str:
    """What vLLM computes, or the reason why it doesn't."""
    reader = Path(__file__).with_name("vllm_reader.py")
    command = [PYTHON, reader, folder, json.dumps(windows.tolist()), out]
    done = subprocess.run(
        list(map(str, command)), env=os.environ | QUIET, capture_output=True, text=True, check=False
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "Error" in line]
        return (errors or done.stderr.splitlines() or ["no word"])[-1].strip()
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", GRIDS)
def test_vllm_computes_what_the_model_in_memory_does(name, windows, table, tmp_path):
    model, tokenizer = rl.load("smollm2-135m")
    rl.fuse(model, rl.hadamard_rotation(model))
    if GRIDS[name]:
        rl.rtn(model, GRIDS[name])
    format = "compressed-tensors" if GRIDS[name] else "fused"
    how = {"bits": 8, "protocol": "compressed-tensors"} if "A8" in name else {}
    asked = {"dtype": torch.bfloat16, "activations": rl.ActivationQuant(**how)}
    folder = rl.export(model, tmp_path / "out", format, tokenizer, **asked)
    found = read(folder, windows, tmp_path / "found.json")
    if isinstance(found, str):
        table.append(f"| {name} | not read | {found} | |")
        pytest.skip(f"vLLM doesn't run it on a CPU: {found}")
    with rl.quantized_activations(model, asked["activations"]):
        logprobs = model(windows).logits[:, :-1].log_softmax(-1)
    ours = logprobs.gather(-1, windows[:, 1:, None]).squeeze(-1)
    off = torch.tensor(found["logprobs"]) - ours
    one, mean = off.abs().mean().item(), off.mean().item()
    text = " ".join(found["text"].split())
    table.append(
        f"| {name} | {found['version']} | {one:.3f} a token, {mean:+.3f} in the mean | {text} |"
    )
    assert one < ONE
    assert abs(mean) < MEAN
    assert text
