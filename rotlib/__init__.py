"""rotlib: rotate large language models before quantizing them (OptRot, arXiv 2512.24124; GSR, arXiv 2505.03810)."""

from rotlib.activations import PROTOCOLS, ActivationQuant, quantized_activations
from rotlib.fuse import fuse, is_rotated
from rotlib.gptq import Report, gptq
from rotlib.hadamard import apply_hadamard, hadamard
from rotlib.measure import Reference, evaluate, incoherence, kl_divergence, kurtosis, perplexity
from rotlib.optrot import kurtail, mixed, optrot
from rotlib.outliers import compare_outliers, outliers
from rotlib.pipeline import make_rotation, run, run_all
from rotlib.quant import QuantizedWeight, WeightQuant, restore, rtn
from rotlib.recipe import Recipe
from rotlib.rotation import SITES, Rotation, hadamard_rotation, random_rotation
from rotlib.text import load_tokens, windows
from rotlib.zoo import load

__all__ = [
    "PROTOCOLS",
    "SITES",
    "ActivationQuant",
    "QuantizedWeight",
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
    "kurtail",
    "kurtosis",
    "load",
    "load_tokens",
    "make_rotation",
    "mixed",
    "optrot",
    "outliers",
    "perplexity",
    "quantized_activations",
    "random_rotation",
    "restore",
    "rtn",
    "run",
    "run_all",
    "windows",
]
