"""A process that has imported stock software, and never rotlib: it forks for every reading.

Importing transformers takes five seconds, and a reading a tenth of one. A line on stdin names the
file of stock.py's that is given, the one to write, and one for what is said on stderr; a line on
stdout answers with the exit status.
"""

import os
import runpy
import sys

import compressed_tensors  # noqa: F401 - what a reading needs
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401


def main(stock: str) -> None:
    torch.set_num_threads(1)
    read = runpy.run_path(stock)["_main"]
    for line in sys.stdin:
        given, found, said = line.rstrip("\n").split("\t")
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        with open(said, "w") as stderr:
            os.dup2(stderr.fileno(), 2)
            try:
                read(given, found)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=stderr, flush=True)
                os._exit(1)
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
