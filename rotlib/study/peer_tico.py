"""TICO's best 4-bit checkpoint of a model, made in an environment of its own.

`peers.py` runs this file there: rotlib isn't installed. Its settings are the best that it ships for
weights alone: GPTQ in act-order, every row's scale chosen by GPTQ's own error.
"""

import json
import resource
import sys
import time


def main(model_folder: str, tokens_file: str, out: str, bits: str, group_size: str) -> None:
    """Quantize, write the rounded weights as a plain checkpoint, and print what that took."""
    import torch
    from tico.quantization import convert, prepare
    from tico.quantization.config.gptq import GPTQConfig
    from transformers import AutoModelForCausalLM

    tokens = torch.load(tokens_file, weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    # its search by GPTQ's error knows whole rows only
    search = {"groupsize": int(group_size), "mse": "mse", "static_groups": True}
    config = GPTQConfig(
        weight_bits=int(bits),
        symmetric=True,
        actorder=True,
        show_progress=False,
        **(search if int(group_size) else {"mse": "mse_for_gptq"}),
    )
    start = time.perf_counter()
    with torch.no_grad():
        prepared = prepare(model, config)
        for window in tokens:
            prepared(window[None])
        made = convert(prepared)
    seconds = time.perf_counter() - start
    made.save_pretrained(out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps({"seconds": round(seconds, 1), "peak_memory_mb": round(peak)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
