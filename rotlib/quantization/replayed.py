"""Many small kernels launched at once, on CUDA."""

from collections.abc import Callable

import torch
from torch import Tensor


class Replayed:
    """A function of tensors whose kernels a GPU launches all at once: it is recorded as a graph.

    A strip has hundreds of small ones, and to launch them one by one takes far longer than to run
    them. Elsewhere than on CUDA it is the function itself.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]):
        self._function = function
        self._recorded: dict[tuple, tuple] = {}

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        """What comes out is overwritten by the next call with tensors of these shapes."""
        if not given[0].is_cuda:
            return self._function(*given)
        key = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in given)
        if key not in self._recorded:
            self._recorded[key] = self._record(given)
        graph, inputs, outputs = self._recorded[key]
        for place, tensor in zip(inputs, given, strict=True):
            place.copy_(tensor)
        graph.replay()
        return outputs

    def _record(self, given: tuple[Tensor, ...]) -> tuple:
        inputs = [tensor.clone() for tensor in given]
        with torch.cuda.device(given[0].device):
            aside = torch.cuda.Stream()  # recording asks for a first run, apart from other work
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                self._function(*inputs)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = self._function(*inputs)
        return graph, inputs, outputs
