"""One run of the study, described: model → rotation → weights → activations → evaluation.

A recipe is a dataclass whose defaults are the study's protocol; only what differs from them is its
name, its hash and what is stored. `pipeline.py` computes it. Recipes that differ in their
activations alone share their weights.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

from rotlib.checks import inner_share, one_of, positive, share, whole_number, yes_or_no
from rotlib.learning.network import PRESETS
from rotlib.learning.optrot_plus import FORMS
from rotlib.models.names import check_name
from rotlib.models.text import check_text
from rotlib.quantization.activations import FULL, PROTOCOLS, ActivationQuant
from rotlib.quantization.coordinate import MOST_SWEEPS
from rotlib.quantization.fp4 import FP4
from rotlib.quantization.grids import CLIP_NORM, GRIDS, WeightQuant
from rotlib.quantization.hessian import LEAST_CAP
from rotlib.rotations.drawn import DRAWN, R1_ORDERS
from rotlib.rotations.rotation import Rotation

STARTS = ("hadamard", "gsr")
ROUNDINGS = ("rtn", "gptq", "none")
ORDERS = ("weights-first", "activations-first")
LEARNED_ON = ("weights", "activations")
THROUGH_NETWORK = ("spinquant", "ostquant")

# what a checkpoint of one's own is made with; the study's arms keep the papers' protocols
_CODES = {"act_order": True, "asymmetry": 0.25, "convention": "signed"}
_BETTER_CODES = _CODES | {
    "rotation": "optrot",
    "scale_search": True,
    "descent": 3,
    "loss_weighted": True,
}
QUALITIES = {
    "fast": _CODES | {"rotation": "hadamard", "stream_weighted": True},
    "good": _BETTER_CODES | {"calibration_windows": 32},
    "best": _BETTER_CODES | {"calibration_windows": 112, "tuning": 64},
}

_HADAMARD_R1 = ("block", "R1_order", "signs")
_CALIBRATION = ("text", "window", "calibration_windows")
_LEARNING = ("text", "window", "learning_windows", "steps")
_STARTING = ("start", *_HADAMARD_R1, "local")
# what the learning of a rotation reads of a recipe, besides model and seed; through the network
# also the grid that is learned on
LEARNED = {
    "optrot": ("R4", "steps", "grouped", *_STARTING),
    "optrot+": ("form", "R4", *_LEARNING),
    "kurtail": _CALIBRATION,
    "mixed": ("activation_share", "R4", *_CALIBRATION),
    "spinquant": ("learned_on", "preset", "R4", *_LEARNING, *_STARTING),
    "ostquant": ("learned_on", "preset", "R4", *_LEARNING, *_STARTING),
}
# and the making of any
READS = LEARNED | {"gsr": _HADAMARD_R1, "klt": ("text", "window", "learning_windows")}
# the settings that some learned rotations read and nothing else does
_LEARNERS_OWN = (
    *("activation_share", "form", "learned_on", "learned_bits", "preset", "learning_windows"),
    *("steps", "lr", "grouped", "start", "local"),
)
# what makes a rotation: recipes that differ in nothing else share all but that
MAKES = {"rotation", "seed", "R3", "R4", *_HADAMARD_R1, *_LEARNERS_OWN}
_WEIGHT_GRID = tuple(field.name for field in fields(WeightQuant))
_FIXED_BY_FP4 = ("bits", "group_size", "symmetric", "convention")
_GPTQ = (
    *("act_order", "asymmetry", "static_groups", "scale_search", "descent", "refit"),
    *("token_cap", "stream_weighted", "loss_weighted"),
)
_ACTIVATION_GRID = ("activation_bits", "activation_grid", "kv_bits", "protocol", "sinks")
# what was kept before there were these settings keeps its name
_LATER = (
    *("lr", "activation_grid", "clip_norm", "learned_bits"),
    *("token_cap", "stream_weighted", "loss_weighted"),
)

_PLAIN = {str: str.__str__, int: int.__int__, float: float.__float__}

SHIPPED = ("none", *DRAWN, "gsr", *LEARNED, "klt")  # the rotations that come with rotlib
# rotations of one's own, by name: `own.register_rotation` fills it
OWN: dict[str, Callable[..., Rotation]] = {}


def rotations() -> tuple[str, ...]:
    """What a recipe's rotation can be."""
    return (*SHIPPED, *OWN)


