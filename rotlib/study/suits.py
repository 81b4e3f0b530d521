"""Does a recipe suit its model? The config alone tells, before any work."""

from rotlib.checks import window_fits
from rotlib.models.supported import check_has_R1, check_no_experts
from rotlib.rotations.drawn import gsr_rotation
from rotlib.rotations.online import check_online
from rotlib.study.memory import outline
from rotlib.study.recipe import LEARNED, THROUGH_NETWORK, Recipe


def check_suits(recipe: Recipe) -> None:
    """Raises ValueError, as the run would, for groups, blocks and windows that the model hasn't.

    >>> check_suits(Recipe(model=tiny, group_size=7))
    Traceback (most recent call last):
    ValueError: group_size 7 doesn't divide the 48 inputs of q_proj
    """
    family, _ = outline(recipe.model)
    if recipe.rounding != "none":
        for site, linear in family.linears(0).items():
            recipe.quant.check_width(linear.in_features, f"{site}_proj")
    if recipe.rotation in {*LEARNED, "klt"} - {"optrot"}:
        check_has_R1(family, recipe.rotation)
    if "gsr" in (recipe.rotation, recipe.start):
        gsr_rotation(family.model, recipe.R1_order, recipe.block)
    if recipe.rotation in {*THROUGH_NETWORK, "optrot+"}:
        check_no_experts(family, recipe.rotation)
    if recipe.sinks:
        check_no_experts(family, "leaving sinks alone")
    check_online(family, recipe.online)
    window_fits("the recipe", recipe.window, family.model)
