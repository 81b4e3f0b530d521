"""llm-compressor's best 4-bit checkpoint of a model, made in an environment of its own.

`peers.py` runs this file there: rotlib isn't installed. Its settings are the best that it ships for
weights alone: random-Hadamard R1 and R2 where the widths allow it, squared-error scales, GPTQ with
static act-order.
"""

import json
import resource
import sys
import time


def main(model_folder: str, tokens_file: str, out: str, bits: str, group_size: str) -> None:
    """Quantize, write the rounded weights as a plain checkpoint, and print what that took."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.transform import SpinQuantModifier
    from transformers import AutoModelForCausalLM

    tokens = torch.load(tokens_file, weights_only=True)
    how = {"dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(model_folder, **how)
    weights = {"num_bits": int(bits), "type": "int", "symmetric": True, "observer": "mse"}
    grouped = {"strategy": "group", "group_size": int(group_size)}
    weights |= grouped if int(group_size) else {"strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights}
    start = time.perf_counter()
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
        recipe=[
            SpinQuantModifier(rotations=["R1", "R2"], transform_type="random-hadamard"),
            GPTQModifier(config_groups={"group_0": group}, ignore=["lm_head"]),
        ],
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - start
    plain = AutoModelForCausalLM.from_pretrained(model_folder, tie_word_embeddings=False, **how)
    made = model.state_dict()
    plain.load_state_dict({name: made[name] for name in plain.state_dict()})
    plain.save_pretrained(out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps({"seconds": round(seconds, 1), "peak_memory_mb": round(peak)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
