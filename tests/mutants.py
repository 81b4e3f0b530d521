"""Changes to numeric code, each run in a process of its own: which stages compute something else?

`python tests/mutants.py` prints a JSON object, {name: [stages that drift]}. Torch and transformers
are imported once; every mutant is a fork that imports a rotlib whose source has been edited on the
way, and asks its canaries.
"""

import json
import os
import sys
from importlib.machinery import PathFinder, SourceFileLoader
from inspect import getsource

# name: (module, what stands there, what a mutant has instead)
MUTANTS = {
    "clip norm": ("quantization.grids", "CLIP_NORM = 2.4", "CLIP_NORM = 2.5"),
    "clip factors": ("quantization.grids", 'device="cpu") / 100', 'device="cpu") / 101'),
    "search steps": ("quantization.grids", "range(0, 80, 8)", "range(0, 80, 10)"),
    "unclipped step": ("quantization.grids", '"half": 0.5', '"half": 0.25'),
    "zero point not rounded": ("quantization.grids", "scale, 1)).round()", "scale, 1))"),
    "range excludes zero": ("quantization.grids", ".clamp(max=0) * factor", " * factor"),
    "E2M1's steps": ("quantization.fp4", "(size >= 2) + (size >= 4)", "(size >= 2)"),
    "MXFP4 rounds up from 6": ("quantization.fp4", "(FP4_LARGEST / 7)", "(FP4_LARGEST / 6)"),
    "NVFP4's room": ("quantization.fp4", "torch.finfo(E4M3).max / 2", "torch.finfo(E4M3).max"),
    "E4M3 forgotten": ("quantization.fp4", ".to(E4M3).to(scale.dtype)", ".to(scale.dtype)"),
    "default bits": ("quantization.grids", "bits: int = 4", "bits: int = 3"),
    "damping": ("quantization.hessian", "DAMPING = 0.01", "DAMPING = 0.02"),
    "damping ladder": ("quantization.hessian", "(1, 10, 100)", "(1, 2, 100)"),
    "H not symmetric": ("quantization.hessian", "lower + lower.tril(-1).T", "lower"),
    "pivots unsquared": ("quantization.hessian", ".flip(-1).square()", ".flip(-1)"),
    "slope transposed": ("quantization.hessian", "V.mT @ V", "V @ V.mT"),
    "norm gain kept": ("quantization.hessian", "if hasattr(module, ", "if not hasattr(module, "),
    "error's sign": ("quantization.solver", "U.T[to, done] @ E[done]", "-U.T[to, done] @ E[done]"),
    "strip off by one": ("quantization.solver", "U[:j, j] @ E[:j]", "U[1:j, j] @ E[1:j]"),
    "GPTAQ within a strip": ("quantization.solver", "x += P[:j, j]", "x -= P[:j, j]"),
    "act-order ascending": ("quantization.solver", "descending=True", "descending=False"),
    "stale groups": (
        "quantization.solver",
        "updated = X[j : j + group].T",
        "updated = X[:group].T",
    ),
    "GPTAQ's sign": ("quantization.solver", "else rounding - P.T", "else rounding + P.T"),
    "GPTAQ's triangle": ("quantization.solver", ".triu(1) @ U", ".triu(0) @ U"),
    "drift backwards": (
        "quantization.gptq",
        "(original - read).T @ read",
        "(read - original).T @ read",
    ),
    "experts get others' tokens": ("models.joined", "chosen == number", "chosen >= number"),
    "experts' weights": ("models.joined", "* weights[token, place, None]", ""),
    "a router's gain": (
        "rotations.rotation",
        '["mlp_norm"].weight\n            yield',
        '["attention_norm"].weight\n            yield',
    ),
    "sign of a signed scale": ("quantization.grids", "largest, -largest,", "largest, largest,"),
    "widths": ("quantization.solver", "(1.0, 0.85", "(1.0, 0.8"),
    "worst rows": ("quantization.solver", ".argmin(dim=0)", ".argmax(dim=0)"),
    "descent uphill": ("quantization.coordinate", "codes[j] - G[j]", "codes[j] + G[j]"),
    "descent's drift": ("quantization.coordinate", "G -= W @ C", "G += W @ C"),
    "refit's system": ("quantization.refit", "left[:, g] =", "left[:, g] = 2 *"),
    "refit's drift": ("quantization.refit", "W @ (H + C)", "W @ (H - C)"),
    "refit of worse rows": ("quantization.refit", "found, W, H, C) <", "found, W, H, C) >"),
    "descent blind": ("quantization.coordinate", "G += H[:, here] @ change", "G += 0 * G"),
    "dead inputs": ("quantization.solver", "W[:, dead] = 0.0", "W[:, dead] = 1.0"),
    "clip by bits": ("quantization.activations", "1 - 2 ** (1 - self", "1 - 2 ** (2 - self"),
    "QuaRot's clip": ("quantization.activations", "clip=0.9,", "clip=0.95,"),
    "cache's clip": (
        "quantization.activations",
        "o_per_head=False, kv_clip=0.95",
        "o_per_head=False, kv_clip=1.0",
    ),
    "sinks rounded": (
        "quantization.activations",
        "x[..., :sinks, :], rounded",
        "rounded[..., :sinks, :], rounded",
    ),
    "QR's signs": ("rotations.drawn", "return Q * R.diagonal().sign()", "return Q"),
    "signs on the output": (
        "rotations.hadamard",
        "x = x if self.signs is None else",
        "x = x if True else",
    ),
    "no Gray code": ("rotations.hadamard", "{s ^ s >> 1:0", "{s:0"),
    "Paley's border": ("rotations.hadamard", "bordered[1:, 0] = -1", "bordered[1:, 0] = 1"),
    "dropped transpose": (
        "rotations.rotation",
        "times(times(W, reads).mT, writes).mT",
        "times(times(W, reads), writes)",
    ),
    "a site's side": (
        "rotations.rotation",
        '"o": Site(reads="R2", writes="R1"',
        '"o": Site(reads="R2", writes=None',
    ),
    "scale's power": ("rotations.rotation", '("up", -1)', '("up", 1)'),
    "R3 on queries alone": ("rotations.online", "apply_hadamard(key), value", "key, value"),
    "gradient of third powers": (
        "learning.sampling",
        "rotated.square().mul_(rotated)",
        "rotated.square()",
    ),
    "factor of four": ("learning.sampling", "gradient = 4 * pull", "gradient = 3 * pull"),
    "draw ∝ cubes": ("learning.sampling", "power: int = 4", "power: int = 3"),
    "batch": ("learning.sampling", "BATCH = 8192", "BATCH = 4096"),
    "momentum": ("learning.descent", "MOMENTUM = 0.9", "MOMENTUM = 0.95"),
    "Cayley's half": ("learning.descent", "eye - S / 2", "eye - S"),
    "projection": ("rotations.rotation", "1.5 * R - 0.5", "1.4 * R - 0.4"),
    "fixed point": ("learning.descent", "ITERATIONS = 5", "ITERATIONS = 4"),
    "850 steps": ("learning.optrot", "(learn_sampled, 850)", "(learn_sampled, 800)"),
    "cosine to linear": (
        "learning.optrot",
        "0.5 * (1 + math.cos(math.pi * step / steps))",
        "1 - step / steps",
    ),
    "R2's turns": ("learning.optrot", "R2_EVERY = 16", "R2_EVERY = 8"),
    "tokens sampled": ("learning.objectives", "TOKENS = 2048", "TOKENS = 1024"),
    "share swapped": (
        "learning.objectives",
        "((weights, 1 - share), (tokens, share))",
        "((weights, share), (tokens, 1 - share))",
    ),
    "random's kurtosis": ("learning.objectives", "return 3 / (b + 2)", "return 3 / (b + 1)"),
    "group's root": (
        "learning.grouped",
        ".sum(axis, keepdim=True).sqrt()",
        ".sum(axis, keepdim=True)",
    ),
    "bound's root": ("learning.optrot_plus", "(m / n * fourth) ** 0.5", "(n / m * fourth) ** 0.5"),
    "refresh": ("learning.optrot_plus", "REFRESH = 4", "REFRESH = 2"),
    "clip searched anew": ("learning.network", "if linear not in self._clip:", "if True:"),
    "carry back twice": (
        "learning.network",
        "for _, gradient in met]",
        "for _, gradient in met[::-1]]",
    ),
    "paper preset": ("learning.spinquant", '"paper": Preset(100,', '"paper": Preset(120,'),
    "top tokens": ("learning.ostquant", "TOP = 1000", "TOP = 100"),
    "KL reversed": (
        "learning.ostquant",
        "logp.exp() * (logp - logq)",
        "logq.exp() * (logq - logp)",
    ),
    "scales' rate": ("learning.ostquant", "SCALE_LR = 0.01", "SCALE_LR = 0.02"),
    "last position": ("models.walk", "[0, :-1], x.device", "[0, 1:], x.device"),
    "mean over windows": ("measure.fidelity", "sums / len(labels)", "sums / len(ids)"),
    "KL's direction": (
        "measure.fidelity",
        "F.kl_div(logprobs, target",
        "F.kl_div(target, logprobs",
    ),
    "kurtosis over all": ("measure.weights", "W.pow(4).mean(dim=1)", "W.pow(4).mean()"),
    "levels": ("measure.bounds", "(2**quant.bits - 1) ** 2", "(2**quant.bits) ** 2"),
    "sinks' kurtosis": ("measure.outliers", "kurtosis(args[0][:, 0])", "kurtosis(args[0][:, 1])"),
    "items' choices": ("measure.offline_tasks", "CHOICES = 4", "CHOICES = 5"),
    "windows from the end": ("models.text", "return cut[:count]", "return cut[-count:]"),
    "a recipe's default": (
        "study.recipe",
        "calibration_windows: int = 16",
        "calibration_windows: int = 32",
    ),
}

