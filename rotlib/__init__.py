"""rotlib: rotate large language models before quantizing them (OptRot, arXiv 2512.24124; GSR, arXiv 2505.03810)."""

from rotlib.fuse import fuse, is_rotated
from rotlib.gptq import Report, gptq
from rotlib.hadamard import apply_hadamard, hadamard
from rotlib.measure import Reference, evaluate, incoherence, kl_divergence, kurtosis, perplexity
from rotlib.optrot import optrot
from rotlib.outliers import compare_outliers, outliers
from rotlib.quant import WeightQuant, rtn
from rotlib.recipe import Recipe, make_rotation, run, run_all
from rotlib.rotation import SITES, Rotation, hadamard_rotation, random_rotation
from rotlib.text import load_tokens, windows
from rotlib.zoo import load

__all__ = [
    "SITES",
    "Recipe",
    "Reference",
    "Report",
    "Rotation",
    "WeightQuant",
    "apply_hadamard",
    "compare_outliers",
    "evaluate",
    "fuse",
    "gptq",
    "hadamard",
    "hadamard_rotation",
    "incoherence",
    "is_rotated",
    "kl_divergence",
    "kurtosis",
    "load",
    "load_tokens",
    "make_rotation",
    "optrot",
    "outliers",
    "perplexity",
    "random_rotation",
    "rtn",
    "run",
    "run_all",
    "windows",
]
