"""What the numeric code computes, a stage at a time, on inputs so small that all take 3 seconds.

A canary is a function that returns a stage's numbers; beside it stand the constants that numbers
can't show: defaults, presets, schedules. `numerics.json` holds what they should be, and a result
notes the digests of the entries it read (`numerics.py`), so code may be rewritten freely as long as
it computes the same.

Rules for a canary: pure pieces (one gradient, one step, one grid), never a trajectory; float64
where the code allows it; codes far from the edge of rounding; matrices wider than the blocks that
code works in. Then processors agree to 1e-6. A new number or constant makes no result stale, a
changed or a dropped one does.
"""

# importing these four registers their canaries
from rotlib.study.canaries import of_learning, of_measures, of_quantization, of_rotations
from rotlib.study.canaries.inputs import covariance, inputs_on, noise
from rotlib.study.canaries.of_recipes import INPUTS
from rotlib.study.canaries.register import CANARIES, Canary, plain

__all__ = [
    "CANARIES",
    "INPUTS",
    "Canary",
    "covariance",
    "inputs_on",
    "noise",
    "of_learning",
    "of_measures",
    "of_quantization",
    "of_rotations",
    "plain",
]
