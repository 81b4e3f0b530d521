"""A quantized model as a GGUF file, which llama.cpp runs.

Every code is exactly as GPTQ or RTN left it. GGUF's blocks hold 32 weights and a scale in float16:
Q4_0 is ``d (code − 8)``, Q4_1 ``d code + m``, Q8_0 ``d code``. A grid of groups of a multiple of
32, or of whole rows that are one, is written with its scale repeated, so that rounding d and m to
float16 (5e-4 of them) is all that differs. Embedding and head are float16, norms and biases
float32.
"""

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from jaxtyping import Float, UInt8
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rotlib.checkpoints.packed import bits_for, tied
from rotlib.checks import all_finite
from rotlib.models.families import Family
from rotlib.models.gguf_model import ARCHITECTURES
from rotlib.models.gguf_tokenizer import cut_of, write_tokenizer
from rotlib.models.supported import adapt
from rotlib.quantization.fp4 import FP4
from rotlib.quantization.grids import QuantizedWeight, WeightQuant
from rotlib.quantization.quantized import codes_of, grid_of
from rotlib.rotations.rotation import placed_weights

NAME = "model.gguf"
_BLOCK = 32
_NO_FP4 = "4-bit floats aren't written as GGUF: export them as 'compressed-tensors'"
_FILE_TYPES = {
    Type.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    Type.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
    Type.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}


class GgufFile:
    """What will be written of a model and its tokenizer, and its size in bytes.

    Raises ValueError for weights without codes, grids that no block type holds, and tokenizers or
    rotary embeddings that aren't known.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None):
        if tokenizer is None:
            raise ValueError("a GGUF file carries its tokenizer: pass tokenizer=tokenizer")
        self._family, self._tokenizer = adapt(model), tokenizer
        check_family(self._family)
        self._cut = cut_of(tokenizer)
        weights = codes_of(model)
        placed_in_layers = placed_weights(self._family, quantized_only=True)
        self._types = {
            placed.module: block_type(placed.name, weights[placed.name])
            for placed in placed_in_layers
        }
        self._tied = tied(model)
        self._check_range()
        self._layout = self._lay_out()
        self.size = sum(size for _, _, _, size, _ in self._layout)

    def _check_range(self) -> None:
        """Raises ValueError for what a float16 of the file can't hold."""
        for name, tensor, weight, _ in self._named():
            if weight is None:
                parts = [_floats(tensor)]
            else:
                parts = [part.half() for part in (weight.scale, weight.scale * weight.zero)]
            if not all(map(all_finite, parts)):
                raise ValueError(
                    f"{name} has values beyond float16, which GGUF's blocks are made of: export it "
                    "as 'compressed-tensors' with dtype=torch.bfloat16"
                )

    def write(self, folder: Path) -> None:
        """`NAME`, with the tokenizer inside."""
        config = self._family.config
        writer = gguf.GGUFWriter(folder / NAME, ARCHITECTURES[config.model_type])
        name = Path(str(config.name_or_path or "")).name or config.model_type
        # transformers takes this very name for an architecture that GGUF hasn't
        writer.add_name("Mistral" if name == "mistral" else name)
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
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_tokenizer(writer, self._tokenizer, config.vocab_size, self._cut)
        for name, shape, dtype, size, kind in self._layout:
            writer.add_tensor_info(name, shape, np.dtype(dtype), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor, weight, kind in self._named():
            data = _floats(tensor).numpy() if weight is None else blocks(weight, kind)
            writer.write_tensor_data(data)
        writer.close()

    def differing(self, folder: Path) -> str | None:
        """The first weight that gguf's own code doesn't read back as it is in memory.

        Weights are compared to half a step, so that no code is another.
        """
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / NAME).tensors}
        for name, tensor, weight, _ in self._named():
            data = gguf.dequantize(found[name].data, found[name].tensor_type)
            read = torch.from_numpy(data.copy()).view(tensor.shape)
            if weight is None:
                same = torch.equal(read, _floats(tensor).float())
            else:
                errors = (read - weight.dense().cpu()).abs()
                groups = errors.unflatten(1, (weight.scale.shape[1], -1))
                same = bool((groups < weight.scale.cpu().abs().unsqueeze(2) / 2).all())
            if not same:
                return name
        return None

    def _lay_out(self) -> list[tuple]:
        """Every tensor that the file will hold, in its order.

        Of each (name, shape in bytes or floats, type of the array, bytes, type of block).
        """
        layout = []
        for name, tensor, _, kind in self._named():
            dtype = np.uint8 if kind else _floats(tensor[:1]).numpy().dtype
            shape = tuple(tensor.shape)
            if kind:
                shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            layout.append((name, shape, dtype, size, kind))
        return layout

    def _named(self) -> Iterator[tuple[str, Tensor, QuantizedWeight | None, Type | None]]:
        """Of all in the file: (llama.cpp's name, the tensor, its codes, their type of block).

        The tensor and its codes have their rows in llama.cpp's order.
        """
        family = self._family
        wanted = ARCHITECTURES[family.config.model_type]
        architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted)
        names = gguf.get_tensor_name_map(architecture, len(family.layers))
        modules = dict(family.model.named_modules())
        if family.config.rope_parameters["rope_type"] == "llama3":
            yield "rope_freqs.weight", _frequency_factors(family), None, None
        for path, tensor in family.model.state_dict().items():
            if path == "lm_head.weight" and self._tied:
                continue
            module = modules[path.rpartition(".")[0]]
            kind = self._types.get(module) if path.endswith(".weight") else None
            weight = module.quantized if kind else None
            if architecture == gguf.MODEL_ARCH.LLAMA and (".q_proj." in path or ".k_proj." in path):
                # on the host: it may index codes there and weights on the device
                rows = _interleaved(len(tensor), family.head_dim)
                tensor = tensor[rows]
                weight = weight and QuantizedWeight(*(part[rows] for part in weight.stored))
            yield names.get_name(path, try_suffixes=(".weight", ".bias")), tensor, weight, kind


