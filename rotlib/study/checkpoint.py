"""From a recipe to a checkpoint with its card."""

from pathlib import Path

import torch

from rotlib.checkpoints.folder import check_room, checked_folder
from rotlib.checkpoints.gguf_file import check_holds, cut_of
from rotlib.checkpoints.write import FORMATS, check_dtype, export
from rotlib.checks import one_of, yes_or_no
from rotlib.models.families import weights_sample
from rotlib.models.zoo import load_tokenizer, resolve
from rotlib.study import memory
from rotlib.study.card import model_card
from rotlib.study.files import local_path
from rotlib.study.pipeline import build, run
from rotlib.study.recipe import Recipe, check_recipe


def export_recipe(
    recipe: Recipe,
    folder: str | Path,
    format: str = "compressed-tensors",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    device: str = "auto",
) -> Path:
    """Run a recipe and export its model, its tokenizer and a card that says what was measured.

    Kept rotations, weights and results are used again. Raises like `run` and `export`, before the
    run where the recipe can't be exported.

    >>> recipe = Recipe(model=tiny, rounding="rtn", window=32, test_windows=2)
    >>> (export_recipe(recipe, folder / "W4") / "README.md").is_file()
    True
    """
    check_recipe("export_recipe", recipe)
    one_of("format", format, FORMATS)
    yes_or_no("overwrite", overwrite)
    check_dtype(format, dtype)
    folder = checked_folder(folder, overwrite, source=resolve(recipe.model))
    if recipe.online:
        raise ValueError(
            f"a plain checkpoint has no {' and '.join(recipe.online)}: "
            "leave the online rotations out of the recipe"
        )
    if format == "gguf":
        check_holds(recipe.quant)
        cut_of(load_tokenizer(recipe.model))
    if (format == "fused") != (recipe.rounding == "none"):
        raise ValueError(
            "'fused' goes with the rounding 'none', the packed formats with 'rtn' and 'gptq'"
        )
    check_room(folder, memory.least_on_disk(recipe, dtype or torch.float32))
    result = run(recipe, device)
    model, tokenizer = build(recipe, device)
    if result.provenance.get("weights") != weights_sample(model):
        # what was measured is kept no more, and made again it may differ in the last bits
        del model
        local_path(recipe.spec()).unlink(missing_ok=True)
        result = run(recipe, device)
        model, tokenizer = build(recipe, device)
    card = model_card(recipe, result, format)
    return export(model, folder, format, tokenizer, card, dtype, overwrite)
