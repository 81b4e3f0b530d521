"""rotlib: rotate large language models before quantizing them.

OptRot (arXiv 2512.24124), GSR (arXiv 2505.03810) and their peers. The names below are public; each
is imported from its module when it is first used, so that `import rotlib` costs nothing.
"""

from importlib import import_module

_PUBLIC = {
    "checkpoints.write": ("export",),
    "learning.network": ("LearningFailed",),
    "learning.optrot": ("kurtail", "mixed", "optrot"),
    "learning.optrot_plus": ("optrot_plus",),
    "learning.ostquant": ("klt_rotation", "ostquant"),
    "learning.spinquant": ("spinquant",),
    "learning.tuning": ("Tuning", "tune"),
    "measure.fidelity": ("evaluate", "kl_divergence", "perplexity"),
    "measure.slopes": ("slope_agreement",),
    "measure.weights": ("group_spread", "incoherence", "kurtosis"),
    "measure.zeroshot": ("TASK_LISTS", "ZeroShot", "zero_shot"),
    "models.marks": ("is_rotated",),
    "models.reference": ("Reference",),
    "models.text": ("load_tokens", "windows"),
    "quantization.activations": ("PROTOCOLS", "ActivationQuant", "quantized_activations"),
    "quantization.gptq": ("Report", "gptq"),
    "quantization.grids": ("QuantizedWeight", "WeightQuant"),
    "quantization.quantized": ("restore", "rtn"),
    "rotations.drawn": ("gsr_rotation", "hadamard_rotation", "random_rotation"),
    "rotations.files": ("load_rotation", "save_rotation"),
    "rotations.fuse": ("fuse",),
    "rotations.hadamard": ("BlockHadamard", "apply_hadamard", "hadamard", "walsh"),
    "rotations.online": ("load",),
    "rotations.rotation": ("SITES", "Rotation"),
    "study.checkpoint": ("export_recipe",),
    "study.diagnostics": (
        *("bounds", "compare_outliers", "groups", "outliers", "slopes", "zero_shot_of"),
    ),
    "study.own": ("register_rotation",),
    "study.pipeline": ("build", "make_rotation", "run", "run_all"),
    "study.recipe": ("Recipe",),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'rotlib' has no attribute {name!r}")
    value = getattr(import_module(f"rotlib.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
