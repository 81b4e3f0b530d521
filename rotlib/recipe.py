"""One run of the study, described: model → rotation → rounded weights → rounded activations → evaluation.

A recipe is a dataclass whose defaults are the study's protocol; only what differs from them is its name, its hash and what
is stored. `pipeline.py` computes it. Recipes that differ in their activations alone share their weights.
"""

from dataclasses import asdict, dataclass, fields, replace

import rotlib.own  # noqa: F401 - what it adds to DRAWN
from rotlib.activations import FULL, PROTOCOLS, ActivationQuant
from rotlib.checks import inner_share, one_of, positive, share, whole_number, yes_or_no
from rotlib.covariance import DAMPING
from rotlib.fixed import DRAWN, R1_ORDERS
from rotlib.objective import NORMALISATIONS
from rotlib.optrot_plus import FORMS
from rotlib.ostquant import KL_TOP_FORMS, OSTQUANT_PRESETS
from rotlib.quant import WeightQuant
from rotlib.rotation import Rotation
from rotlib.text import check_text

_HADAMARD_R1 = ("block", "R1_order", "signs")
STARTS = ("hadamard", "gsr")
THROUGH_NETWORK = ("spinquant", "ostquant")
_CALIBRATION = ("text", "window", "calibration_windows")
_LEARNING = ("text", "window", "learning_windows", "steps")
_STARTING = ("start", *_HADAMARD_R1, "local")
# what the learning of a rotation reads of a recipe, besides model and seed; through the network also the grid that is learned on
LEARNED = {
    "optrot": ("normalisation", "R4", "steps", "grouped", *_STARTING),
    "optrot+": ("form", "R4", *_LEARNING),
    "kurtail": _CALIBRATION,
    "mixed": ("activation_share", "R4", *_CALIBRATION),
    "spinquant": ("learned_on", "preset", "R4", *_LEARNING, *_STARTING),
    "ostquant": ("learned_on", "preset", "kl_top", "R4", *_LEARNING, *_STARTING),
}
ROUNDINGS = ("rtn", "gptq", "none")
ORDERS = ("weights-first", "activations-first")
LEARNED_ON = ("weights", "activations")
_WEIGHT_GRID = tuple(field.name for field in fields(WeightQuant))
_ACTIVATION_GRID = ("activation_bits", "activation_group_size", "kv_bits", "protocol", "sinks")
_OF_LEARNING = (
    "normalisation", "activation_share", "form", "learned_on", "preset", "kl_top", "learning_windows", "steps", "grouped", "start", "local",
)  # fmt: skip


def rotations() -> tuple[str, ...]:
    """What a recipe's rotation can be."""
    return ("none", *DRAWN, "gsr", *LEARNED)


