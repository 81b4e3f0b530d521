"""What takes minutes to make is kept: rotations, quantized weights, what is unfinished of them.

A file beside the results is used again while the model's files, the text, the stages it read,
torch, the kind of device and what it was made for are the same; another one, or one whose sum is
wrong, counts as none. A file that can't be written costs the next run its time, and this one
nothing.
"""

import warnings
from contextlib import suppress
from dataclasses import astuple
from hashlib import sha256

import torch

from rotlib.disk import write_atomically
from rotlib.quantization.gptq import ModuleReport, Report
from rotlib.quantization.grids import QuantizedWeight
from rotlib.study import numerics
from rotlib.study.files import local_path


class Kept:
    """The file of one specification; `made_for` names what else it depends on."""

    def __init__(self, spec: dict, device: torch.device, made_for: str = "", suffix: str = ".pt"):
        self.path = local_path(spec, suffix)
        noted = numerics.digests(numerics.stages_of(spec))
        self._maker = [noted, str(torch.__version__), device.type, made_for, self.path.name]

    def read(self) -> dict | None:
        if not self.path.is_file():  # a pipe would be waited for
            return None
        with suppress(Exception):  # a damaged one: compute anew
            contents = torch.load(self.path, map_location="cpu", weights_only=True)
            if contents.pop("sum") == _sum(contents) and contents["maker"] == self._maker:
                return contents

    def write(self, contents: dict) -> bool:
        """Whether it is on disk now."""
        try:
            made = contents | {"maker": self._maker}
            made["sum"] = _sum(made)
            write_atomically(self.path, lambda scratch: torch.save(made, scratch))
        except OSError as error:  # a full disk, say
            what = f"{self.path} couldn't be written, so it won't be reused ({error})"
            warnings.warn(what, stacklevel=2)
            return False
        return True


class KeptLayers:
    """The layers that an interrupted GPTQ has finished, a file each: `gptq.Layers`."""

    def __init__(self, spec: dict, device: torch.device, made_for: str):
        self._how = spec, device, made_for

    def _of_layer(self, layer: int | str) -> Kept:
        return Kept(*self._how, f".layer-{layer}.pt")

    def get(self, layer: int) -> Report | None:
        if contents := self._of_layer(layer).read():
            return Report(
                [ModuleReport(*module) for module in contents["modules"]],
                unpacked(contents["weights"]),
                contents["seconds"],
                contents.get("of", ""),
            )
        return None

    def put(self, layer: int, report: Report) -> None:
        modules = [astuple(module) for module in report.modules]
        about = {"modules": modules, "seconds": report.seconds, "of": report.of}
        self._of_layer(layer).write({"weights": packed(report.weights)} | about)

    def clear(self) -> None:
        every = self._of_layer("*").path  # with a star where the number stands: a pattern
        for path in every.parent.glob(every.name):
            with suppress(OSError):  # another process was faster, or it is no file
                path.unlink()


class KeptSteps(Kept):
    """How far an interrupted tuning has come: `tuning.Steps`."""

    def __init__(self, *how):
        super().__init__(*how, ".tuning.pt")

    get, put = Kept.read, Kept.write

    def clear(self) -> None:
        with suppress(OSError):  # it is done with, whatever becomes of it
            self.path.unlink()


def _sum(contents: object) -> str:
    """sha256 of everything, tensors bit by bit: a single flipped one makes it another."""
    digest = sha256()

    def add(thing: object) -> None:
        if isinstance(thing, torch.Tensor):
            digest.update(f"{thing.dtype} {tuple(thing.shape)}".encode())
            digest.update(thing.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        elif isinstance(thing, dict):
            for key in thing:
                digest.update(f"{key!r}:".encode())
                add(thing[key])
        elif isinstance(thing, list | tuple):
            digest.update(f"{len(thing)} of".encode())
            for one in thing:
                add(one)
        else:
            digest.update(f"{thing!r};".encode())

    add(contents)
    return digest.hexdigest()


def packed(weights: dict[str, QuantizedWeight]) -> dict[str, tuple]:
    """Plain tuples: a file is read without running code of ours."""
    return {name: tuple(weight) for name, weight in weights.items()}


def unpacked(weights: dict[str, tuple]) -> dict[str, QuantizedWeight]:
    """What `packed` was given."""
    return {name: QuantizedWeight(*parts) for name, parts in weights.items()}
