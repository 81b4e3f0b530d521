"""What a machine with a GPU is asked for, in the order of worth.

The command is ``python -m rotlib.study.gpu --minutes 9 --out FOLDER``. A phase writes what it has
found into ``FOLDER/<phase>.json`` line by line, so a machine that is taken away costs the line at
work, and the same command goes on with the phases that this commit hasn't completed there. Nothing
is read from the network, and the first two phases need no model's file:

- ``parity``: every stage of the computation on the device, against `numerics.json`, which was made
  on a CPU; the exactness gate; a model kept on the host against one that the device holds.
- ``stages``: seconds and peak memory of each stage on a random model of a real one's shape.
- ``study``: the recipes of configs/sweeps/gpu.yaml, whose results go into ``FOLDER/results``.
- ``streamed``: the stages again, of a model that is kept on the host.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rotlib.checks import positive, whole_number
from rotlib.disk import ROOT, write_json
from rotlib.learning.optrot import optrot
from rotlib.measure.fidelity import evaluate
from rotlib.models.reference import Reference
from rotlib.models.walk import norms_in_model_dtype
from rotlib.models.zoo import pick_device
from rotlib.precision import float32_everywhere
from rotlib.quantization.gptq import gptq
from rotlib.quantization.grids import WeightQuant
from rotlib.quantization.quantized import rtn
from rotlib.quantization.solver import Solver
from rotlib.rotations.drawn import hadamard_rotation
from rotlib.rotations.fuse import fuse
from rotlib.rotations.online import write_no_scores
from rotlib.study import memory, numerics, store
from rotlib.study.canaries import CANARIES, Canary, covariance, inputs_on, noise
from rotlib.study.pipeline import run
from rotlib.study.recipe import Recipe
from rotlib.study.sweep_file import read_sweep

SWEEP = ROOT / "configs" / "sweeps" / "gpu.yaml"


class Shape(NamedTuple):
    """A model's shape and the text that its stages are measured on."""

    config: dict
    window: int
    calibration_windows: int
    test_windows: int
    steps: int | None = None  # OptRot's own


def _llama(vocabulary: int, width: int, wide: int, layers: int, heads: int, kv_heads: int) -> dict:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }


SHAPES = {
    "tiny": Shape(_llama(96, 64, 112, 2, 4, 2), 32, 4, 2),
    "smollm2-135m": Shape(_llama(49152, 576, 1536, 30, 9, 3), 1024, 16, 8),
    "qwen2.5-0.5b": Shape(_llama(151936, 896, 4864, 24, 14, 2), 1024, 16, 8),
    "llama-3.2-1b": Shape(_llama(128256, 2048, 8192, 16, 32, 8), 2048, 128, 141),
    "llama-3.1-8b": Shape(_llama(128256, 4096, 14336, 32, 32, 8), 2048, 128, 141),
}
_SMALL = _llama(512, 576, 1536, 3, 9, 3)


class Job(NamedTuple):
    """What a phase is to do."""

    device: torch.device
    shape: Shape
    out: Path
    time_is_up: Callable[[], bool]


Line = dict[str, object]  # one finding, with its name