def _floats(tensor: Tensor) -> Tensor:
    """What has no codes, as it stands in the file.

    Matrices are in float16, norms and biases in float32.
    """
    return tensor.to("cpu", torch.float32 if tensor.ndim == 1 else torch.float16)


def check_family(family: Family) -> None:
    """Raises ValueError for a model that llama.cpp would compute otherwise: no key says it."""
    config = family.config
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"GGUF files of {config.model_type} models aren't written here: export it as "
            "'compressed-tensors', or as 'fused', for llama.cpp's own converter"
        )
    if (kind := config.rope_parameters["rope_type"]) not in ("default", "llama3"):
        raise ValueError(
            f"this model's rotary embeddings are scaled by {kind!r}: "
            "export it as 'fused', for llama.cpp's own converter"
        )
    for name, wanted in {"hidden_act": "silu", "use_sliding_window": False}.items():
        if (found := getattr(config, name, wanted)) != wanted:
            raise ValueError(
                f"this model has {name} {found!r}, and llama.cpp reads its family with "
                f"{wanted!r}: export it as 'compressed-tensors'"
            )
    if config.model_type == "qwen3" and family.head_dim != 128:
        raise ValueError(
            f"this model's heads have {family.head_dim} coordinates, and transformers "
            "reads its family's files with 128: export it as 'compressed-tensors'"
        )
    window = getattr(config, "sliding_window", None)
    if config.model_type == "mistral" and window and window < config.max_position_embeddings:
        raise ValueError(
            f"this model attends to {window} tokens at a time, and llama.cpp reads its family "
            "with attention to all: export it as 'compressed-tensors'"
        )


def check_holds(family: Family, quant: WeightQuant) -> None:
    """Raises ValueError for a grid that no type of block holds, whatever the codes."""
    if quant.grid in FP4:
        raise ValueError(_NO_FP4)
    if quant.group_size and quant.group_size % _BLOCK:
        raise ValueError(
            f"GGUF's blocks hold {_BLOCK} weights: "
            f"choose a group_size that they divide, not {quant.group_size}"
        )
    if not quant.symmetric and quant.bits > 4:
        raise ValueError(
            f"no type of GGUF's holds an asymmetric grid of {quant.bits} bits: "
            "choose a symmetric one, or at most 4 bits"
        )
    for name, linear in family.linears(0).items():
        if quant.group_size is None and linear.in_features % _BLOCK:
            raise ValueError(
                f"{name} reads {linear.in_features} inputs, and GGUF's blocks hold {_BLOCK}: "
                "choose a group_size that they divide"
            )


def block_type(name: str, weight: QuantizedWeight) -> Type:
    """The type of block that holds a weight's codes as they are.

    Raises ValueError where none does.
    """
    if grid_of(weight) in FP4:
        raise ValueError(_NO_FP4)
    width = weight.codes.shape[1] // weight.scale.shape[1]
    if width % _BLOCK:
        raise ValueError(
            f"{name} has a scale for every {width} weights, and GGUF's blocks hold {_BLOCK}: "
            "choose a group_size that they divide"
        )
    symmetric = weight.codes.dtype == torch.int8
    bits = bits_for(weight, (4, 8))
    if bits == 8 and not symmetric:
        raise ValueError(
            f"{name} has an asymmetric grid of more than 4 bits, which no type of GGUF's holds: "
            "choose a symmetric one"
        )
    return {(4, True): Type.Q4_0, (4, False): Type.Q4_1, (8, True): Type.Q8_0}[bits, symmetric]


def blocks(weight: QuantizedWeight, kind: Type) -> UInt8[np.ndarray, "out bytes"]:
    """A weight's codes in blocks of that type.

    A block is d, for Q4_1 also m, then the codes: two a byte (the first 16 in the low halves) or
    one.
    """
    rows, columns = weight.codes.shape
    repeat = columns // weight.scale.shape[1] // _BLOCK
    d, zero = (
        part.cpu().float().repeat_interleave(repeat, dim=1).unsqueeze(2).numpy()
        for part in (weight.scale, weight.zero)
    )
    codes = weight.codes.cpu().to(torch.int16).view(rows, -1, _BLOCK).numpy()
    floats = [d] + ([-d * zero] if kind == Type.Q4_1 else [])
    if kind == Type.Q8_0:
        body = codes.astype(np.int8).view(np.uint8)
    else:
        halves = (codes + (8 if kind == Type.Q4_0 else 0)).astype(np.uint8)
        body = halves[..., : _BLOCK // 2] | halves[..., _BLOCK // 2 :] << 4
    head = [part.astype(np.float16).view(np.uint8) for part in floats]
    return np.concatenate([*head, body], axis=2).reshape(rows, -1)


def _interleaved(rows: int, head_dim: int) -> Tensor:
    """The order in which llama.cpp keeps the rows of q and k.

    RoPE's pairs lie side by side there, where transformers has halves.
    """
    return torch.arange(rows).view(-1, 2, head_dim // 2).transpose(1, 2).flatten()


def _frequency_factors(family: Family) -> Float[Tensor, " half_head_dim"]:
    """What Llama 3's scaling divides RoPE's frequencies by."""
    exponents = torch.arange(0, family.head_dim, 2).double() / family.head_dim
    plain = family.config.rope_parameters["rope_theta"] ** -exponents
    return (plain / family.decoder.rotary_emb.inv_freq.cpu().double()).float()