# rewritings that compute the same
REFACTORS = {
    "a helper renamed": ("quantization.gptq", "_quantize_together", "_quantize_stage"),
    "a local renamed": ("quantization.solver", "carried(", "handed_on("),
    "another block of GPTQ's": ("quantization.solver", "BLOCK = 128", "BLOCK = 64"),
    "another strip": ("quantization.solver", "_STRIP = 32", "_STRIP = 16"),
    "another block of H": ("quantization.hessian", "_BLOCK = 384", "_BLOCK = 96"),
    "smaller chunks": ("quantization.grids", '"cpu": 2**19', '"cpu": 2**8'),
    "another error text": ("quantization.quantized", "already quantized:", "quantized before:"),
    "a docstring": ("rotations.fuse", "Fold the norms, untie", "Untie the head, fold the norms"),
    "terms reordered": (
        "rotations.rotation",
        "(R @ R.mT - torch.eye",
        "(-torch.eye(R.shape[-1], dtype=R.dtype, device=R.device) + R @ R.mT - 0 * torch.eye",
    ),
    "logits in other chunks": ("measure.fidelity", "CHUNK = 128", "CHUNK = 7"),
    "fewer tokens at a time": ("models.walk", "BATCH_TOKENS = 16384", "BATCH_TOKENS = 24"),
    "another spelling": (
        "learning.sampling",
        "rotated.square().mul_(rotated)",
        "(rotated * rotated * rotated)",
    ),
    "a private class renamed": ("learning.optrot_plus", "_Bound", "_Objective"),
    "a new setting": (
        "study.recipe",
        "    seed: int = 0",
        "    seed: int = 0\n    future: bool = False",
    ),
}


