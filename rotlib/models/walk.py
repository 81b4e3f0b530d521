"""A model run by hand: hooks on its modules, and its decoder layers one at a time.

Only one layer's inputs exist at once, on the device where there is room for them, else on the host.
A model that doesn't fit its device is walked like any other: each layer goes there for its turn.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch
from accelerate.utils import send_to_device
from greenlet import getcurrent, greenlet
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from rotlib.models.families import Family
from rotlib.models.sound import other_hooks
from rotlib.models.zoo import free_memory
from rotlib.precision import coarse_products, model_products

BATCH_TOKENS = 16384  # tokens that go through a layer at a time
# hidden states stay on the device if so many copies of them fit there: those of two models, before
# and behind a layer, and what the layer works on
_COPIES = 6
# what a waiting token holds: so many times the width, and the width inside the MLP
_WAITING = 4, 2

NOT_FINITE = (
    "this model computes NaN or infinite states, though its weights are finite: its config.json is "
    "of another model, or they are beyond float16 (load it in float32)"
)

# what a decoder layer is called with: hidden states, and keywords by the type of the layer: masks
# and rotary embeddings
Batch = tuple[Tensor, dict[str | None, dict]]


class Stop(Exception):
    """A hook that has seen what it waits for raises it: the rest of the pass is needless."""


@contextmanager
def hooks(
    pairs: Iterable[tuple[nn.Module, Callable]], after: bool = False, with_kwargs: bool = False
) -> Iterator[None]:
    """While open, call each function before its module runs, or `after` it, like torch's hooks."""
    with ExitStack() as stack:
        for module, hook in pairs:
            register = module.register_forward_hook if after else module.register_forward_pre_hook
            stack.callback(register(hook, with_kwargs=with_kwargs).remove)
        yield


@contextmanager
def norms_in_model_dtype(model: PreTrainedModel) -> Iterator[None]:
    """Compute RMSNorms in the model's dtype while open.

    Transformers computes them in float32 even in a float64 model. The exactness of a fused rotation
    shows only so: float32 norms alone move float64 logits by 1e-6.
    """

    norms = (norm for norm in model.modules() if type(norm).__name__.endswith("RMSNorm"))
    with hooks(((norm, exact_norm) for norm in norms), after=True):
        yield


