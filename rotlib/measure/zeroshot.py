"""Zero-shot accuracy of a model in memory, through lm-eval, under a task list's name.

The number is acc_norm where the task has it and acc otherwise, as such averages are usually taken.
The usual lists come from the Hub; the list "offline" (`offline_tasks.py`) needs no network.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import sqrt
from statistics import fmean
from unittest.mock import patch

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rotlib.checks import whole_number
from rotlib.measure.offline_tasks import METRIC, offline_items
from rotlib.models.names import on_hub
from rotlib.models.sound import check_sound
from rotlib.models.supported import adapt
from rotlib.models.text import check_text, check_tokenizer
from rotlib.precision import model_products

# inferred: the papers behind this project say six, eight or nine tasks, and these are the ones that
# such papers usually average
_SIX = ("arc_easy", "arc_challenge", "boolq", "hellaswag", "piqa", "winogrande")
_EIGHT = (*_SIX, "openbookqa", "social_iqa")
TASK_LISTS = {
    "offline": tuple(METRIC),
    "six": _SIX,
    "eight": _EIGHT,
    "nine": (*_EIGHT, "lambada_openai"),
}
ITEMS = 300  # of each offline task, unless a limit says otherwise


@dataclass
class ZeroShot:
    """Accuracy, its standard error, the items and what guessing reaches, task by task.

    `tasks` names the list.

    >>> found = ZeroShot("mine", {"a": 0.5, "b": 0.7}, {"a": 0.03, "b": 0.04}, {}, {})
    >>> round(found.average, 2), round(found.average_error, 3)
    (0.6, 0.025)
    """

    tasks: str
    accuracy: dict[str, float]
    error: dict[str, float]
    items: dict[str, int]
    chance: dict[str, float]

    @property
    def average(self) -> float:
        return fmean(self.accuracy.values())

    @property
    def average_error(self) -> float:
        return sqrt(sum(error**2 for error in self.error.values())) / len(self.error)

    @property
    def metrics(self) -> dict:
        """Everything as JSON takes it."""
        return asdict(self) | {"average": self.average, "average_error": self.average_error}


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | list[str] = "offline",
    limit: int | None = None,
    text: str = "wikipedia-mini",
) -> ZeroShot:
    """The model's accuracy on a list of tasks, without examples.

    `tasks` is a key of `TASK_LISTS`, or a list of lm-eval's (and the offline) tasks. `model` is
    called as it is: R3, R4 and an open `quantized_activations` stay at work. `limit` takes the
    first items of every task; None is all of them, and 300 of the offline tasks, which are cut from
    `text`. Raises ValueError for an unknown list or task, a task without accuracy, a dataset out of
    reach, choices that are longer than the model's context, or a tokenizer of another model.

    >>> zero_shot(model, tokenizer, ["last_word"], limit=4).items
    {'last_word': 4}
    """
    adapt(model)
    check_sound(model)
    names = task_names(tasks)
    check_text(text)
    check_limit(limit)
    check_tokenizer(tokenizer)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"this tokenizer has {len(tokenizer)} tokens, but the model knows "
            f"{model.config.vocab_size}: use the model's own"
        )
    with _quiet(), model_products(model.device):
        from lm_eval.evaluator import evaluate  # slow to import, and only needed here
        from lm_eval.models.huggingface import HFLM

        loaded = load_tasks(names, limit, text)
        batch = 32 if model.device.type == "cuda" else 8  # logits exist for a whole batch at a time
        own = deepcopy(tokenizer)  # it is given a pad token
        harness = HFLM(pretrained=model, tokenizer=own, batch_size=batch)
        asked = {"limit": limit, "log_samples": False, "bootstrap_iters": 0}
        try:
            found = evaluate(harness, {"tasks": loaded}, **asked)["results"]
        except AssertionError as error:  # lm-eval's, before the model is called, without a word
            raise ValueError(
                f"a choice of these tasks is longer than the model's context of "
                f"{harness.max_length} tokens: take tasks with shorter ones"
            ) from error
    choices = {
        name: list(Counter(request.doc_id for request in task.instances).values())
        for name, task in loaded.items()
    }
    return scored(tasks if isinstance(tasks, str) else "+".join(names), found, choices)


def scored(tasks: str, found: dict[str, dict], choices: dict[str, list[int]]) -> ZeroShot:
    """What lm-eval found, with errors and chance; `choices` has the requests of every item."""
    accuracy = {
        name: float(found[name].get("acc_norm,none", found[name].get("acc,none")))
        for name in choices
    }
    items = {name: len(counts) for name, counts in choices.items()}
    error = {name: sqrt(p * (1 - p) / (items[name] - 1)) for name, p in accuracy.items()}
    # an item of one request asks for a word to find: guessing finds none
    chance = {
        name: fmean(1 / n if n > 1 else 0.0 for n in counts) for name, counts in choices.items()
    }
    return ZeroShot(tasks, accuracy, error, items, chance)


def task_names(tasks: str | list[str]) -> tuple[str, ...]:
    """The tasks of a list, checked; raises like `zero_shot`."""
    if isinstance(tasks, str):
        if tasks not in TASK_LISTS:
            raise ValueError(
                f"unknown task list {tasks!r}: choose one of {', '.join(TASK_LISTS)}, "
                "or give lm-eval's task names as a list"
            )
        return TASK_LISTS[tasks]
    listed = tasks if isinstance(tasks, list | tuple) else ()
    different = len({name for name in listed if isinstance(name, str)}) == len(listed)
    if not different or not listed:
        raise ValueError(
            f"tasks must be one of {', '.join(TASK_LISTS)} or a list of different lm-eval task "
            f"names, not {tasks!r}"
        )
    return tuple(tasks)


def check_limit(limit: int | None) -> None:
    """Raises ValueError for fewer than two items: one has no standard error."""
    if limit is not None:
        whole_number("limit (unless it is None)", limit, 2)


def load_tasks(names: tuple[str, ...], limit: int | None, text: str) -> dict:
    """lm-eval's tasks by name; raises like `zero_shot` for what can't be loaded."""
    with _quiet():
        hub = [name for name in names if name not in METRIC]
        if strangers := [name for name in hub if name not in _task_manager().all_subtasks]:
            raise ValueError(
                f"unknown task {strangers[0]!r}: use {', '.join(METRIC)} or single tasks of "
                "lm-eval, no groups"
            )
        loaded = {
            name: _from_hub(name) if name in hub else _offline_task(name, limit, text)
            for name in names
        }
    for name, task in loaded.items():
        if not {"acc", "acc_norm"} & set(task.aggregation()):
            raise ValueError(
                f"the task {name!r} has no accuracy: choose tasks that lm-eval scores by acc or "
                "acc_norm"
            )
        task.set_config("num_fewshot", 0)
    return loaded


@lru_cache
def _task_manager():
    from lm_eval.tasks import TaskManager  # reads thousands of files

    return TaskManager()


def _from_hub(name: str):
    dataset = (_task_manager().task_index[name].cfg or {}).get("dataset_path")
    reason = (
        f"its dataset {dataset} isn't on this machine and the Hugging Face Hub can't be reached"
    )
    if not dataset or on_hub(dataset, repo_type="dataset"):
        try:
            return _task_manager().load([name])["tasks"][name]
        except Exception as error:  # datasets may raise anything
            reason = f"lm-eval says: {' '.join(str(error).split()) or type(error).__name__}"
    raise ValueError(
        f"the task {name!r} can't be loaded ({reason}): connect to the Hub, "
        "or use 'offline', which needs no network"
    )


def _offline_task(name: str, limit: int | None, text: str):
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    items = list(offline_items(name, text)[: limit or ITEMS])
    if len(items) < 2:
        raise ValueError(
            f"the test split of {text} is too short for the task {name!r}: use a longer text"
        )
    return ConfigurableTask(
        config={
            "task": name,
            "output_type": "multiple_choice",
            "metric_list": [
                {"metric": METRIC[name], "aggregation": "mean", "higher_is_better": True}
            ],
            "custom_dataset": lambda **_: {"test": Dataset.from_list(items)},
            "test_split": "test",
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
        }
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Of lm-eval's log errors alone are heard, of its bars the model's alone is shown.

    TQDM_DISABLE hides that one too.
    """

    def hidden(*args, **_):
        return tqdm(*args, disable=True)

    def shown(*args, total=None, **_):
        return tqdm(*args, total=total, desc="zero-shot", unit="choice")

    logger = logging.getLogger("lm_eval")
    with ExitStack() as stack:
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        bars = {"api.task": hidden, "api.model": hidden, "models.huggingface": shown}
        for module, bar in bars.items():
            stack.enter_context(patch(f"lm_eval.{module}.tqdm", bar))
        yield