def main(arguments: list[str] | None = None) -> bool:
    """Whether every phase asked for is complete."""
    parser = argparse.ArgumentParser(
        prog="python -m rotlib.study.gpu",
        description="Measure what a machine with a GPU is asked for, in the order of worth.",
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing after that")
    parser.add_argument("--out", type=Path, required=True, help="the folder of what is found")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--phases", nargs="+", action="extend", choices=PHASES)
    parser.add_argument("--shape", choices=SHAPES, help="of the stages; the largest on a GPU")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--steps", type=int, help="fewer steps than OptRot's own")
    parser.add_argument(
        "--windows", type=int, nargs=2, metavar=("N", "M"), help="of calibration and of test text"
    )
    options = parser.parse_args(arguments)
    try:
        positive("--minutes", options.minutes)
        shorter = [("--layers", options.layers), ("--steps", options.steps)]
        shorter += [("--windows", number) for number in options.windows or ()]
        for name, number in shorter:
            if number is not None:
                whole_number(name, number, 1)
        end = time.monotonic() + 60 * options.minutes
        device = _picked(options.device)
        out = options.out.resolve()
        out.mkdir(parents=True, exist_ok=True)
        for phase in options.phases or PHASES:
            _written(out / f"{phase}.json")
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--out must name a folder, not {options.out} ({error.strerror})")
    shape = SHAPES[options.shape or ("tiny" if device.type == "cpu" else "llama-3.1-8b")]
    if options.layers:
        shape = shape._replace(config=shape.config | {"num_hidden_layers": options.layers})
    if options.windows:
        calibration, test = options.windows
        shape = shape._replace(calibration_windows=calibration, test_windows=test)
    shape = shape._replace(steps=options.steps)
    job = Job(device, shape, out, lambda: time.monotonic() > end)
    os.environ["ROTLIB_RESULTS"] = str(out / "results")
    return all(_done(phase, job) for phase in options.phases or PHASES)


def _written(path: Path) -> dict | None:
    """What a phase has written so far.

    Raises ValueError for a file in its place that no phase has written.
    """
    if not path.exists():
        return None
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if isinstance(found, dict) and {"machine", "lines", "complete"} <= found.keys():
            return found
    raise ValueError(f"{path} holds something else than a phase's lines: name another folder")


def _picked(name: str) -> torch.device:
    """A device by its name; raises ValueError, with torch's reason, where "auto" finds no GPU."""
    if name == "auto" and not torch.cuda.is_available():
        try:
            torch.cuda.init()
            reason = "there is none"
        except (RuntimeError, AssertionError) as error:  # a CPU build, or a driver that is too old
            reason = str(error).splitlines()[0]
        raise ValueError(
            f"torch sees no GPU here ({reason}): --device cpu runs the phases on the CPU, "
            "the stages on a tiny model"
        )
    return pick_device(name)


def _done(phase: str, job: Job) -> bool:
    """Run a phase, writing after each of its lines; False where time was up before its end."""
    path, machine = job.out / f"{phase}.json", _machine(job.device)
    before = _written(path)
    if before and before == before | {"machine": machine, "complete": True}:
        print(f"{phase}: complete")
        return True
    if job.time_is_up():
        print(f"{phase}: not begun, the time is up")
        return False
    found = {"machine": machine, "lines": [], "complete": False}
    for line in PHASES[phase](job):
        found["lines"].append(line)
        write_json(path, found)
        print(f"{phase}: {json.dumps(line)}", flush=True)
        if job.time_is_up():
            print(f"{phase}: the time is up")
            return False
    write_json(path, found | {"complete": True})
    return True


def _machine(device: torch.device) -> Line:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "torch": str(torch.__version__), "commit": store.commit()}


# --- parity ---------------------------------------------------------------------------------------


def parity(job: Job) -> Iterator[Line]:
    """How far the device's numbers are from the CPU's, and TF32's from float32's."""
    with float32_everywhere():
        for stage, canary in CANARIES.items():
            yield _agreement(stage, canary, job.device)
        yield {"name": "exactness, float64", "difference": _exactness(job.device)}
        yield from _against_the_cpu(job.device)
    yield from _coarse_against_float32(job.device)


def _agreement(stage: str, canary: Canary, device: torch.device) -> Line:
    start = time.perf_counter()
    line = {"name": stage, "tolerance": canary.tolerance}
    try:
        with inputs_on(device):
            numbers = canary.numbers()
    except Exception as error:  # the other stages are still worth knowing
        return line | {"error": f"{type(error).__name__}: {error}"}
    expected = numerics.entries()[stage]["numbers"]
    apart = {name: numerics.distance(numbers.get(name), value) for name, value in expected.items()}
    ties = {name: apart.pop(name) for name in [*apart] if name.startswith(canary.ties)}
    worst = max(apart, key=apart.get)
    line |= {"difference": apart[worst], "of": worst} | ({"ties": ties} if ties else {})
    return line | {"seconds": round(time.perf_counter() - start, 2)}


