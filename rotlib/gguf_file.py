"""A quantized model as a GGUF file, which llama.cpp runs: every code exactly as GPTQ or RTN left it.

GGUF's blocks hold 32 weights and a scale in float16: Q4_0 is ``d (code − 8)``, Q4_1 ``d code + m``, Q8_0 ``d code``. A grid of groups of
a multiple of 32, or of whole rows that are one, is written with its scale repeated, so that rounding d and m to float16 (5e-4 of
them) is all that differs. Embedding and head are float16, norms and biases float32.
"""

import json
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from jaxtyping import UInt8
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rotlib.checkpoint import bits_for, codes_of
from rotlib.families import adapt
from rotlib.quant import QuantizedWeight

NAME = "model.gguf"
_BLOCK = 32
_FLOAT16_ERROR = 2.0**-9  # of a block's largest weight, what rounding d and m may cost
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_FILE_TYPES = {
    Type.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    Type.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
    Type.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}
# how llama.cpp names a tokenizer's way of cutting text before its merges, by what its own description contains
_CUTS = {r"\\p{N}{1,3}": "llama-bpe", r"\\p{N}": "qwen2", "Digits": "smollm", "ByteLevel": "gpt-2"}


class GgufFile:
    """What will be written of a model and its tokenizer, and its size in bytes.

    Raises ValueError for weights without codes, grids that no block type holds, and tokenizers or rotary embeddings that aren't known.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None):
        if tokenizer is None:
            raise ValueError("a GGUF file carries its tokenizer: pass tokenizer=tokenizer")
        self._family, self._tokenizer = adapt(model), tokenizer
        self._cut = _cut(tokenizer)
        self._weights = codes_of(model)
        self._types = {name: block_type(name, weight) for name, weight in self._weights.items()}
        rope = model.config.rope_parameters
        if rope["rope_type"] not in ("default", "llama3"):
            raise ValueError(
                f"this model's rotary embeddings are scaled by {rope['rope_type']!r}: export it as 'fused', for llama.cpp's own converter"
            )
        sizes = (gguf.quant_shape_to_byte_shape(weight.codes.shape, self._types[name]) for name, weight in self._weights.items())
        others = sum(parameter.numel() for parameter in model.parameters()) - sum(w.codes.numel() for w in self._weights.values())
        self.size = sum(int(np.prod(shape)) for shape in sizes) + 2 * others

    def write(self, folder: Path) -> None:
        """`NAME`, with the tokenizer inside."""
        config = self._family.config
        writer = gguf.GGUFWriter(folder / NAME, _ARCHITECTURES[config.model_type], use_temp_file=True)
        writer.add_name(Path(config.name_or_path).name or config.model_type)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self._family.head_dim)
        writer.add_value_length(self._family.head_dim)
        writer.add_rope_dimension_count(self._family.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_file_type(_FILE_TYPES[next(iter(self._types.values()))])
        self._add_tokenizer(writer)
        for name, (data, kind) in self._tensors():
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def differing(self, folder: Path) -> str | None:
        """The first weight that doesn't read back from the file as it is in memory, to float16's rounding of a block's scale."""
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / NAME).tensors}
        for name, tensor, _ in self._named():
            read = torch.from_numpy(gguf.dequantize(found[name].data, found[name].tensor_type).copy()).view(tensor.shape)
            wanted = tensor.cpu().float()
            if (read - wanted).abs().max() > _FLOAT16_ERROR * wanted.abs().max():
                return name
        return None

    def _named(self):
        """(llama.cpp's name, the tensor with its rows in llama.cpp's order, its codes in that order or None) of every weight and bias."""
        family = self._family
        architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == _ARCHITECTURES[family.config.model_type])
        names = gguf.get_tensor_name_map(architecture, len(family.layers))
        modules = dict(family.model.named_modules())
        for path, tensor in family.model.state_dict().items():
            if path == "lm_head.weight" and family.config.tie_word_embeddings:
                continue
            weight = getattr(modules[path.rpartition(".")[0]], "quantized", None) if path.endswith(".weight") else None
            if architecture == gguf.MODEL_ARCH.LLAMA and (".q_proj." in path or ".k_proj." in path):
                rows = _interleaved(len(tensor), family.head_dim).to(tensor.device)
                tensor = tensor[rows]
                weight = weight and QuantizedWeight(*(part[rows] for part in weight))
            yield names.get_name(path, try_suffixes=(".weight", ".bias")), tensor, weight

    def _tensors(self):
        if self._family.config.rope_parameters["rope_type"] == "llama3":
            frequencies = self._family.decoder.rotary_emb.inv_freq.cpu().double()
            exponents = torch.arange(0, self._family.head_dim, 2).double() / self._family.head_dim
            factors = self._family.config.rope_parameters["rope_theta"] ** -exponents / frequencies
            yield "rope_freqs.weight", (factors.float().numpy(), None)
        for name, tensor, weight in self._named():
            if weight is None:
                yield name, (tensor.cpu().to(torch.float32 if tensor.ndim == 1 else torch.float16).numpy(), None)
            else:
                kind = block_type(name, weight)
                yield name, (blocks(weight, kind), kind)

    def _add_tokenizer(self, writer: gguf.GGUFWriter) -> None:
        known = {number: token for token, number in self._tokenizer.get_vocab().items()}
        added = self._tokenizer.added_tokens_decoder
        tokens, kinds = [], []
        for number in range(self._family.config.vocab_size):
            tokens.append(known.get(number, f"[unused {number}]"))
            special = added[number].special if number in added else None
            kinds.append({None: gguf.TokenType.NORMAL, True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED}[special])
            if number not in known:
                kinds[-1] = gguf.TokenType.UNUSED
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self._cut)
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        with tempfile.TemporaryDirectory() as folder:
            self._tokenizer.save_pretrained(folder)
            gguf.SpecialVocab(folder, load_merges=True, n_vocab=len(tokens)).add_to_gguf(writer, quiet=True)


