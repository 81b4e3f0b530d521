"""From a recipe to a checkpoint with its card.

    python -m rotlib.study.checkpoint Qwen/Qwen3-0.6B checkpoints/qwen --quality best

does it from the command line.
"""

import argparse
import sys
from pathlib import Path

import torch

from rotlib.checkpoints.folder import check_room, checked_folder
from rotlib.checkpoints.gguf_file import check_family, check_holds
from rotlib.checkpoints.packed import INPUTS, check_fp4_dtype, check_grid, check_inputs
from rotlib.checkpoints.write import FORMATS, check_dtype, check_vocabulary, export
from rotlib.checks import one_of, yes_or_no
from rotlib.models.content import weights_sample
from rotlib.models.gguf_tokenizer import cut_of
from rotlib.models.names import source_of
from rotlib.models.zoo import load_tokenizer
from rotlib.quantization.activations import FULL
from rotlib.quantization.fp4 import FP4
from rotlib.quantization.grids import GRIDS
from rotlib.study import memory
from rotlib.study.card import model_card
from rotlib.study.files import local_path, print_any_name, spec_hash
from rotlib.study.pipeline import build, run
from rotlib.study.recipe import QUALITIES, Recipe, check_recipe
from rotlib.study.suits import check_suits
from rotlib.study.sweep import estimates_of


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
    if recipe.grid in FP4:
        check_fp4_dtype(dtype)
    folder = checked_folder(folder, overwrite, source=source_of(recipe.model))
    if recipe.online:
        raise ValueError(
            f"a plain checkpoint has no {' and '.join(recipe.online)}: "
            "leave the online rotations out of the recipe"
        )
    family, _ = memory.outline(recipe.model)
    inputs = check_inputs(format, recipe.activations)
    if format == "compressed-tensors":
        check_grid(family, recipe.grid in FP4, recipe.symmetric, inputs)
    if format == "gguf":
        check_family(family)
        check_holds(family, recipe.quant)
        cut_of(load_tokenizer(recipe.model))
    if (format == "fused") != (recipe.rounding == "none"):
        raise ValueError(
            "'fused' goes with the rounding 'none', the packed formats with 'rtn' and 'gptq'"
        )
    check_suits(recipe)
    check_vocabulary(load_tokenizer(recipe.model), family.config)
    check_room(folder, sum(memory.on_disk(recipe, format, dtype).values()))
    result = run(recipe, device)
    model, tokenizer = build(recipe, device)
    if result.provenance.get("weights") != weights_sample(model):
        # what was measured is kept no more, and made again it may differ in the last bits
        del model
        local_path(recipe.spec()).unlink(missing_ok=True)
        result = run(recipe, device)
        model, tokenizer = build(recipe, device)
        if result.provenance.get("weights") != weights_sample(model):
            raise ValueError(
                f"the rotation {recipe.rotation!r} is another one each time it is made, so that "
                "what was measured isn't what would be written: draw from the seed it is given"
            )
    if recipe.rotation != "none":
        model.config.rotation |= {
            "name": recipe.rotation,
            "seed": recipe.seed,
            "recipe": spec_hash(recipe.spec()),
        }
    card = model_card(recipe, result, format)
    return export(model, folder, format, tokenizer, card, dtype, overwrite, recipe.of_runtime)


def main(arguments: list[str] | None = None) -> int:
    print_any_name()
    parser = argparse.ArgumentParser(
        prog="python -m rotlib.study.checkpoint",
        description="Write the quantized checkpoint that is nearest to a model, and its card.",
    )
    parser.add_argument("model", help="alias, Hugging Face id, folder or GGUF file")
    parser.add_argument("folder", type=Path, help="where the checkpoint goes")
    parser.add_argument("--quality", default="best", choices=QUALITIES, help="default: best")
    parser.add_argument("--bits", type=int, default=4, help="of a weight; default: 4")
    parser.add_argument("--grid", default=GRIDS[0], choices=GRIDS, help="of a weight's numbers")
    parser.add_argument("--group-size", type=int, help="weights that share a scale; default: a row")
    parser.add_argument(
        "--activation-bits",
        type=int,
        choices=(INPUTS.bits, FULL),
        help="of what the layers read, rounded by whoever runs it; default: 16, not rounded",
    )
    parser.add_argument(
        "--token-cap",
        type=float,
        help="the most energy that a token counts for, in medians of its window; default: no cap",
    )
    parser.add_argument(
        "--loss-weighted",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="let a token count by the slope of the model's loss; default: in good and best",
    )
    parser.add_argument(
        "--format", default="compressed-tensors", choices=("compressed-tensors", "gguf")
    )
    parser.add_argument("--text", default=Recipe.text, help="that it is calibrated and measured on")
    parser.add_argument("--window", type=int, default=Recipe.window, help="tokens in a window")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export there")
    options = vars(parser.parse_args(arguments))
    target = {name: options.pop(name) for name in ("folder", "format", "overwrite", "device")}
    try:
        if options.pop("activation_bits") == INPUTS.bits:
            options |= {"activation_bits": INPUTS.bits, "protocol": INPUTS.protocol}
        recipe = Recipe.of_quality(options.pop("quality"), **options)
        room = sum(memory.on_disk(recipe, target["format"]).values()) / memory.GB
        about = f"{memory.estimate(recipe).host / memory.GB:.1f} GB in all, {room:.1f} GB on disk"
        if seconds := estimates_of([recipe], target["device"])[recipe].seconds:
            about += f", {max(1, sum(seconds.values()) / 60):.0f} minutes where nothing is kept yet"
        print(f"{recipe.model}, {recipe.precision}: about {about}", flush=True)
        written = export_recipe(recipe, **target)
    except ValueError as error:
        parser.error(str(error))
    print(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
