"""Log-probabilities of given tokens and how the first window goes on, by vLLM: `vllm_reads.py` runs
this in vLLM's own environment.
"""

import json
import sys


def main(folder: str, windows: str, out: str) -> None:
    from vllm import LLM, SamplingParams, __version__

    windows = json.loads(windows)
    length = len(windows[0]) + 16
    llm = LLM(folder, dtype="bfloat16", max_model_len=length, enforce_eager=True)
    asked = SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=0)
    found = llm.generate([{"prompt_token_ids": ids} for ids in windows], asked, use_tqdm=False)
    logprobs = [
        [step[token].logprob for step, token in zip(one.prompt_logprobs[1:], ids[1:], strict=True)]
        for one, ids in zip(found, windows, strict=True)
    ]
    with open(out, "w", encoding="utf-8") as file:
        json.dump(
            {"version": __version__, "logprobs": logprobs, "text": found[0].outputs[0].text}, file
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
