"""A GGUF file as a Hugging Face folder: dequantized once, through transformers, and kept.

transformers reads the tensors and most of the config. What it would pass over in silence is
refused, and the tokenizer gets the cut that the file names: without it, text is split otherwise
than in llama.cpp.
"""

import json
import os
import shutil
from contextlib import suppress
from math import inf
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rotlib.disk import (
    cache_folder,
    check_writable,
    file_digest,
    known_digest,
    scratch_beside,
    write_json,
)
from rotlib.models.gguf_tokenizer import CUTS, check_vocabulary, tokenizer_of

# the model types that are read and written, with llama.cpp's names of their architectures
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# the keys of an architecture that must be there, and all that are understood
_NEEDED = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length"),
    *("attention.head_count", "attention.layer_norm_rms_epsilon"),
)
_NUMBERS = (
    *("attention.head_count_kv", "attention.key_length", "attention.value_length", "vocab_size"),
    *("rope.dimension_count", "rope.freq_base"),
)
_KNOWN = {*_NEEDED, *_NUMBERS, "rope.scaling.type", "attention.causal"}
_SUMS = "rotlib_files.json"  # of an unpacked folder: the sha256 of each of its files


def unpacked_gguf(file: Path) -> Path:
    """The folder of a GGUF file's model in float32, made on first use.

    Raises ValueError, naming the tensor or the key, for a file that is cut short, or of which
    transformers would leave something out.
    """
    folder = cache_folder() / f"{file.stem[:80]}-{known_digest(file)[:12]}"
    if not as_unpacked(folder):
        reader = read(file)
        unpack(file, folder, reader, _check_keys(reader))
    return folder


def as_unpacked(folder: Path) -> bool:
    """Whether a folder holds what `unpack` wrote, and nothing else."""
    with suppress(OSError, TypeError, ValueError):
        sums = json.loads((folder / _SUMS).read_text(encoding="utf-8"))
        found = {path.name for path in folder.iterdir()}
        return found == {*sums, _SUMS} and all(
            known_digest(folder / name) == sums[name] for name in sums
        )
    return False


def unpack(file: Path, folder: Path, reader: gguf.GGUFReader, cut: str | None = None) -> None:
    """Dequantize a file into a folder, which is renamed into place when it is complete.

    Every tensor must find its place; with `cut` the tokenizer cuts text so.
    """
    size = 4 * sum(int(tensor.n_elements) for tensor in reader.tensors)
    room = f"let ROTLIB_CACHE name a folder with room for {size / 1e9:.1f} GB"
    check_writable(folder.parent, room)
    # the whole path: transformers would take a file of this name in the working directory
    source = {"gguf_file": str(file.resolve()), "trust_remote_code": False}
    quantized, loading = AutoModelForCausalLM.from_pretrained(
        file.parent,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, by name
        **source,
    )
    _check_all_read(reader, quantized, loading)
    config = quantized.config.to_dict()
    for leftover in ("quantization_config", "_name_or_path"):
        config.pop(leftover, None)
    model = AutoModelForCausalLM.from_config(
        type(quantized.config).from_dict(config), dtype=torch.float32
    )
    model.load_state_dict(quantized.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
    if cut:
        keys = {name: field.contents() for name, field in reader.fields.items()}
        tokenizer = tokenizer_of(keys, cut, tokenizer)
    with scratch_beside(folder, folder=True) as scratch:
        model.save_pretrained(scratch, max_shard_size="1TB")
        tokenizer.save_pretrained(scratch)
        if cut and _cut_in(AutoTokenizer.from_pretrained(scratch)) != _cut_in(tokenizer):
            raise ValueError(
                f"transformers' tokenizer of {config['model_type']} models doesn't cut text like "
                f"{cut!r}, as the file asks for: load the original model"
            )
        sums = {path.name: file_digest(path) for path in scratch.iterdir()}
        write_json(scratch / _SUMS, sums)
        if not as_unpacked(folder):  # another process may have finished first
            shutil.rmtree(folder, ignore_errors=True)
            try:
                os.replace(scratch, folder)
            except OSError as error:
                if not as_unpacked(folder):
                    raise ValueError(
                        f"{folder} is in the way of the dequantized model: take it away"
                    ) from error


def _cut_in(tokenizer: PreTrainedTokenizerBase) -> dict:
    return json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]


def read(file: Path) -> gguf.GGUFReader:
    """The file's keys and tensors.

    Raises ValueError where a tensor lies elsewhere than behind the one before it, or beyond the
    file's end.
    """
    try:
        reader = gguf.GGUFReader(file)
    except Exception as error:  # whatever bytes make numpy or gguf raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{file.name} is no GGUF file, damaged or cut short ({reason}): download it again"
        ) from error
    for tensor in reader.tensors:
        kind = tensor.tensor_type
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise ValueError(
                f"the tensor {tensor.name} is of the type {kind.name}, which gguf can't "
                "dequantize: take a file of another type"
            ) from None
        except ValueError:
            pass  # a type of plain numbers takes no bytes
        if not tensor.name.endswith((".weight", ".bias")):
            raise ValueError(f"the tensor {tensor.name} is no weight and no bias")
    _check_places(reader, file.stat().st_size)
    return reader


