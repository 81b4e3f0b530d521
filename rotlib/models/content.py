"""What a model's name stands for: a digest of its files.

The same folder may hold other weights tomorrow, and two folders of one name are two models. What is
kept of a model is therefore named by its content.
"""

import json
import os
from hashlib import sha256
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rotlib.disk import known_digest
from rotlib.models.names import gguf_of, hub_commit, resolve

_FILES = (
    *("config.json", "**/*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab*"),
    *("merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model"),
)


def model_content(name: str) -> str:
    """The sha256 of the files that make up a model and its tokenizer, or its commit on the Hub.

    Raises like `rl.load`.

    >>> model_content(tiny) == model_content(tiny)
    True
    """
    if (file := gguf_of(name)) is not None:
        return f"sha256 {known_digest(file)}"
    if not os.path.isdir(name):
        return f"commit {hub_commit(name)}"
    source = Path(resolve(name))
    files = sorted({path for pattern in _FILES for path in source.glob(pattern) if path.is_file()})
    digests = {str(path.relative_to(source)): known_digest(path) for path in files}
    return f"sha256 {sha256(json.dumps(digests).encode()).hexdigest()}"


def weights_sample(model: PreTrainedModel) -> str:
    """A digest of every parameter, by a thousand entries and the sum of all bits.

    What is learned of a model is its own.
    """
    digest = sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize]
        bits = values.view(kind).sum(dtype=torch.int64).item()  # the same in whatever order
        values = values[:: max(1, len(values) // 1000)].cpu().float()
        digest.update(f"{name} {tuple(parameter.shape)} {bits}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:12]