def _exactness(device: torch.device) -> float:
    """The largest change of a logit, by fusing R1, R2, R3 and R4 in float64, over the largest."""
    model = _random_model(_SMALL, device, torch.float64)
    ids = _tokens(model, 2, 64).to(device)
    with torch.no_grad(), norms_in_model_dtype(model):
        before = model(ids).logits
        fuse(model, hadamard_rotation(model, R3=True, R4=True))
        return ((model(ids).logits - before).abs().max() / before.abs().max()).item()


def _against_the_cpu(device: torch.device) -> Iterator[Line]:
    """GPTQ of one weight; then a small model on the CPU, on the device, kept on the host for it.

    GPTQ of a whole model isn't compared code by code: one that falls otherwise changes what all
    later ones make up for.
    """
    codes, error = _solved(torch.device("cpu"))
    its_codes, its_error = _solved(device)
    differ = (its_codes != codes).float().mean().item()
    yield {"name": "codes of one weight that differ", "difference": differ}
    yield {"name": "error of one weight", "difference": abs(its_error / error - 1)}
    found = {}
    for where in ("cpu", "device", "streamed"):
        model = _random_model(_SMALL, torch.device("cpu"))
        if where == "device":
            model.to(device)
        if where == "streamed":
            model.rotlib_device = device
            write_no_scores(model)
        ids = _tokens(model, 8, 128)
        reference = Reference(model, ids[:2])
        fuse(model, hadamard_rotation(model, R4=True))
        fused = evaluate(model, ids[:2], reference).cross_entropy
        report = gptq(model, ids, WeightQuant(bits=4), asymmetry=0.25)
        errors = [module.error for module in report.modules]
        found[where] = {
            "cross-entropy, fused": fused,
            "error of layers.0.q": errors[0],
            "mean error of layers": sum(errors) / len(errors),
            "KL after GPTQ": evaluate(model, ids[:2], reference).kl_divergence,
        }
    for where in ("device", "streamed"):
        for name, value in found[where].items():
            apart = numerics.distance(value, found["cpu"][name])
            yield {"name": f"{name}, {where}", "difference": apart}


def _solved(device: torch.device) -> tuple[torch.Tensor, float]:
    """(codes, error) of one weight in groups, whose inputs' covariance has a long tail."""
    H, W = covariance(576).float().to(device), noise(512, 576).float().to(device)
    Q, error, _, _ = Solver(WeightQuant(group_size=64))(W, H)
    return Q.codes.cpu(), error.sum().item()


def _coarse_against_float32(device: torch.device) -> Iterator[Line]:
    """What the products' precision changes in an evaluation."""
    model = _random_model(_SMALL, device)
    ids = _tokens(model, 2, 256)
    found = []
    for precision in (float32_everywhere(), nullcontext()):
        with precision:
            reference = Reference(model, ids)
            rounded = deepcopy(model)
            rtn(rounded, WeightQuant(bits=4))
            found.append(evaluate(rounded, ids, reference))
    for name in ("cross_entropy", "kl"):
        exact, coarse = (getattr(one, name) for one in found)
        yield {"name": f"{name}, TF32", "difference": numerics.distance(coarse, exact)}


# --- stages ---------------------------------------------------------------------------------------


def streamed(job: Job) -> Iterator[Line]:
    """The stages of a model that stays on the host, and goes to the device a layer at a time."""
    return stages(job, on_host=True)