def block_type(name: str, weight: QuantizedWeight) -> Type:
    """The type of block that holds a weight's codes as they are; raises ValueError where none does."""
    width = weight.codes.shape[1] // weight.scale.shape[1]
    if width % _BLOCK:
        raise ValueError(
            f"{name} has a scale for every {width} weights, and GGUF's blocks hold {_BLOCK}: choose a group_size that they divide"
        )
    symmetric = weight.codes.dtype == torch.int8
    bits = bits_for(weight, (4, 8))
    if bits == 8 and not symmetric:
        raise ValueError(f"{name} has an asymmetric grid of more than 4 bits, which no type of GGUF's holds: choose a symmetric one")
    return {(4, True): Type.Q4_0, (4, False): Type.Q4_1, (8, True): Type.Q8_0}[bits, symmetric]


def blocks(weight: QuantizedWeight, kind: Type) -> UInt8[np.ndarray, "out bytes"]:
    """A weight's codes in blocks of that type: d, for Q4_1 also m, then the codes, two a byte (the first 16 in the low halves) or one."""
    rows, columns = weight.codes.shape
    repeat = columns // weight.scale.shape[1] // _BLOCK
    d, zero = (part.cpu().float().repeat_interleave(repeat, dim=1).unsqueeze(2).numpy() for part in (weight.scale, weight.zero))
    codes = weight.codes.cpu().to(torch.int16).view(rows, -1, _BLOCK).numpy()
    floats = [d] + ([-d * zero] if kind == Type.Q4_1 else [])
    if kind == Type.Q8_0:
        body = codes.astype(np.int8).view(np.uint8)
    else:
        halves = (codes + (8 if kind == Type.Q4_0 else 0)).astype(np.uint8)
        body = halves[..., : _BLOCK // 2] | halves[..., _BLOCK // 2 :] << 4
    return np.concatenate([*(part.astype(np.float16).view(np.uint8) for part in floats), body], axis=2).reshape(rows, -1)


def _interleaved(rows: int, head_dim: int) -> Tensor:
    """The order in which llama.cpp keeps the rows of q and k: RoPE's pairs side by side, where transformers has halves."""
    return torch.arange(rows).view(-1, 2, head_dim // 2).transpose(1, 2).flatten()


def _cut(tokenizer: PreTrainedTokenizerBase) -> str:
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    cut = json.dumps(description["pre_tokenizer"])
    if description["model"]["type"] == "BPE" and not description["model"].get("byte_fallback"):
        for mark, name in _CUTS.items():
            if mark in cut:
                return name
    raise ValueError(
        "this tokenizer isn't one that llama.cpp is known to share: export the model as 'fused', for llama.cpp's own converter"
    )
