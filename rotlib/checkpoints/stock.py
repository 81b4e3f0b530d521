"""What stock software computes from a checkpoint, in a process that can't import rotlib.

This file is that process too: it imports nothing of rotlib's, and runs itself. transformers reads a
Hugging Face folder, or the weights of a GGUF file dequantized; llama.cpp, where its Python package
is installed, runs the file itself, in its own arithmetic.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from math import exp
from pathlib import Path
from statistics import fmean
from subprocess import run

import torch
import torch.nn.functional as F
from torch import Tensor

_QUIET = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


@dataclass(frozen=True)
class Reading:
    """What some software computed.

    It is the perplexity over the windows, the logits of each one's last positions, and how the
    prompt went on.
    """

    software: str
    perplexity: float
    logits: Tensor
    text: str


def read_by_transformers(
    folder: str | Path,
    windows: Tensor | None = None,
    gguf_file: str = "",
    keep: int | None = None,
    prompt: str = "",
    new_tokens: int = 24,
) -> Reading:
    """What transformers computes in float32 from a folder, or from the GGUF file in it.

    `keep` is how many positions' logits are returned of each window (None: all). Raises
    RuntimeError where it can't read the folder.
    """
    asked = {
        "folder": _absolute(folder),
        "gguf_file": gguf_file,
        "prompt": prompt,
        "new_tokens": new_tokens,
    }
    return _elsewhere("transformers", asked, windows, keep)


def read_by_llama_cpp(file: str | Path, windows: Tensor, keep: int | None = None) -> Reading:
    """What llama.cpp computes from a GGUF file; raises like `read_by_transformers`."""
    return _elsewhere("llama.cpp", {"file": _absolute(file)}, windows, keep)


def has_llama_cpp() -> bool:
    """Whether llama.cpp is installed, with its bindings for Python."""
    return find_spec("llama_cpp") is not None


def _absolute(place: str | Path) -> str:
    """A folder's or file's place as the other process sees it; a Hugging Face id stays as it is."""
    return str(Path(place).resolve() if Path(place).exists() else place)


def _elsewhere(software: str, asked: dict, windows: Tensor | None, keep: int | None) -> Reading:
    with tempfile.TemporaryDirectory() as scratch:
        given, found = Path(scratch) / "given.pt", Path(scratch) / "found.pt"
        torch.save(asked | {"software": software, "windows": windows, "keep": keep}, given)
        # -I: no PYTHONPATH, and neither this folder nor the working one
        command = [sys.executable, "-I", __file__, given, found]
        how = {"capture_output": True, "text": True, "check": False}
        done = run(command, cwd=scratch, env=os.environ | _QUIET, **how)
        if done.returncode or not found.exists():
            said = done.stderr.strip().splitlines()
            reason = said[-1] if said else f"it ended with status {done.returncode}"
            place = asked.get("file") or asked["folder"]
            raise RuntimeError(f"{software} can't read {place}: {reason}")
        return Reading(**torch.load(found, weights_only=True))


def _main(given: str, found: str) -> None:
    sys.modules["rotlib"] = None  # from here on importing it fails, wherever it is installed
    asked = torch.load(given, weights_only=True)
    windows = asked["windows"]
    if windows is None:
        windows = torch.empty(0, 2, dtype=torch.long)
    read = _transformers if asked["software"] == "transformers" else _llama_cpp
    software, logits_of, text = read(asked, windows)
    losses, kept = [], []
    for ids in windows:
        logits = logits_of(ids)
        losses.append(F.cross_entropy(logits[:-1], ids[1:]).item())
        kept.append(logits[-(asked["keep"] or len(ids)) :].clone())
    perplexity = exp(fmean(losses)) if losses else float("nan")
    logits = torch.stack(kept) if kept else None
    reading = {"software": software, "perplexity": perplexity, "logits": logits, "text": text}
    torch.save(reading, found)


def _transformers(asked: dict, windows: Tensor) -> tuple[str, Callable[[Tensor], Tensor], str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    how = {"gguf_file": asked["gguf_file"]} if asked["gguf_file"] else {}
    how["trust_remote_code"] = False
    model = AutoModelForCausalLM.from_pretrained(asked["folder"], dtype=torch.float32, **how)
    model.eval().requires_grad_(False)
    needed = 1.3 * sum(p.nbytes for p in model.parameters())
    fits = torch.cuda.is_available() and needed < torch.cuda.mem_get_info()[0]
    model.to("cuda" if fits else "cpu")
    text = ""
    if asked["prompt"]:
        tokenizer = AutoTokenizer.from_pretrained(asked["folder"], **how)
        ids = tokenizer(asked["prompt"], return_tensors="pt").to(model.device)
        tokens = model.generate(**ids, max_new_tokens=asked["new_tokens"], do_sample=False)[0]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
    name = "transformers, dequantized" if asked["gguf_file"] else "transformers"

    def logits_of(ids: Tensor) -> Tensor:
        return model(ids[None].to(model.device)).logits[0].cpu()

    return f"{name} ({version('transformers')})", logits_of, text


def _llama_cpp(asked: dict, windows: Tensor) -> tuple[str, Callable[[Tensor], Tensor], str]:
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    model = Llama(
        asked["file"],
        n_ctx=windows.shape[1],
        logits_all=True,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=-1,
        verbose=False,
    )

    def logits_of(ids: Tensor) -> Tensor:
        model.reset()
        model.eval(ids.tolist())
        return torch.from_numpy(model.scores[: len(ids)].copy()).float()

    return f"llama.cpp (llama-cpp-python {version('llama-cpp-python')})", logits_of, ""


if __name__ == "__main__":
    _main(*sys.argv[1:])