def stages(job: Job, on_host: bool = False) -> Iterator[Line]:
    """Seconds and peak memory of every stage, beside what `--dry-run` would say."""
    shape, device = job.shape, job.device
    recipe = _recipe(shape)
    done: dict[str, object] = {}

    def measured(
        name: str,
        stage: Callable[[], object],
        of: str = "",
        of_recipe: Recipe = recipe,
        **told: Callable,
    ) -> Line:
        """Run a stage; one that fails is a line as well, and the next may still run."""
        line = {"name": name}
        if of:
            peak = memory.peak_of(of_recipe, of, device, on_host)
            line["estimate_mb"] = round(peak / 2**20)
        store.reset_peak_memory(device)
        _wait(device)
        start = time.perf_counter()
        try:
            done[name] = stage()
        except RuntimeError as error:  # out of memory, say
            return line | {"error": str(error)[:500], "peak_mb": store.peak_memory_mb(device)}
        _wait(device)
        line["seconds"] = round(time.perf_counter() - start, 2)
        line["peak_mb"] = store.peak_memory_mb(device)
        return line | {what: tell(done[name]) for what, tell in told.items()}

    def drawn() -> PreTrainedModel:
        model = _random_model(shape.config, device)
        if on_host:
            model.to("cpu")
            model.rotlib_device = device
        return model

    yield measured("draw", drawn) | {
        "layers": shape.config["num_hidden_layers"],
        "windows": [shape.calibration_windows, shape.test_windows, shape.window],
    }
    model = done["draw"]
    calibration = _tokens(model, shape.calibration_windows, shape.window)
    test = _tokens(model, shape.test_windows, shape.window)
    rounded = WeightQuant(bits=4)
    yield measured("reference", lambda: Reference(model, test), "evaluate")
    yield measured(
        "optrot",
        lambda: optrot(model, steps=shape.steps),
        "rotate",
        objective=lambda rotation: [rotation.history[0], rotation.history[-1]],
    )
    rotation = done.get("optrot") or hadamard_rotation(model)
    yield measured("fuse", lambda: fuse(model, rotation), "fuse")
    yield measured(
        "gptq",
        lambda: gptq(model, calibration, rounded),
        "quantize",
        fallbacks=lambda report: report.fallbacks,
    )
    yield measured(
        "evaluate",
        lambda: evaluate(model, test, done["reference"]),
        "evaluate",
        kl=lambda evaluation: evaluation.kl_divergence,
    )
    done = {"reference": done["reference"]}
    del model
    again = fuse(drawn(), rotation)
    yield measured(
        "gptaq",
        lambda: gptq(again, calibration, rounded, asymmetry=0.25),
        "quantize",
        replace(recipe, asymmetry=0.25),
    )


def _recipe(shape: Shape) -> Recipe:
    """The recipe whose memory is estimated: of a folder that holds nothing but the config."""
    folder = tempfile.mkdtemp()
    LlamaConfig(**shape.config, dtype="float32").save_pretrained(folder)
    return Recipe(
        model=folder,
        rotation="optrot",
        window=shape.window,
        calibration_windows=shape.calibration_windows,
        test_windows=shape.test_windows,
    )


def _random_model(
    config: dict, device: torch.device, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A Llama with Gaussian weights and norms that aren't all ones, drawn where it is."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**config)).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    write_no_scores(model)
    return model.eval().requires_grad_(False)


def _tokens(model: PreTrainedModel, windows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(windows)
    return torch.randint(0, model.config.vocab_size, (windows, length), generator=generator)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- the study ------------------------------------------------------------------------------------


def study(job: Job) -> Iterator[Line]:
    """The sweep's recipes in its order, as many as there is time for."""
    for recipe in read_sweep(SWEEP):
        start = time.perf_counter()
        line = {"name": json.dumps(recipe.spec())}
        try:
            result = run(recipe, str(job.device))
        except RuntimeError as error:  # a rate at which nothing is learned
            yield line | {"error": str(error)}
            continue
        wall = round(time.perf_counter() - start, 2)
        line |= {"kl": result.metrics["kl"], "seconds": result.seconds, "wall": wall}
        yield line | {"peak_mb": result.peak_memory_mb}


PHASES = {"parity": parity, "stages": stages, "study": study, "streamed": streamed}

if __name__ == "__main__":
    main()
