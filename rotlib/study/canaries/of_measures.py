"""Evaluation and every diagnostic."""

from hashlib import sha256

import numpy as np
import torch

from rotlib.measure import bounds, fidelity, offline_tasks, outliers, slopes, weights, zeroshot
from rotlib.models.reference import Reference
from rotlib.models.supported import adapt
from rotlib.quantization import grids
from rotlib.rotations import drawn
from rotlib.study.canaries.inputs import WORDS, noise, profile, tiny, token_windows
from rotlib.study.canaries.register import canary


@canary("evaluation", tolerance=1e-4)
def _evaluation() -> dict:
    model, other, ids = tiny(torch.float32), tiny(torch.float32), token_windows(2, 20)
    other.model.layers[1].mlp.down_proj.weight.mul_(0.7)
    found = fidelity.evaluate(other, ids, Reference(model, ids))
    stream = ids.flatten()
    return {
        "cross-entropy": found.cross_entropy,
        "reference": found.reference_cross_entropy,
        "kl": found.kl,
        "means": [found.perplexity, found.reference_perplexity, found.kl_divergence],
        "perplexity": fidelity.perplexity(model, stream, window=8),
        "kl of a stream": fidelity.kl_divergence(model, other, stream, window=8),
    }


@canary("outliers", edges=outliers.HISTOGRAM_EDGES, windows=outliers.WINDOWS)
def _outliers() -> dict:
    family = adapt(tiny())
    inputs = outliers.input_outliers(family, token_windows())
    return {
        "weights": [list(line.values())[2:] for line in outliers.weight_outliers(family)],
        "inputs": [list(values.values()) for values in inputs.values()],
        "histogram": outliers.weight_histogram(family)[:16],
        "kurtosis": weights.kurtosis(noise(3, 40)),
        "incoherence": weights.incoherence(noise(3, 40)),
    }


@canary("bounds", tolerance=5e-3, ties=("edge_codes", "rtn_error"))
def _bounds() -> dict:
    family, numbers = adapt(tiny()), {}
    turned = drawn.hadamard_rotation(family.model, R4=True)
    for of, convention in (("", "half"), ("full, ", "full")):
        quant = grids.WeightQuant(bits=8, convention=convention)
        lines = bounds.module_bounds(family, turned, token_windows(8, 24), quant, every=2)
        numbers |= {f"{of}{name}": [line[name] for line in lines] for name in lines[0]}
    return numbers


@canary("group spread", shown_layer=weights.SHOWN_LAYER)
def _group_spread() -> dict:
    flat = weights.group_spread(torch.ones(2, 8), 4)
    return {"noise": weights.group_spread(noise(6, 24).pow(3), 8), "flat": flat}


@canary("slopes", slopes.slope_agreement, tolerance=1e-2, ties=("slopes", "agreement"))
def _slopes() -> dict:
    model, numbers = tiny(torch.float32), {}
    for name, convention in (("", "half"), ("full, ", "full")):
        quant = grids.WeightQuant(bits=8, convention=convention)
        found = slopes.slopes(adapt(model), token_windows(3), quant, None)
        numbers[f"{name}slopes"] = [profile(slope) for slope in found]
        numbers[f"{name}agreement"] = slopes.slope_agreement(model, token_windows(3), quant)
    return numbers


@canary(
    "zero-shot",
    zeroshot.zero_shot,
    lists=zeroshot.TASK_LISTS,
    items=zeroshot.ITEMS,
    metric=offline_tasks.METRIC,
    choices=offline_tasks.CHOICES,
    wrong=offline_tasks.WRONG,
    short=offline_tasks.SHORT,
    away=offline_tasks.AWAY,
)
def _zero_shot() -> dict:
    draw = np.random.RandomState(3)

    def sentence(length: int) -> str:
        chosen = [WORDS[i] for i in draw.randint(0, len(WORDS), length)]
        return f"{' '.join(chosen).capitalize()}."

    paragraphs = [" ".join(sentence(int(n)) for n in draw.randint(8, 24, 5)) for _ in range(90)]
    corpus = "A heading\n\n" + "\n\n".join(paragraphs)
    made = {task: offline_tasks.items_of(task, corpus) for task in offline_tasks.METRIC}
    numbers = {f"{task}, items": len(items) for task, items in made.items()}
    numbers |= {task: sha256(str(items[:20]).encode()).hexdigest() for task, items in made.items()}
    found = {"a": {"acc,none": 0.5}, "b": {"acc,none": 0.2, "acc_norm,none": 0.75}}
    scored = zeroshot.scored("mine", found, {"a": [4, 4, 1], "b": [2] * 9})
    return numbers | {"scored": scored.metrics, "names": zeroshot.task_names("eight")}