def check_recipe(name: str, recipe: object) -> None:
    """Raises ValueError, naming the function, for what is no recipe."""
    if not isinstance(recipe, Recipe):
        raise ValueError(
            f"{name} takes a Recipe, such as rl.Recipe(rotation='optrot'), not a "
            f"{type(recipe).__name__}"
        )


@dataclass(frozen=True)
class Recipe:
    """One run; what differs from the defaults is its name.

    The rotation "gsr" is `gsr_rotation` with `block`, `R1_order` and `signs`; one that is learned
    from the `start` "gsr" begins there, and where it is `local` stays in those blocks. "klt" is
    `klt_rotation` of the learning windows. `grouped` learns OptRot's objective for the grid's
    groups. `activation_share` is λ of "mixed", `form` OptRot+'s; "spinquant" and "ostquant" learn
    with what `learned_on` names rounded on this recipe's grid, or activations to `learned_bits`
    whatever is evaluated, by a `preset` whose `steps` and `lr` can be replaced. `rounding` "none"
    keeps 16-bit weights; `act_order`, `asymmetry`, `static_groups`, `scale_search`, `descent`,
    `refit`, `token_cap`, `stream_weighted` and `loss_weighted` are `gptq`'s; `tuning` is how many
    steps scales and gains are tuned for, each on a window of its own, and further ones are held
    out. `order` "weights-first" calibrates GPTQ on unrounded activations, "activations-first" on
    rounded ones. Raises ValueError at construction for a value outside the choices, or one that
    would go unread.

    >>> Recipe(rotation="optrot", bits=3).spec()
    {'task': 'quantize', 'rotation': 'optrot', 'bits': 3}
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
    activation_share: float | None = None
    form: str = FORMS[0]
    learned_on: str = "weights"
    learned_bits: int | None = None
    preset: str = "laptop"
    steps: int | None = None
    lr: float | None = None
    R3: bool = False
    R4: bool = False
    rounding: str = "gptq"
    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True
    convention: str = "half"
    clip_search: bool = True
    clip_norm: float = CLIP_NORM
    grid: str = GRIDS[0]
    act_order: bool = False
    asymmetry: float = 0.0
    static_groups: bool = False
    scale_search: bool = False
    descent: int = 0
    refit: bool = False
    token_cap: float | None = None
    stream_weighted: bool = False
    loss_weighted: bool = False
    tuning: int = 0
    activation_bits: int = FULL
    activation_grid: str = GRIDS[0]
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
        for field in fields(self):  # a scalar of numpy's, or of an enum, goes into no file
            value = getattr(self, field.name)
            for kind, plain in _PLAIN.items():
                if isinstance(value, kind) and type(value) not in (bool, kind):
                    object.__setattr__(self, field.name, plain(value))
        check_name(self.model)
        choices = {
            "rotation": rotations(),
            "R1_order": R1_ORDERS,
            "start": STARTS,
            "rounding": ROUNDINGS,
            "protocol": PROTOCOLS,
            "order": ORDERS,
            "form": FORMS,
            "learned_on": LEARNED_ON,
            "preset": PRESETS,
            "grid": GRIDS,
            "activation_grid": GRIDS,
        }
        for name, allowed in choices.items():
            one_of(name, getattr(self, name), allowed)
        counts = ("calibration_windows", "learning_windows", "test_windows")
        whole_number("descent", self.descent, 0, MOST_SWEEPS)
        least_of = {"window": 2, **dict.fromkeys(counts, 1), "seed": 0, "tuning": 0}
        for name, least in least_of.items():
            whole_number(name, getattr(self, name), least)
        for name in ("steps", "block"):
            if getattr(self, name) is not None:
                whole_number(f"{name} (unless it is None)", getattr(self, name), 1)
        if self.learned_bits is not None:
            whole_number("learned_bits (unless it is None)", self.learned_bits, 2, 8)
        if self.lr is not None:
            positive("lr (unless it is None)", self.lr)
            object.__setattr__(self, "lr", float(self.lr))  # 1 and 1.0 are one arm
        if self.learned_activations.rounds and self.sinks >= self.window:
            raise ValueError(
                f"{self.sinks} sinks leave nothing to round in windows of {self.window} tokens: "
                "take fewer sinks or longer windows"
            )
        positive("clip_norm", self.clip_norm)
        object.__setattr__(self, "clip_norm", float(self.clip_norm))  # 2 and 2.0 are one arm
        if self.token_cap is not None:
            positive("token_cap", self.token_cap, LEAST_CAP)
            object.__setattr__(self, "token_cap", float(self.token_cap))
        share("asymmetry", self.asymmetry)
        object.__setattr__(self, "asymmetry", float(self.asymmetry))  # 1 and 1.0 are one arm
        for name in (
            "act_order",
            "static_groups",
            "scale_search",
            "refit",
            "stream_weighted",
            "loss_weighted",
            "R3",
            "R4",
            "signs",
            "local",
            "grouped",
        ):
            yes_or_no(name, getattr(self, name))
        check_text(self.text)
        given = self.spec()
        for name, reason in self._unread():
            if name in given:  # a setting without effect would name two arms for one computation
                raise ValueError(f"{name} {reason}")
        self.quant  # noqa: B018 - checks bits, groups and convention
        self._check_together()

    def _unread(self) -> Iterator[tuple[str, str]]:
        """(setting, what would have to be so) for every setting that this recipe doesn't read."""
        rounded = self.activations.rounds
        if self.grid in FP4:
            for name in _FIXED_BY_FP4:
                yield name, f"belongs to integer grids, and {self.grid} has its own"
            for name in ("tuning", "refit"):
                yield name, f"moves scales freely, and {self.grid} hasn't all numbers for them"
        if self.grid == "mxfp4":
            yield "scale_search", "tries scales nearby, and mxfp4's are powers of two"
        if self.rounding == "none":
            for name in (*_WEIGHT_GRID, "tuning"):
                yield name, "belongs to rounded weights, not to rounding 'none'"
        if self.rounding != "gptq":
            yield "act_order", "orders GPTQ's columns: it needs rounding 'gptq'"
            yield "asymmetry", "corrects GPTQ for its inputs' drift: it needs rounding 'gptq'"
            yield "static_groups", "is about GPTQ's groups: it needs rounding 'gptq'"
            yield "scale_search", "goes by GPTQ's error: it needs rounding 'gptq'"
            yield "descent", "goes on from GPTQ's codes: it needs rounding 'gptq'"
            yield "refit", "fits scales to GPTQ's codes: it needs rounding 'gptq'"
            for name in ("token_cap", "stream_weighted", "loss_weighted"):
                yield name, "weighs the tokens that GPTQ learns from: it needs rounding 'gptq'"
        if (self.group_size is None and self.grid not in FP4) or self.act_order:
            needs = "it needs a group_size, and act_order has them already"
            yield "static_groups", f"keeps groups the scales of the original weights: {needs}"
        if self.rounding != "gptq" or not rounded:
            yield "order", "needs rounding 'gptq', and activation_bits or kv_bits below 16"
        if self.loss_weighted:
            yield "stream_weighted", "is part of loss_weighted: leave it out"
        if not self.clip_search:
            yield "clip_norm", "is what clip_search goes by"
        if not self.symmetric:
            yield "convention", "belongs to symmetric grids"
        if self.kv_bits == FULL:
            yield "R3", "turns keys for their quantizer: it needs kv_bits below 16"
        if self.activation_bits == FULL and self.learned_bits is None:
            yield "sinks", "needs activation_bits below 16"
        if not rounded and self.learned_bits is None:
            needs = "it needs activation_bits or kv_bits below 16"
            yield "protocol", f"says how activations are rounded: {needs}"
        if self.activation_grid in FP4 and self.kv_bits == FULL:
            yield "protocol", f"says how integers are rounded: inputs are {self.activation_grid}"
        if self.rotation != "gsr" and self.start != "gsr":
            for name in _HADAMARD_R1:
                needs = "it needs the rotation 'gsr' or the start 'gsr'"
                yield name, f"describes a Hadamard R1: {needs}"
        for name in _LEARNERS_OWN:
            methods = [rotation for rotation, read in READS.items() if name in read]
            methods = THROUGH_NETWORK if name in ("lr", "learned_bits") else methods
            if self.rotation not in methods:
                belongs = f"belongs to the rotations {', '.join(methods)}"
                yield name, f"{belongs}, not to {self.rotation!r}"

    def _check_together(self) -> None:
        """Raises ValueError where one setting asks for another."""
        if self.rotation == "mixed":
            inner_share("activation_share", self.activation_share)
        if self.local and (self.start != "gsr" or self.block is None):
            raise ValueError("local keeps R1 in blocks: it needs the start 'gsr' and a block")
        if self.grouped and self.quant.group_size is None:
            raise ValueError("grouped learns for groups of weights: it needs a group_size")
        if self.rotation in THROUGH_NETWORK:
            if self.learned_on == "activations" and not self.learned_activations.rounds:
                raise ValueError(
                    "learned_on 'activations' needs activation_bits, kv_bits or learned_bits below "
                    "16"
                )
            if self.learned_bits is not None and self.learned_on == "weights":
                raise ValueError(
                    "learned_bits are of activations: they need learned_on 'activations'"
                )
            if self.learned_bits == self.activation_bits:
                raise ValueError(
                    f"learned_bits {self.learned_bits} are the activation_bits: leave it out"
                )
            if self.learned_on == "weights" and self.grid in FP4:
                raise ValueError(
                    f"{self.rotation} learns on integer grids: choose learned_on 'activations'"
                )
            if self.learned_on == "weights" and self.rounding == "none":
                raise ValueError(
                    "learned_on 'weights' needs weights that are rounded: choose the rounding "
                    "'rtn' or 'gptq'"
                )

    @classmethod
    def of_quality(cls, quality: str, **settings: object) -> "Recipe":
        """The recipe of a checkpoint, "fast", "good" or "best"; other settings as they are given.

        Raises ValueError for another word, or like `Recipe`.

        >>> Recipe.of_quality("good", bits=3).calibration_windows
        32
        """
        one_of("quality", quality, QUALITIES)
        one_of("grid", settings.get("grid", GRIDS[0]), GRIDS)
        if settings.get("rounding", cls.rounding) != cls.rounding:
            raise ValueError(
                f"quality {quality!r} is of {cls.rounding}'s codes: leave rounding out"
            )
        made_of = dict(QUALITIES[quality])
        if not settings.get("symmetric", True) or settings.get("grid", GRIDS[0]) in FP4:
            del made_of["convention"]
        if settings.get("grid", GRIDS[0]) in FP4:
            made_of.pop("tuning", None)
        if settings.get("grid") == "mxfp4":
            made_of.pop("scale_search", None)
        if settings.get("loss_weighted"):
            made_of.pop("stream_weighted", None)
        return cls(**made_of | settings)

    @property
    def quant(self) -> WeightQuant:
        """The weight grid this recipe asks for."""
        return WeightQuant(**{name: getattr(self, name) for name in _WEIGHT_GRID})

    @property
    def activations(self) -> ActivationQuant:
        """The activation grids this recipe asks for."""
        return ActivationQuant(
            self.activation_bits, self.kv_bits, self.protocol, self.sinks, self.activation_grid
        )

    @property
    def of_runtime(self) -> ActivationQuant | None:
        """What a checkpoint of this recipe asks whoever runs it to round."""
        return self.activations if self.protocol == "compressed-tensors" else None

    @property
    def gptq_settings(self) -> dict:
        """What `gptq` is asked for besides the grid."""
        return {name: getattr(self, name) for name in _GPTQ}

    @property
    def rotation_reads(self) -> dict:
        """The settings that this recipe's rotation depends on, R3 and R4 apart."""
        read = READS.get(self.rotation, ())
        names = {"lr", "model", "rotation", "seed", *read, *self.learned_through}
        given = self.spec()
        found = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name in names and (field.name not in _LATER or field.name in given)
        }
        return found | ({"group_size": self.quant.group_size} if self.grouped else {})

    def of_rotation(self, *others: str) -> "Recipe":
        """The recipe that has this one's rotation and R4, and of its other settings only these.

        Raises ValueError for what is no setting.
        """
        for name in others:
            one_of("setting", name, vars(self))
        others_of_it = {name: getattr(self, name) for name in ("R4", *others)}
        return Recipe(**self.rotation_reads | others_of_it)

    @property
    def learned_through(self) -> tuple[str, ...]:
        """The fields that say which grid the rotation is learned for, or through."""
        if self.rotation not in THROUGH_NETWORK:
            return ("group_size",) if self.grouped else ()
        if self.learned_on == "weights":
            return tuple(name for name in _WEIGHT_GRID if name != "grid")  # always integers
        if self.learned_bits is None:
            return (*_ACTIVATION_GRID, "R3")
        return ("learned_bits", *_ACTIVATION_GRID[1:], "R3")

    @property
    def learned_grid(self) -> dict:
        """What is rounded while a rotation is learned through the network, by its keyword there."""
        if self.learned_on == "weights":
            return {"quant": self.quant}
        return {"activations": self.learned_activations}

    @property
    def learned_activations(self) -> ActivationQuant:
        """The activation grids that a rotation is learned through."""
        if self.learned_bits is None:
            return self.activations
        return replace(self.activations, bits=self.learned_bits)

    @property
    def online(self) -> list[str]:
        """The online rotations that are on."""
        return Rotation(None, None, self.R3, self.R4).online

    @property
    def precision(self) -> str:
        """Such as W4A8, W4A4KV4, W4A16 NVFP4 or W4A4 int/NVFP4; 16 is unrounded."""
        weights = FULL if self.rounding == "none" else self.bits
        cache = f"KV{self.kv_bits}" if self.kv_bits != FULL else ""
        named = f"W{weights}A{self.activation_bits}{cache}"
        of_inputs = self.grid if self.activation_bits == FULL else self.activation_grid
        grids = dict.fromkeys([self.grid, of_inputs])
        if not grids.keys() & {*FP4}:
            return named
        return f"{named} {'/'.join(grid.upper() if grid in FP4 else grid for grid in grids)}"

    def sharing_weights(self) -> "Recipe":
        """The recipe that has this one's weights and nothing else of its own."""
        reset = {"test_windows": Recipe.test_windows}
        if self.order == "weights-first":
            unrounded = {name: getattr(Recipe, name) for name in ("R3", *_ACTIVATION_GRID)}
            learned = self.learned_through
            reset |= {name: value for name, value in unrounded.items() if name not in learned}
        return replace(self, **reset)

    def spec(self) -> dict:
        """What differs from the defaults; with `task`, this is the recipe's name in the store."""
        values = ((field.name, getattr(self, field.name), field.default) for field in fields(self))
        given = {name: value for name, value, default in values if value != default}
        return {"task": "quantize"} | given
