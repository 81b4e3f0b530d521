"""One run of the study, described: model → rotation → rounded weights → rounded activations → evaluation.

A recipe is a dataclass whose defaults are the study's protocol; only what differs from them is its name, its hash and what
is stored. `pipeline.py` computes it. Recipes that differ in their activations alone share their weights.
"""

from dataclasses import asdict, dataclass, fields, replace

from rotlib.activations import FULL, PROTOCOLS, ActivationQuant
from rotlib.checks import inner_share, one_of, positive, whole_number, yes_or_no
from rotlib.objective import NORMALISATIONS
from rotlib.quant import WeightQuant
from rotlib.text import check_text

FIXED = ("random", "hadamard")
ON_ACTIVATIONS = ("kurtail", "mixed")
ON_WEIGHTS = ("optrot", "mixed")
LEARNED = ("optrot", "kurtail", "mixed")
ROTATIONS = ("none", *FIXED, *LEARNED)
ROUNDINGS = ("rtn", "gptq", "none")
ORDERS = ("weights-first", "activations-first")
_WEIGHT_GRID = tuple(field.name for field in fields(WeightQuant))
_ACTIVATION_GRID = ("activation_bits", "activation_group_size", "kv_bits", "protocol", "sinks")


@dataclass(frozen=True)
class Recipe:
    """One run; raises ValueError at construction for a value outside the choices, or one that would go unread.

    `activation_share` is λ of the rotation "mixed". `rounding` "none" keeps 16-bit weights. `order` "weights-first" calibrates
    GPTQ on unrounded activations, "activations-first" on rounded ones (as GPTAQ does, arXiv 2504.02692).
    """

    model: str = "smollm2-135m"
    text: str = "wikipedia-mini"
    rotation: str = "none"
    normalisation: str = "plain"
    activation_share: float | None = None
    R3: bool = False
    R4: bool = False
    rounding: str = "gptq"
    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True
    convention: str = "half"
    clip_search: bool = True
    act_order: bool = False
    damping: float = 0.01
    activation_bits: int = FULL
    activation_group_size: int | None = None
    kv_bits: int = FULL
    protocol: str = "rotlib"
    sinks: int = 0
    order: str = "weights-first"
    window: int = 1024
    calibration_windows: int = 16
    test_windows: int = 8
    seed: int = 0

    def __post_init__(self):
        if not isinstance(self.model, str):
            raise ValueError(f"a model is named by a string, not {self.model!r}")
        choices = {
            "rotation": ROTATIONS,
            "rounding": ROUNDINGS,
            "normalisation": NORMALISATIONS,
            "protocol": PROTOCOLS,
            "order": ORDERS,
        }
        for name, allowed in choices.items():
            one_of(name, getattr(self, name), allowed)
        for name, least in {"window": 2, "calibration_windows": 1, "test_windows": 1, "seed": 0}.items():
            whole_number(name, getattr(self, name), least)
        positive("damping", self.damping)
        for name in ("act_order", "R3", "R4"):
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
            "convention": (self.symmetric, "belongs to symmetric grids"),
            "normalisation": (self.rotation == "optrot", f"belongs to the rotation 'optrot', not to {self.rotation!r}"),
            "activation_share": (self.rotation == "mixed", f"belongs to the rotation 'mixed', not to {self.rotation!r}"),
            "R3": (self.kv_bits != FULL, "turns keys for their quantizer: it needs kv_bits below 16"),
            "activation_group_size": (self.activation_bits != FULL, "needs activation_bits below 16"),
            "sinks": (self.activation_bits != FULL, "needs activation_bits below 16"),
            "protocol": (rounded, "says how activations are rounded: it needs activation_bits or kv_bits below 16"),
            "order": (rounded and self.rounding == "gptq", "needs rounding 'gptq', and activation_bits or kv_bits below 16"),
        }
        unread |= dict.fromkeys(_WEIGHT_GRID, (self.rounding != "none", "belongs to rounded weights, not to rounding 'none'"))
        for name, (read, reason) in unread.items():
            if not read and name in self.spec():
                raise ValueError(f"{name} {reason}")

    @property
    def quant(self) -> WeightQuant:
        """The weight grid this recipe asks for."""
        return WeightQuant(**{name: getattr(self, name) for name in _WEIGHT_GRID})

    @property
    def activations(self) -> ActivationQuant:
        """The activation grids this recipe asks for."""
        return ActivationQuant(self.activation_bits, self.kv_bits, self.activation_group_size, self.protocol, self.sinks)

    @property
    def online(self) -> list[str]:
        """The online rotations that are on."""
        return [name for name in ("R3", "R4") if getattr(self, name)]

    @property
    def precision(self) -> str:
        """Such as W4A8 or W4A4KV4; 16 is unrounded."""
        weights = FULL if self.rounding == "none" else self.bits
        return f"W{weights}A{self.activation_bits}" + (f"KV{self.kv_bits}" if self.kv_bits != FULL else "")

    def sharing_weights(self) -> "Recipe":
        """The recipe that has this one's weights and nothing else of its own."""
        reset = {"test_windows": Recipe.test_windows}
        if self.order == "weights-first":
            reset |= {"R3": False} | {name: getattr(Recipe, name) for name in _ACTIVATION_GRID}
        return replace(self, **reset)

    def spec(self) -> dict:
        """What differs from the defaults; with `task`, this is the recipe's name in the store."""
        default = {f.name: f.default for f in fields(self)}
        return {"task": "quantize"} | {name: value for name, value in asdict(self).items() if value != default[name]}
