"""What other tools make of the same model and text on the same threads, beside rotlib's own.

``python -m rotlib.study.peers --environments FOLDER --out results/peers.json`` installs every peer
in an environment of its own, lets it quantize, and measures its checkpoint as rotlib's are: KL and
perplexity on the test windows of the study. A peer that fails is a line that says why. Lines of
the file that aren't asked for anew stay. It is no part of CI: it needs the package index and
minutes a peer, of TICO more than twenty.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from rotlib.disk import ROOT, check_writable, write_json
from rotlib.measure.fidelity import evaluate
from rotlib.models.reference import Reference
from rotlib.models.zoo import load_tokenizer
from rotlib.rotations.online import load
from rotlib.study import store
from rotlib.study.pipeline import calibration_tokens, run, test_tokens
from rotlib.study.recipe import QUALITIES, Recipe
from rotlib.study.suits import check_suits


class Peer(NamedTuple):
    """Another tool: what to install, and the file here that runs it there."""

    requirements: tuple[str, ...]
    file: str


PEERS = {
    "llm-compressor": Peer(("llmcompressor==0.14.0.1", "torch==2.13.0"), "peer_llm_compressor.py"),
    "TICO": Peer(("tico==0.3.0", "torch==2.13.0", "transformers==5.24.0"), "peer_tico.py"),
}
_OWN = "rotlib, "


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rotlib.study.peers",
        description="Measure what other tools make of the same model and text.",
    )
    parser.add_argument("--environments", type=Path, required=True, help="a folder for them")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file of what is found")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[*PEERS])
    parser.add_argument("--qualities", nargs="*", choices=QUALITIES, default=[*QUALITIES])
    parser.add_argument("--model", default=Recipe.model)
    parser.add_argument("--window", type=int, default=Recipe.window, help="tokens in a window")
    parser.add_argument("--bits", type=int, default=Recipe.bits)
    parser.add_argument("--group-size", type=int, help="weights that share a scale; default: a row")
    options = parser.parse_args(arguments)
    grid = {name: getattr(options, name) for name in ("model", "window", "bits", "group_size")}
    try:
        if options.out.exists() and not options.out.is_file():
            raise ValueError(f"--out must name a file, and {options.out} is none")
        check_writable(options.out.parent, "name another file with --out")
        if options.peers:
            check_writable(options.environments, "name another folder with --environments")
        recipe = Recipe(**grid)
        own = {name: Recipe.of_quality(name, **grid) for name in options.qualities}
        here = {"recipe": recipe.spec(), "threads": torch.get_num_threads()}
        found = here | {"lines": _kept_lines(options.out, here, [*own, *options.peers])}
        check_suits(recipe)
        calibration_tokens(recipe)
    except ValueError as error:
        parser.error(str(error))
    about = {"commit": store.commit(), "torch": str(torch.__version__)}
    for name, its_recipe in own.items():
        result = run(its_recipe, "cpu")
        seconds = sum(result.seconds.get(step, 0.0) for step in ("rotate", "quantize", "tune"))
        line = {"tool": f"{_OWN}{name}", "seconds": round(seconds, 1)} | about
        line |= {"peak_memory_mb": result.peak_memory_mb, "device": result.provenance["device"]}
        line |= {"windows": its_recipe.calibration_windows + its_recipe.tuning}
        found["lines"].append(line | {key: result.metrics[key] for key in ("kl", "perplexity")})
        write_json(options.out, found)
    for name in tqdm(options.peers, desc="peers", unit="peer"):
        found["lines"].append(
            {"tool": name} | about | _made_by(PEERS[name], recipe, options.environments.resolve())
        )
        write_json(options.out, found)
    print(json.dumps(found, indent=1))


def known(recipe: Recipe) -> list[dict]:
    """The lines of the committed bench of a recipe's model and grid, the nearest first."""
    for path in sorted((ROOT / "results" / "peers").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["recipe"] == recipe.spec():
            lines = [line for line in found["lines"] if "kl" in line]
            return sorted(lines, key=lambda line: line["kl"])
    return []


def _kept_lines(out: Path, here: dict, anew: list[str]) -> list[dict]:
    """An earlier call's lines of other tools.

    Raises ValueError for a file of anything else, also of another recipe or number of threads.
    """
    if not out.is_file():
        return []
    before = None
    with suppress(ValueError):
        before = json.loads(out.read_text(encoding="utf-8"))
    whole = isinstance(before, dict) and before == before | here
    whole = whole and before.keys() == {*here, "lines"} and isinstance(before["lines"], list)
    if not whole or not all(isinstance(line, dict) and "tool" in line for line in before["lines"]):
        raise ValueError(
            f"{out} holds something else than a bench of this recipe on {here['threads']} threads: "
            "name another file with --out"
        )
    names = {f"{_OWN}{name}" if name in QUALITIES else name for name in anew}
    return [line for line in before["lines"] if line["tool"] not in names]


def _made_by(peer: Peer, recipe: Recipe, environments: Path) -> dict:
    """One peer's line."""
    line = {"requirements": list(peer.requirements), "windows": recipe.calibration_windows}
    try:
        python = _environment(environments / Path(peer.file).stem, peer.requirements)
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch)
            model, _ = load(recipe.model, "cpu")
            reference = Reference(model, test_tokens(recipe))
            model.save_pretrained(place / "original")
            load_tokenizer(recipe.model).save_pretrained(place / "original")
            del model
            torch.save(calibration_tokens(recipe), place / "tokens.pt")
            files = [str(place / name) for name in ("original", "tokens.pt", "made")]
            command = [python, str(Path(__file__).parent / peer.file), *files]
            command += [str(recipe.bits), str(recipe.group_size or 0)]
            threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
            said = _output_of(command, os.environ | threads).splitlines()
            line |= dict(json.loads(said[-1] if said else "{}"))
            load_tokenizer(recipe.model).save_pretrained(place / "made")
            made, _ = load(str(place / "made"), "cpu")
            evaluation = evaluate(made, reference.windows, reference)
    except (RuntimeError, OSError, TypeError, ValueError) as error:
        return line | {"error": str(error)[-500:]}
    return line | {"kl": evaluation.kl_divergence, "perplexity": evaluation.perplexity}


def _environment(folder: Path, requirements: tuple[str, ...]) -> str:
    """The Python of an environment that holds these, made where it isn't there yet."""
    python = folder / "bin" / "python"
    if not (folder / "complete").is_file():
        _output_of([sys.executable, "-m", "venv", "--clear", str(folder)])
        _output_of([str(python), "-m", "pip", "install", "--quiet", "uv"])
        install = [str(python), "-m", "uv", "pip", "install", "--quiet", "--python", str(python)]
        _output_of([*install, *requirements], place=folder)
        (folder / "complete").touch()
    return str(python)


def _output_of(
    command: list[str], environment: dict | None = None, place: Path | None = None
) -> str:
    """What a command prints; raises RuntimeError with the end of its errors where it fails."""
    done = subprocess.run(
        command, env=environment, cwd=place, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr[-400:]}")
    return done.stdout


if __name__ == "__main__":
    main()
