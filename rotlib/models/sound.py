"""Is a model fit to be worked on: evaluating, of one dtype, finite, with no hooks of others?"""

import torch
from torch.nn import Module
from torch.nn.modules import module as every_module
from transformers import PretrainedConfig, PreTrainedModel

from rotlib.checks import FLOATS, all_finite


def check_sound(model: PreTrainedModel) -> None:
    """Raises ValueError where a model is training, or its parameters aren't finite numbers.

    They are all of one dtype, too.
    """
    kinds = {str(parameter.dtype): name for name, parameter in model.named_parameters()}
    if len(kinds) > 1:
        found = ", ".join(f"{kind} ({name})" for kind, name in sorted(kinds.items()))
        raise ValueError(f"this model has parameters of several dtypes, {found}: give it one")
    if not kinds.keys() <= {*map(str, FLOATS)}:
        raise ValueError(
            f"this model's parameters are of {next(iter(kinds))}, which nothing is computed in: "
            "load it in float32, or in 16 bits"
        )
    check_surroundings()
    _check_turning(model)
    if getattr(model.config, "output_attentions", False):
        raise ValueError(
            "the config's output_attentions is on, which torch's own attention hasn't: set it to "
            "false"
        )
    if getattr(model.config, "return_dict", True) is False:
        raise ValueError("the config's return_dict is false, where outputs have no names: set it")
    if meta := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(f"{meta[0]} lies on the device 'meta', where weights have no values")
    if any(module.training for module in model.modules()):
        raise ValueError("this model is in training mode, where it may drop out: call model.eval()")
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"{name} was made in torch.inference_mode, and can't be changed outside it: load "
                "the model without"
            )
        if 0 in parameter.stride() and parameter.numel() > 1:
            raise ValueError(f"the entries of {name} share memory: give it a copy of its own")
        if not all_finite(parameter):
            raise ValueError(
                f"{name} holds NaN or infinite weights: load the model from a sound checkpoint, "
                "in a dtype that has room for it"
            )


def _check_turning(model: PreTrainedModel) -> None:
    """Raises ValueError where rotary embeddings turn by other angles than the config says.

    `model.bfloat16()` rounds their frequencies with the weights, which loading doesn't.
    """
    for name, module in model.named_modules():
        turns = name.endswith("rotary_emb") and not _moving(module.config)
        held = dict(module.named_buffers()) if turns else {}
        if any(buffer.is_meta for buffer in held.values()):
            continue
        with torch.device("cpu"):
            fresh = dict(type(module)(module.config).named_buffers()) if held else {}
        for buffer, values in held.items():
            if not torch.equal(values.float().cpu(), fresh[buffer]):
                raise ValueError(
                    f"{name}.{buffer} isn't what the config says, as after model.half() or "
                    "model.bfloat16(), which round it: load the model with rl.load(..., dtype=...)"
                )


def _moving(config: PretrainedConfig) -> bool:
    """Whether the frequencies follow the length of what was read last."""
    return any(kind in str(config.rope_parameters) for kind in ("dynamic", "longrope"))


def check_surroundings() -> None:
    """Raises ValueError for settings of torch under which numbers come out otherwise."""
    if torch.get_default_dtype() != torch.float32:
        raise ValueError(
            f"torch's default dtype is {torch.get_default_dtype()}: set it back to torch.float32, "
            "and load the model with the dtype that it shall have"
        )
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise ValueError("torch.autocast is on, which rounds what is measured here: leave it first")
    if torch.get_default_device().type == "meta":
        raise ValueError("torch's default device is 'meta', where tensors have no values: unset it")


def check_has_slopes(model: Module) -> None:
    """Raises ValueError where a loss has no slopes, or a backward hook would make others of them.

    There are none inside `torch.inference_mode`.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode is on, where nothing has a slope: leave it first")
    if every_module._global_backward_hooks or every_module._global_backward_pre_hooks:
        raise ValueError("a backward hook on all modules may change slopes: remove it first")
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise ValueError(
                f"{name or 'the model'} has a backward hook, which may change slopes: remove it "
                "first"
            )


def check_not_rounding(model: PreTrainedModel) -> None:
    """Raises ValueError inside `quantized_activations`.

    What follows would see rounded activations, or round them twice.
    """
    if getattr(model, "rotlib_rounding", False):
        raise ValueError(
            "this model's activations are being rounded: leave quantized_activations first"
        )


def check_not_hooked(model: PreTrainedModel) -> None:
    """Raises ValueError for others' hooks and forwards, which a rotation would mislead."""
    if every_module._global_forward_hooks or every_module._global_forward_pre_hooks:
        raise ValueError("a hook on all modules would see rotated states: remove it first")
    if hooked := [name for name, module in model.named_modules() if other_hooks(module)]:
        raise ValueError(
            f"{hooked[0] or 'the model'} has a hook, or a forward of its own, which would see "
            "rotated states: remove it first"
        )


def check_own_forward(module: Module, name: str, why: str) -> None:
    """Raises ValueError for a forward put on a module or a part of it, where it can't stay."""
    for path, part in module.named_modules():
        if "forward" in vars(part):
            raise ValueError(f"{path or name} has a forward of its own, {why}: remove it first")


def check_can_be_copied(module: Module, name: str) -> None:
    """Raises ValueError for a forward put on a module: its copy would still call the original."""
    check_own_forward(module, name, "which a copy of it would share with the original")


def other_hooks(module: Module) -> bool:
    """Whether somebody else's hooks or another `forward` change what a module computes.

    A norm computed more exactly is the same norm, and transformers' own hooks only look.
    """
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    mine = ("transformers.", "rotlib.")
    return "forward" in vars(module) or not all(
        str(getattr(hook, "__module__", "")).startswith(mine) for hook in hooks
    )