class Edited(SourceFileLoader):
    """Loads a module from its source with some edits, past the cache of compiled files."""

    edits: dict[str, list[tuple[str, str]]]

    def get_code(self, fullname: str):
        source = self.get_data(self.path).decode()
        for old, new in self.edits.get(fullname, ()):
            assert old in source, f"{fullname} has no {old!r}"
            source = source.replace(old, new)
        return self.source_to_code(source.encode(), self.path)


class Finder:
    """Finds the modules that are edited."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if fullname not in Edited.edits:
            return None
        spec = PathFinder.find_spec(fullname, path)
        spec.loader = Edited(fullname, spec.origin)
        return spec


def drifting(edits: list[tuple[str, str, str]], first: bool) -> list[str]:
    """The stages that drift, or the first of them, in a fork with these edits.

    Those whose canary names the module come first.
    """
    read, write = os.pipe()
    if child := os.fork():
        os.close(write)
        with os.fdopen(read) as pipe:
            found = pipe.read()
        os.waitpid(child, 0)
        return json.loads(found) if found else ["(it can't be imported, or its canaries fail)"]
    os.close(read)
    Edited.edits = {}
    for module, old, new in edits:
        Edited.edits.setdefault(f"rotlib.{module}", []).append((old, new))
    sys.meta_path.insert(0, Finder)
    found = []
    try:
        from rotlib.study import numerics
        from rotlib.study.canaries import CANARIES

        module = edits[0][0].split(".")[1]
        for stage in sorted(
            CANARIES, key=lambda stage: module not in getsource(CANARIES[stage].numbers)
        ):
            try:
                drift = numerics.drift(stage)
            except Exception as error:  # a mutant that falls over is seen as well
                drift = str(error)
            if drift:
                found.append(stage)
                if first:
                    break
        with os.fdopen(write, "w") as pipe:
            json.dump(found, pipe)
    finally:
        os._exit(0)


def main() -> None:
    import geoopt  # noqa: F401 - what rotlib imports, once for all forks
    import matplotlib  # noqa: F401
    import torch
    import transformers
    from transformers import LlamaForCausalLM, Qwen3ForCausalLM  # noqa: F401
    from transformers.integrations import sdpa_attention  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found = {name: drifting([mutant], first=True) for name, mutant in MUTANTS.items()}
    found["all refactors"] = drifting(list(REFACTORS.values()), first=False)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