def exact_norm(norm: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """A hook on a norm: what it puts out, computed in the dtype of what it reads."""
    x = args[0]
    mean_square = x.square().mean(-1, keepdim=True)
    if hasattr(norm, "variance_epsilon"):
        return norm.weight * x * torch.rsqrt(mean_square + norm.variance_epsilon)
    return (1 + norm.weight) * x * torch.rsqrt(mean_square + norm.eps)  # Gemma's


def layer_inputs(
    family: Family, windows: Int[Tensor, "windows length"], at_a_time: int | None = None
) -> list[Batch]:
    """What the first decoder layer is called with, batch by batch.

    Masks and rotary embeddings are made inside transformers' decoder, so it is run, with layers
    that pass on what they read, as far as a layer of every type has been called. A batch has
    `at_a_time` windows, or as many as make up `BATCH_TOKENS`.
    """
    home = _home(family, windows)
    first = {_type_of(layer): layer for layer in reversed(family.layers)}  # of every type
    batches = []

    def catch(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        if layer is family.layers[0]:
            batches.append((_kept(args[0], home), {}))
        _, keywords = batches[-1]
        keywords[_type_of(layer)] = kwargs
        if len(keywords) == len(first):
            raise Stop

    with _passed_by(family), hooks([(layer, catch) for layer in first.values()], with_kwargs=True):
        for ids in windows.split(at_a_time or max(1, BATCH_TOKENS // windows.shape[1])):
            with suppress(Stop):
                run_decoder(family, ids)
    return batches


def _type_of(layer: nn.Module) -> str | None:
    """Such as "sliding_attention", where a model has layers of several types."""
    types = getattr(layer.self_attn.config, "layer_types", None)
    return types[layer.self_attn.layer_idx] if types else None


@contextmanager
def _passed_by(family: Family) -> Iterator[None]:
    """While open, the decoder layers hand on what they read."""
    own = [vars(layer).get("forward") for layer in family.layers]
    for layer in family.layers:
        layer.forward = lambda x, **_: x
    try:
        yield
    finally:
        for layer, forward in zip(family.layers, own, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def run_decoder(family: Family, ids: Int[Tensor, "windows length"]) -> None:
    """Run the decoder on some windows, for the sake of the hooks on its modules."""
    ids = ids.to(family.embedding.weight.device)
    with model_products(ids.device):
        family.decoder(input_ids=ids, use_cache=False)


def walk_layer(family: Family, layer: int, batches: list[Batch]) -> list[Batch]:
    """What the next layer is called with."""
    with family.on_device(family.layers[layer]):
        return [(run_layer(family.layers[layer], *batch), batch[1]) for batch in batches]


def run_layer(
    layer: nn.Module, x: Float[Tensor, "windows length d"], kwargs: dict, coarse: bool = False
) -> Tensor:
    """A decoder layer's output hidden states, where its inputs are; `coarse` for its slopes."""
    device = next(layer.parameters()).device
    with coarse_products() if coarse else model_products(device):
        return _through(layer, x, kwargs)


def _through(layer: nn.Module, x: Tensor, kwargs: dict) -> Tensor:
    device = next(layer.parameters()).device
    out = layer(x.to(device, non_blocking=True), **send_to_device(kwargs[_type_of(layer)], device))
    return _kept(out[0] if isinstance(out, tuple) else out, x.device)


class Passes:
    """Batches on their way through one layer, which wait together at one of its modules' inputs.

    So a weight can be changed when all have arrived there and none has passed. `waiting` batches
    wait where they are; the others, for which there is no room, start anew for every module. A
    batch waits as a greenlet: its call of the layer stands still in the middle, in one thread.
    """

    def __init__(self, layer: nn.Module, batches: list[Batch], waiting: int):
        self._layer, self._batches, self._room = layer, batches, waiting
        self._waiting: dict[int, greenlet] = {}

    def inputs(self, module: nn.Module) -> Iterator[Tensor]:
        """What each batch gives this module to read; the batch then waits there."""
        for number in range(len(self._batches)):
            with hooks([(module, _wait)]):
                run, read = self._go_on(number)
            if number < self._room:
                self._waiting[number] = run
            del run  # one that doesn't wait ends here
            yield read
            del read

    def outputs(self) -> list[Batch]:
        """What the next layer is called with."""
        every = range(len(self._batches))
        return [(self._go_on(number)[1], self._batches[number][1]) for number in every]

    def close(self) -> None:
        """Let go of what waits: an error's traceback would hold it."""
        self._waiting.clear()

    def _go_on(self, number: int) -> tuple[greenlet, Tensor]:
        """(a batch, the input that it has come to, or what comes out behind the layer)"""
        run = self._waiting.pop(number, None)
        begin = (self._layer, *self._batches[number]) if run is None else ()
        run = run or greenlet(_through)
        with model_products(next(self._layer.parameters()).device):
            return run, run.switch(*begin)


def batches_that_wait(family: Family, batches: list[Batch], streams: int = 1) -> int:
    """How many batches can wait inside a layer: a quarter of the free memory is theirs."""
    x, _ = batches[0]
    wide = family.inner_width
    states = _WAITING[0] * family.width + _WAITING[1] * wide  # of a token
    a_batch = streams * x.numel() // family.width * states * x.element_size()
    return max(1, free_memory(family.device) // (4 * a_batch))


def _wait(module: nn.Module, args: tuple) -> None:
    """A hook that hands what a module reads to whoever sent the batch, until that sends it on."""
    getcurrent().parent.switch(args[0])


@torch.no_grad()
def final_hidden(
    family: Family, windows: Int[Tensor, "windows length"]
) -> list[Float[Tensor, "length-1 d"]]:
    """What lm_head reads at every position of every window that has a next token.

    Raises ValueError where hooks on the whole model would change that: its parts are run by hand.
    """
    for module in (family.model, family.decoder):
        if other_hooks(module):
            raise ValueError(
                f"a hook, or another forward, on the {type(module).__name__} isn't called here, "
                "where its layers run one by one: remove it, or put it on the layers"
            )
    batches = layer_inputs(family, windows, at_a_time=1)
    for layer in range(len(family.layers)):
        batches = walk_layer(family, layer, batches)
    with family.on_device(family.final_norm):
        read = ((family.final_norm(x.to(family.device)), x.device) for x, _ in batches)
        return [_kept(x[0, :-1] * family.head_scale, home) for x, home in read]


def _home(family: Family, windows: Int[Tensor, "windows length"]) -> torch.device:
    """Where hidden states lie between layers."""
    size = windows.numel() * family.width * family.embedding.weight.element_size()
    if family.device.type == "cuda" and _COPIES * size < free_memory(family.device):
        return family.device
    return torch.device("cpu")


def _kept(x: Tensor, home: torch.device) -> Tensor:
    """x there; on the host in memory that a device copies from and to without a detour."""
    if x.device == home or not x.is_cuda:
        return x.to(home)
    return torch.empty(x.shape, dtype=x.dtype, device=home, pin_memory=True).copy_(x)
