"""A model as a Hugging Face folder, its codes packed or its weights as they are.

Codes are packed in the format of compressed-tensors, exactly as GPTQ or RTN left them; act-order
leaves no trace, since groups are of inputs in their own order. Tensors are made a shard at a time,
so that no second copy of the model is held. What was written is read back through
compressed-tensors' own code.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.mx_utils import compress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    preset_name_to_scheme,
)
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rotlib.models.families import Family
from rotlib.models.joined import Joined
from rotlib.models.supported import adapt
from rotlib.quantization.activations import ActivationQuant
from rotlib.quantization.fp4 import FP4
from rotlib.quantization.grids import QuantizedWeight, WeightQuant
from rotlib.quantization.quantized import codes_of, grid_of

SHARD = "5GB"
# the one rounding of inputs that a checkpoint can ask its runtime for
INPUTS = ActivationQuant(bits=8, protocol="compressed-tensors")
_CONTAINERS = (4, 8)  # bits a code is stored in: what vLLM has kernels for
_OURS = ("rotlib_quantized", "rotlib_online")  # marks in a config that mean nothing to others


class Checkpoint:
    """What will be written of a model, `packed` or not, its dtype, and its size in bytes.

    With `inputs` it asks the runtime to round what the linears read as `INPUTS` says. Raises
    ValueError for weights without codes, codes that compressed-tensors can't hold, or a dtype in
    which it doesn't read them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        dtype: torch.dtype | None,
        packed: bool,
        inputs: bool = False,
    ):
        self._model, self._tokenizer = model, tokenizer
        self._family = adapt(model)
        self._packing = _packing(codes_of(model), inputs) if packed else None
        self._codes = _stored(self._family, self._packing) if packed else {}
        of_floats = isinstance(self._packing, _Fp4Packing)
        if packed:
            check_grid(self._family, of_floats, self._packing.symmetric, inputs)
        if of_floats:
            check_fp4_dtype(dtype)
        self.dtype = dtype or (torch.bfloat16 if of_floats else model.dtype)
        self._tied = ("lm_head.weight",) if tied(model) else ()
        self._parts = self._make_parts()
        shapes = {name: make("meta") for name, make in self._parts.items()}
        self._plan = split_torch_state_dict_into_shards(shapes, max_shard_size=SHARD)
        self.size = sum(shape.nbytes for shape in shapes.values())
        if self.dtype.itemsize < 4:
            self._check_range()

    def _check_range(self) -> None:
        """Raises ValueError for what this dtype makes infinite of, or nothing."""
        whole = {f"{name}_scale": stored.weight.scale for name, stored in self._codes.items()}
        for name, tensor in (self._model.state_dict() | whole).items():
            if name in self._codes:  # readers multiply its codes and scales in this dtype
                tensor = self._codes[name].weight.dense()
            if tensor.is_floating_point():
                tensor = tensor.double()
                lost = (tensor.to(self.dtype).double() - tensor).norm() / tensor.norm()
                if tensor.any() and not lost < 0.01:
                    raise ValueError(
                        f"{name} has values beyond {self.dtype}: pass dtype=torch.bfloat16, or "
                        "torch.float32"
                    )

    def write(self, folder: Path) -> None:
        """Weights, their index, config and tokenizer."""
        for file, names in self._plan.filename_to_tensors.items():
            save_file(
                {name: self._parts[name]("cpu") for name in names},
                folder / file,
                metadata={"format": "pt"},
            )
        if self._plan.is_sharded:
            index = {"metadata": self._plan.metadata, "weight_map": self._plan.tensor_to_filename}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        self._config().save_pretrained(folder)
        if self._model.generation_config is not None:
            self._model.generation_config.save_pretrained(folder)
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)

    def differing(self, folder: Path) -> str | None:
        """The first weight that doesn't read back from the folder as it is in memory."""

        def read(name: str) -> Tensor:
            with safe_open(folder / self._plan.tensor_to_filename[name], "pt") as file:
                return file.get_tensor(name)

        for name, tensor in self._model.state_dict().items():
            written = self._on_disk(name)
            if name in self._codes:
                parts = {kind: read(written + kind) for kind in self._packing.kinds}
                same = self._packing.same(self._codes[name], parts)
            else:
                same = name in self._tied or torch.equal(
                    read(written), tensor.to("cpu", self.dtype)
                )
            if not same:
                return name
        return None

    def _make_parts(self) -> dict[str, Callable[[str], Tensor]]:
        """How to make each tensor on a device, "meta" for its shape alone."""
        parts = {}
        for name, tensor in self._model.state_dict().items():
            written = self._on_disk(name)
            if name in self._codes:
                make = partial(self._packing.make, self._codes[name], self.dtype)
                parts |= {written + kind: partial(make, kind) for kind in self._packing.kinds}
            elif name not in self._tied:
                parts[written] = partial(_whole, tensor, self.dtype)
        return parts

    def _on_disk(self, name: str) -> str:
        """A weight's name in the family's files."""
        return name.replace(*self._family.on_disk)

    def _config(self):
        config = deepcopy(self._model.config)
        for mark in _OURS:
            if hasattr(config, mark):
                delattr(config, mark)
        config.tie_word_embeddings = bool(self._tied)
        config.architectures = [type(self._model).__name__]
        config.dtype = self.dtype
        if self._packing is not None:
            groups = {"group_0": self._packing.scheme}
            routers = [f"re:.*{self._family.router_path}$"] if self._family.experts else []
            status = {
                "format": self._packing.format,
                "quantization_status": "compressed",
                "ignore": ["lm_head", *routers],
            }
            written = QuantizationConfig(config_groups=groups, **status)
            config.quantization_config = written.to_dict()
            # transformers 5.23 can't keep packed zero points packed, and refuses without; vLLM can
            if not self._packing.symmetric:
                config.quantization_config["dequantize"] = True
        return config


