"""Texts, recipes, and what runs read besides code."""

from functools import partial
from hashlib import sha256

import torch

from rotlib.disk import file_digest
from rotlib.models import names, text
from rotlib.study import recipe
from rotlib.study.canaries.register import Canary, canary


@canary("text", text.windows, whole=text.WHOLE, documents=text.C4_DOCUMENTS)
def _text() -> dict:
    stream = torch.arange(100)
    markup = "== Title ==\nSome '''bold''' words.\n\n\n* more\n== See also ==\nlost"
    return {
        "first": text.windows(stream, 10, 3),
        "drawn": text.windows(stream, 10, 3, seed=2),
        "prose": text.prose(markup),
        "splits": text.split_articles(list("abcdefgh")),
        "fingerprint": text.fingerprint(stream),
    }


@canary("recipe", recipe.Recipe, learned=recipe.LEARNED, through_network=recipe.THROUGH_NETWORK)
def _recipe() -> dict:
    run = recipe.Recipe(rotation="spinquant", activation_bits=4, R4=True)
    return {"rotation reads": run.rotation_reads, "weights": run.sharing_weights().spec()}


def _packaged(name: str) -> dict:
    """The file that a packaged model is dequantized from; its tokenizer is in it."""
    packaged = names.PACKAGED[name]
    return {"file": file_digest(names.package_folder(packaged) / packaged.file)}


def _wikipedia_mini() -> dict:
    return {
        split: sha256(text.CORPORA["wikipedia-mini"](split).encode()).hexdigest()
        for split in text.SPLITS
    }


# what runs read besides code: the same bytes everywhere
INPUTS = {name: Canary(partial(_packaged, name), {}, 0.0) for name in names.PACKAGED}
INPUTS["wikipedia-mini"] = Canary(_wikipedia_mini, {}, 0.0)