@dataclass(frozen=True)
class Recipe:
    """One run; raises ValueError at construction for a value outside the choices, or one that would go unread.

    The rotation "gsr" is `gsr_rotation` with `block`, `R1_order` and `signs`; one that is learned from the `start` "gsr" begins there, and
    where it is `local` stays in those blocks. `grouped` learns OptRot's objective for groups of `group_size`. `activation_share` is λ of
    "mixed", `form` OptRot+'s; "spinquant" and "ostquant" learn with what `learned_on` names rounded on this recipe's grid, by a `preset`
    whose `steps` can be replaced. `rounding` "none" keeps 16-bit weights; `asymmetry` is GPTAQ's α. `order` "weights-first" calibrates
    GPTQ on unrounded activations, "activations-first" on rounded ones (as GPTAQ does, arXiv 2504.02692).
    """

    model: str = "smollm2-135m"
    text: str = "wikipedia-mini"
    rotation: str = "none"
    block: int | None = None
    R1_order: str = R1_ORDERS[0]
    signs: bool = False
    start: str = STARTS[0]
    local: bool = False
    grouped: bool = False
    normalisation: str = "plain"
    activation_share: float | None = None
    form: str = FORMS[0]
    learned_on: str = "weights"
    preset: str = "laptop"
    kl_top: str = "gathered"
    steps: int | None = None
    R3: bool = False
    R4: bool = False
    rounding: str = "gptq"
    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True
    convention: str = "half"
    clip_search: bool = True
    act_order: bool = False
    damping: float = DAMPING
    asymmetry: float = 0.0
    activation_bits: int = FULL
    activation_group_size: int | None = None
    kv_bits: int = FULL
    protocol: str = "rotlib"
    sinks: int = 0
    order: str = "weights-first"
    window: int = 1024
    calibration_windows: int = 16
    learning_windows: int = 32
    test_windows: int = 8
    seed: int = 0

    def __post_init__(self):
        if not isinstance(self.model, str):
            raise ValueError(f"a model is named by a string, not {self.model!r}")
        choices = {
            "rotation": rotations(),
            "R1_order": R1_ORDERS,
            "start": STARTS,
            "rounding": ROUNDINGS,
            "normalisation": NORMALISATIONS,
            "protocol": PROTOCOLS,
            "order": ORDERS,
            "form": FORMS,
            "learned_on": LEARNED_ON,
            "preset": OSTQUANT_PRESETS,
            "kl_top": KL_TOP_FORMS,
        }
        for name, allowed in choices.items():
            one_of(name, getattr(self, name), allowed)
        for name, least in {"window": 2, "calibration_windows": 1, "learning_windows": 1, "test_windows": 1, "seed": 0}.items():
            whole_number(name, getattr(self, name), least)
        if self.steps is not None:
            whole_number("steps (unless it is None)", self.steps, 1)
        positive("damping", self.damping)
        share("asymmetry", self.asymmetry)
        if self.block is not None:
            whole_number("block (unless it is None)", self.block, 1)
        for name in ("act_order", "R3", "R4", "signs", "local", "grouped"):
            yes_or_no(name, getattr(self, name))
        check_text(self.text)
        self.quant, self.activations  # noqa: B018 - check bits, groups and convention
        self._check_everything_is_read()

    def _check_everything_is_read(self) -> None:
        """A setting without effect would name two arms for one computation."""
        if self.rotation == "mixed":
            inner_share("activation_share", self.activation_share)
        rounded = self.activation_bits != FULL or self.kv_bits != FULL
        unread = {
            "act_order": (self.rounding == "gptq", "orders GPTQ's columns: it needs rounding 'gptq'"),
            "damping": (self.rounding == "gptq", "belongs to GPTQ's Hessian: it needs rounding 'gptq'"),
            "asymmetry": (self.rounding == "gptq", "corrects GPTQ for its inputs' drift: it needs rounding 'gptq'"),
            "convention": (self.symmetric, "belongs to symmetric grids"),
            "R3": (self.kv_bits != FULL, "turns keys for their quantizer: it needs kv_bits below 16"),
            "sinks": (self.activation_bits != FULL, "needs activation_bits below 16"),
            "protocol": (rounded, "says how activations are rounded: it needs activation_bits or kv_bits below 16"),
            "order": (rounded and self.rounding == "gptq", "needs rounding 'gptq', and activation_bits or kv_bits below 16"),
        }
        hadamard_R1 = self.rotation == "gsr" or self.start == "gsr"
        unread |= dict.fromkeys(_HADAMARD_R1, (hadamard_R1, "describes a Hadamard R1: it needs the rotation 'gsr' or the start 'gsr'"))
        for name in _OF_LEARNING:
            methods = [rotation for rotation, read in LEARNED.items() if name in read]
            reason = f"belongs to the rotations {', '.join(methods)}, not to {self.rotation!r}"
            unread[name] = (self.rotation in methods, reason)
        unread |= dict.fromkeys(_WEIGHT_GRID, (self.rounding != "none", "belongs to rounded weights, not to rounding 'none'"))
        for name, (read, reason) in unread.items():
            if not read and name in self.spec():
                raise ValueError(f"{name} {reason}")
        if self.local and (self.start != "gsr" or self.block is None):
            raise ValueError("local keeps R1 in blocks: it needs the start 'gsr' and a block")
        if self.grouped and (self.group_size is None or self.normalisation != "plain"):
            raise ValueError("grouped learns for groups of weights: it needs a group_size, and the normalisation 'plain'")
        if self.rotation in THROUGH_NETWORK:
            if self.learned_on == "activations" and not rounded:
                raise ValueError("learned_on 'activations' needs activation_bits or kv_bits below 16")
            if self.learned_on == "weights" and self.rounding == "none":
                raise ValueError("learned_on 'weights' needs weights that are rounded: choose the rounding 'rtn' or 'gptq'")

    @property
    def quant(self) -> WeightQuant:
        """The weight grid this recipe asks for."""
        return WeightQuant(**{name: getattr(self, name) for name in _WEIGHT_GRID})

    @property
    def activations(self) -> ActivationQuant:
        """The activation grids this recipe asks for."""
        return ActivationQuant(self.activation_bits, self.kv_bits, self.activation_group_size, self.protocol, self.sinks)

    @property
    def rotation_reads(self) -> dict:
        """The settings that this recipe's rotation depends on, R3 and R4 apart."""
        read = _HADAMARD_R1 if self.rotation == "gsr" else LEARNED.get(self.rotation, ())
        return {name: getattr(self, name) for name in ("model", "rotation", "seed", *read, *self.learned_through)}

    def of_rotation(self, *others: str) -> "Recipe":
        """The recipe that has this one's rotation, with R4, and of its other settings only these."""
        return Recipe(**self.rotation_reads | {name: getattr(self, name) for name in ("R4", *others)})

    @property
    def learned_through(self) -> tuple[str, ...]:
        """The fields that say which grid the rotation is learned for, or through."""
        if self.rotation not in THROUGH_NETWORK:
            return ("group_size",) if self.grouped else ()
        return _WEIGHT_GRID if self.learned_on == "weights" else (*_ACTIVATION_GRID, "R3")

    @property
    def online(self) -> list[str]:
        """The online rotations that are on."""
        return Rotation(None, None, self.R3, self.R4).online

    @property
    def precision(self) -> str:
        """Such as W4A8 or W4A4KV4; 16 is unrounded."""
        weights = FULL if self.rounding == "none" else self.bits
        return f"W{weights}A{self.activation_bits}" + (f"KV{self.kv_bits}" if self.kv_bits != FULL else "")

    def sharing_weights(self) -> "Recipe":
        """The recipe that has this one's weights and nothing else of its own."""
        reset = {"test_windows": Recipe.test_windows}
        if self.order == "weights-first":
            activations = {"R3": False} | {name: getattr(Recipe, name) for name in _ACTIVATION_GRID}
            reset |= {name: value for name, value in activations.items() if name not in self.learned_through}
        return replace(self, **reset)

    def spec(self) -> dict:
        """What differs from the defaults; with `task`, this is the recipe's name in the store."""
        default = {f.name: f.default for f in fields(self)}
        return {"task": "quantize"} | {name: value for name, value in asdict(self).items() if value != default[name]}
