"""rotlib: rotate large language models before quantizing them (OptRot, arXiv 2512.24124; GSR, arXiv 2505.03810)."""

from rotlib.activations import PROTOCOLS, ActivationQuant, quantized_activations
from rotlib.bounds import bounds
from rotlib.export import export, export_recipe
from rotlib.fixed import gsr_rotation, hadamard_rotation, random_rotation
from rotlib.fuse import fuse, is_rotated
from rotlib.gptq import Report, gptq
from rotlib.groups import group_spread, groups
from rotlib.hadamard import BlockHadamard, apply_hadamard, hadamard, walsh
from rotlib.measure import Reference, evaluate, incoherence, kl_divergence, kurtosis, perplexity
from rotlib.network import LearningFailed
from rotlib.optrot import kurtail, mixed, optrot
from rotlib.optrot_plus import optrot_plus
from rotlib.ostquant import ostquant
from rotlib.outliers import compare_outliers, outliers
from rotlib.pipeline import build, make_rotation, run, run_all
from rotlib.quant import QuantizedWeight, WeightQuant, restore, rtn
from rotlib.recipe import Recipe
from rotlib.rotation import SITES, Rotation
from rotlib.slopes import slope_agreement
from rotlib.spinquant import spinquant
from rotlib.text import load_tokens, windows
from rotlib.zeroshot import TASK_LISTS, ZeroShot, zero_shot, zero_shot_of
from rotlib.zoo import load

__all__ = [
    "PROTOCOLS",
    "SITES",
    "TASK_LISTS",
    "ActivationQuant",
    "BlockHadamard",
    "LearningFailed",
    "QuantizedWeight",
    "Recipe",
    "Reference",
    "Report",
    "Rotation",
    "WeightQuant",
    "ZeroShot",
    "apply_hadamard",
    "bounds",
    "build",
    "compare_outliers",
    "evaluate",
    "export",
    "export_recipe",
    "fuse",
    "gptq",
    "group_spread",
    "groups",
    "gsr_rotation",
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
    "optrot_plus",
    "ostquant",
    "outliers",
    "perplexity",
    "quantized_activations",
    "random_rotation",
    "restore",
    "rtn",
    "run",
    "run_all",
    "slope_agreement",
    "spinquant",
    "walsh",
    "windows",
    "zero_shot",
    "zero_shot_of",
]