def _whole(tensor: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    return tensor.to(device, dtype).contiguous()


def check_fp4_dtype(dtype: torch.dtype | None) -> None:
    """Raises ValueError for what 4-bit floats aren't read in."""
    if dtype not in (None, torch.bfloat16):
        raise ValueError(f"compressed-tensors reads 4-bit floats as bfloat16: leave {dtype} out")


def check_inputs(format: str, activations: ActivationQuant | None) -> bool:
    """Whether a checkpoint shall ask its runtime to round what the linears read.

    Raises ValueError for a rounding that none can ask for.
    """
    if activations in (None, ActivationQuant()):
        return False
    if format != "compressed-tensors":
        raise ValueError(
            f"the format {format!r} can't ask its runtime to round activations: choose "
            "'compressed-tensors', or leave them unrounded"
        )
    if activations != INPUTS:
        raise ValueError(
            "a checkpoint can ask its runtime for ActivationQuant(bits=8, "
            "protocol='compressed-tensors'), and for no other rounding of activations, such as "
            f"{activations!r}"
        )
    return True


def check_grid(family: Family, of_floats: bool, symmetric: bool, inputs: bool) -> None:
    """Raises ValueError for weights on a grid that isn't read so.

    That is of experts, and of weights beside rounded `inputs`.
    """
    if inputs and family.experts:
        raise ValueError(
            "compressed-tensors gives all tokens of an expert one scale for 8-bit inputs, not each "
            "its own: leave the activations unrounded"
        )
    if inputs and (of_floats or not symmetric):
        raise ValueError(
            "compressed-tensors has 8-bit inputs beside weights on symmetric integer grids alone: "
            "quantize them so, or leave the activations unrounded"
        )
    if family.experts and (of_floats or not symmetric):
        raise ValueError(
            "transformers reads experts from compressed-tensors on symmetric integer grids alone: "
            "quantize them so, or export the model as 'fused'"
        )


class _Stored(NamedTuple):
    """A weight of the state dict as it will be packed, with the unit of those that read its input.

    Joined ones are one.
    """

    weight: QuantizedWeight
    unit: float


def _stored(family: Family, packing: "_Packing | _Fp4Packing") -> dict[str, _Stored]:
    """Every quantized weight by its name in the state dict."""
    path_of = {module: path for path, module in family.model.named_modules()}
    for module in [module for module in path_of if isinstance(module, Joined)]:
        path_of |= dict.fromkeys(module.children(), path_of[module])
    stored = {}
    for layer in range(len(family.layers)):
        linears = family.linears(layer)
        for sites in family.readers:
            together: dict[str, list[QuantizedWeight]] = {}
            for linear in (linears[site] for site in sites):
                together.setdefault(f"{path_of[linear]}.weight", []).append(linear.quantized)
            unit = packing.unit(torch.cat([linears[site].quantized.scale for site in sites]))
            for name, (weight, *others) in together.items():
                if others:
                    parts = zip(weight, *others, strict=True)
                    weight = QuantizedWeight(*map(torch.cat, parts))
                stored[name] = _Stored(weight, unit)
    return stored


def tied(model: PreTrainedModel) -> bool:
    """Whether the head is the embedding: a config may say so of one that isn't."""
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    return head is embedding or (model.config.tie_word_embeddings and torch.equal(head, embedding))


def bits_for(weight: QuantizedWeight, containers: tuple[int, ...]) -> int | None:
    """The fewest bits of these that hold every code of a weight."""
    for bits in containers:
        low, high = WeightQuant(bits=bits, symmetric=weight.codes.dtype == torch.int8).codes
        if low <= weight.codes.min() and weight.codes.max() <= high:
            return bits
    return None


@dataclass(frozen=True)
class _Packing:
    """The one grid of a model's codes, and the bits that each is stored in.

    Beside rounded `inputs` codes lie in a byte each, as kernels for them read them.
    """

    bits: int
    symmetric: bool
    group_size: int | None
    inputs: bool

    @property
    def format(self) -> str:
        return "int-quantized" if self.inputs else "pack-quantized"

    def unit(self, scale: Tensor) -> float:
        """Of integer grids there is none."""
        return 1.0

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the names of the tensors that stand for a weight add to its own."""
        if self.inputs:
            return ("", "_scale")
        return ("_packed", "_scale", "_shape") + (() if self.symmetric else ("_zero_point",))

    @property
    def scheme(self) -> QuantizationScheme:
        """The same in compressed-tensors' words."""
        strategy = {"strategy": "channel"}
        if self.group_size:
            strategy = {"strategy": "group", "group_size": self.group_size}
        weights = QuantizationArgs(
            num_bits=self.bits, type="int", symmetric=self.symmetric, **strategy
        )
        tokens = QuantizationArgs(num_bits=INPUTS.bits, type="int", strategy="token", dynamic=True)
        inputs = {"input_activations": tokens} if self.inputs else {}
        return QuantizationScheme(targets=["Linear"], weights=weights, **inputs)

    def make(self, stored: _Stored, dtype: torch.dtype, kind: str, device: str) -> Tensor:
        """One of the tensors.

        Unsigned codes and their zero points move down together, to the range of a signed type.
        """
        weight = stored.weight
        shift = 0 if self.symmetric else 2 ** (self.bits - 1)
        if kind == "":
            return weight.codes.to(device).contiguous()
        if kind == "_packed":
            return self._packed(weight.codes.to(device, torch.int16) - shift, 1)
        if kind == "_zero_point":
            return self._packed(weight.zero.to(device) - shift, 0)
        if kind == "_scale":
            return weight.scale.to(device, dtype).contiguous()
        return torch.tensor(weight.codes.shape, device=device)

    def same(self, stored: _Stored, read: dict[str, Tensor]) -> bool:
        """Whether these tensors unpack to exactly this weight's codes, scales and zero points.

        They are unpacked by compressed-tensors' own code.
        """
        weight = stored.weight
        shift = 0 if self.symmetric else 2 ** (self.bits - 1)
        if self.inputs and not torch.equal(read[""], weight.codes.cpu()):
            return False
        for kind, wanted, dim in (("_packed", weight.codes, 1), ("_zero_point", weight.zero, 0)):
            if kind in read:
                found = unpack_from_int32(read[kind], self.bits, wanted.shape, packed_dim=dim)
                if not torch.equal(found.float() + shift, wanted.cpu().float()):
                    return False
        return torch.equal(read["_scale"], weight.scale.to("cpu", read["_scale"].dtype))

    def _packed(self, codes: Tensor, dim: int) -> Tensor:
        if codes.is_meta:  # compressed-tensors' own function needs values
            shape = list(codes.shape)
            shape[dim] = ceil(shape[dim] * self.bits / 32)
            return torch.empty(shape, dtype=torch.int32, device="meta")
        return pack_to_int32(codes.to(torch.int8), self.bits, packed_dim=dim).contiguous()


@dataclass(frozen=True)
class _Fp4Packing:
    """One of the grids of 4-bit floats; what isn't a float of its own lies in a power of two."""

    grid: str
    symmetric = True

    def unit(self, scale: Tensor) -> float:
        """The power of two that these scales are multiples of."""
        return WeightQuant(grid=self.grid).unit_of(scale)

    @property
    def format(self) -> str:
        return f"{self.grid}-pack-quantized"

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the names of the tensors that stand for a weight add to its own."""
        return ("_packed", "_scale") + (("_global_scale",) if self.grid == "nvfp4" else ())

    @property
    def scheme(self) -> QuantizationScheme:
        """The same in compressed-tensors' words."""
        return preset_name_to_scheme(f"{self.grid}A16".upper(), ["Linear"])

    def make(self, stored: _Stored, dtype: torch.dtype, kind: str, device: str) -> Tensor:
        """One of the tensors; compressed-tensors divides a scale by the global one."""
        weight = stored.weight
        if kind == "_packed":
            rows, columns = weight.codes.shape
            if device == "meta":  # compressed-tensors' own function needs values
                return torch.empty(rows, columns // 2, dtype=torch.uint8, device=device)
            return pack_fp4_to_uint8(weight.codes.to(device).float())
        if kind == "_global_scale":
            return torch.tensor([1 / stored.unit], device=device)
        scale = weight.scale.to(device) / stored.unit
        if self.grid == "mxfp4":
            return compress_mx_scale(scale, torch.uint8)
        return scale.to(torch.float8_e4m3fn).contiguous()

    def same(self, stored: _Stored, read: dict[str, Tensor]) -> bool:
        """Whether compressed-tensors' own code unpacks these tensors to exactly this weight."""
        compressor = BaseCompressor.get_value_from_registry(self.format)
        parts = {f"weight{kind}": tensor for kind, tensor in read.items()}
        found = compressor.decompress(parts, self.scheme)["weight"]
        return torch.equal(found.float(), stored.weight.dense().cpu().float())


def _packing(weights: dict[str, QuantizedWeight], inputs: bool = False) -> _Packing | _Fp4Packing:
    """Raises ValueError where compressed-tensors can't hold these codes."""
    if len(grids := {grid_of(weight) for weight in weights.values()}) == 1 and grids <= {*FP4}:
        return _Fp4Packing(grids.pop())
    symmetric = {weight.codes.dtype == torch.int8 for weight in weights.values()}
    rows = {weight.codes.shape[1] for weight in weights.values() if weight.scale.shape[1] == 1}
    groups = {
        weight.codes.shape[1] // weight.scale.shape[1]
        for weight in weights.values()
        if weight.scale.shape[1] > 1
    }
    # a row may be a single group
    if len(grids) > 1 or len(symmetric) > 1 or len(groups) > 1 or (groups and not rows <= groups):
        raise ValueError(
            "these weights are on different grids, and compressed-tensors' format holds one: "
            "quantize all of them alike"
        )
    return _Packing(
        max(bits_for(weight, _CONTAINERS) for weight in weights.values()),
        symmetric.pop(),
        groups.pop() if groups else None,
        inputs,
    )