def _check_places(reader: gguf.GGUFReader, size: int) -> None:
    """Raises ValueError unless the tensors fill the file, one behind the other."""
    end = reader.data_offset
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.data_offset):
        if tensor.data_offset != end:
            raise ValueError(
                f"the tensor {tensor.name} doesn't begin where the one before it ends: the file's "
                "header is damaged; download it again"
            )
        end += -(-int(tensor.n_bytes) // reader.alignment) * reader.alignment
    if size >= end + reader.alignment:
        raise ValueError("the file goes on behind its last tensor: download it again")


def _check_keys(reader: gguf.GGUFReader) -> str:
    """llama.cpp's name of the tokenizer's cut.

    Raises ValueError for keys that are missing, or that transformers would read otherwise than
    llama.cpp: all that isn't understood.
    """
    keys = {name: field.contents() for name, field in reader.fields.items()}
    architecture = keys.get("general.architecture")
    if architecture not in ARCHITECTURES.values():
        raise ValueError(
            f"it is of the architecture {architecture!r}, and files of "
            f"{', '.join(dict.fromkeys(ARCHITECTURES.values()))} are read: load the original model"
        )
    if keys.get("split.count", 0) not in (0, 1):  # llama-gguf-split --merge writes 0
        raise ValueError("it is one part of several: join them with llama-gguf-split --merge")
    own = {
        name.removeprefix(f"{architecture}."): value
        for name, value in keys.items()
        if name.startswith(f"{architecture}.")
    }
    for name in (*_NEEDED, *(name for name in _NUMBERS if name in own)):
        number = own.get(name)
        if isinstance(number, bool | str | list | None) or not 0 < number < inf:
            raise ValueError(f"its key {architecture}.{name} is missing, or no number above zero")
    heads, pairs = (own.get(f"attention.head_count{kind}") for kind in ("", "_kv"))
    if pairs is not None and heads % pairs:
        raise ValueError(
            f"its key {architecture}.attention.head_count_kv is {pairs}, which doesn't divide the "
            f"{heads} heads: download the file again"
        )
    blocks = {tensor.name.split(".")[1] for tensor in reader.tensors if tensor.name[:4] == "blk."}
    if len(blocks) != own["block_count"]:
        raise ValueError(
            f"its key {architecture}.block_count is {own['block_count']}, and it has tensors of "
            f"{len(blocks)} blocks: download the file again"
        )
    head = own.get("attention.key_length", own["embedding_length"] // own["attention.head_count"])
    wanted = {
        "rope.scaling.type": "none",
        "rope.dimension_count": head,
        "attention.value_length": head,
        "attention.causal": True,
    }
    for name, value in own.items():
        if name not in _KNOWN or value != wanted.get(name, value):
            raise ValueError(
                f"its key {architecture}.{name} is {value!r}, which transformers doesn't read "
                "from GGUF: load the original model"
            )
    kind, cut = keys.get("tokenizer.ggml.model"), keys.get("tokenizer.ggml.pre", "gpt-2")
    cut = "gpt-2" if cut == "default" else cut
    if kind != "gpt2" or cut not in CUTS.values():
        raise ValueError(
            f"its tokenizer is of the kind {kind!r}, cut like {cut!r}, and only 'gpt2' with "
            f"{', '.join(sorted(CUTS.values()))} are known here: load the original model"
        )
    rows = {tensor.name: int(tensor.shape[1]) for tensor in reader.tensors if len(tensor.shape) > 1}
    check_vocabulary(keys, rows.get("token_embd.weight"))
    return cut


def _check_all_read(reader: gguf.GGUFReader, model: PreTrainedModel, loading: dict) -> None:
    """Raises ValueError for a tensor that only the file or only the model has, or of other shape.

    transformers would leave the one out and draw the other.
    """
    architecture = reader.get_field("general.architecture").contents()
    of_name = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(of_name[architecture], model.config.num_hidden_layers)
    suffixes = (".weight", ".bias")
    name_of = {path: names.get_name(path, try_suffixes=suffixes) for path in model.state_dict()}
    held = {tensor.name for tensor in reader.tensors}
    if wrong := sorted(loading["mismatched_keys"]):
        path, found, wanted = wrong[0]
        raise ValueError(
            f"its tensor {name_of[path]} is of {tuple(found)}, and its keys ask for {tuple(wanted)}"
        )
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    missing = {name for path, name in name_of.items() if path not in tied} - held
    if missing:
        raise ValueError(f"it has no tensor {min(missing)}: download the file again")
    if unread := held - set(name_of.values()):
        raise ValueError(
            f"its tensor {min(unread)} has no place in {type(model).__name__} as transformers "
            "reads this file: load the original model"
        )
