"""Zero-shot accuracy of a model in memory, through lm-eval: what a quantized model can still do, under a task list's name.

The number is acc_norm where the task has it and acc otherwise, as such averages are usually taken. The usual lists come
from the Hub. The list "offline" needs no network: two tasks with four choices each, cut from a corpus's test split by a
fixed seed, one item a passage. `last_word` (acc) asks for the word that ends a sentence after 40 to 60 words, among words
that nearby passages have after the same word; `continuation` (acc_norm) for the sentence after two others.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import groupby
from math import log, sqrt
from random import Random
from statistics import fmean
from unittest.mock import patch

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rotlib import store
from rotlib.activations import quantized_activations
from rotlib.checks import whole_number
from rotlib.families import adapt
from rotlib.pipeline import build
from rotlib.recipe import Recipe
from rotlib.store import Record, Result
from rotlib.text import CORPORA, check_text
from rotlib.zoo import on_hub, pick_device

# inferred: the papers behind this project say six, eight or nine tasks, and these are the ones that such papers usually average
_SIX = ("arc_easy", "arc_challenge", "boolq", "hellaswag", "piqa", "winogrande")
_EIGHT = (*_SIX, "openbookqa", "social_iqa")
TASK_LISTS = {"offline": ("last_word", "continuation"), "six": _SIX, "eight": _EIGHT, "nine": (*_EIGHT, "lambada_openai")}

_METRIC = {"last_word": "acc", "continuation": "acc_norm"}  # words compete as they are, sentences by the character
_ITEMS, _CHOICES = 300, 4  # of each offline task, unless a limit says otherwise; of each item
_SHORT = range(6, 26)  # words of a sentence to choose from
_AWAY = {"last_word": range(1, 31), "continuation": range(9, 41)}  # passages to the wrong choices: sentences too near may fit as well
_SENTENCE_END = re.compile(r"(?<=[a-z)”\"]{3}[.!?]) +(?=[“\"(]?[A-Z])")  # three letters: not after St., Mr. or an initial
_SENTENCE = re.compile(r"(?!.*(?:[a-z)][.!?][A-Z]|  ))[A-Z“\"].*[a-z)”\"][.!?]")  # whole: no two glued together, no formula lost
_LAST_WORD = re.compile(r"(.*) ([a-z]{4,})[.!?]")


@dataclass
class ZeroShot:
    """Task by task: accuracy, its standard error, the number of items and what guessing reaches. `tasks` names the list."""

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
    """The model's accuracy on a list of `TASK_LISTS`, or on a list of lm-eval's (and the offline) tasks, without examples.

    `model` is called as it is: R3, R4 and an open `quantized_activations` stay at work. `limit` takes the first items of
    every task; None is all of them, and 300 of the offline tasks, which are cut from `text`. Raises ValueError for an
    unknown list or task, a task without accuracy, a dataset out of reach, or a tokenizer of another model.
    """
    adapt(model)
    names = _task_names(tasks)
    check_text(text)
    _check_limit(limit)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"this tokenizer has {len(tokenizer)} tokens, but the model knows {model.config.vocab_size}: use the model's own")
    with _quiet():
        from lm_eval.evaluator import evaluate  # slow to import, and only needed here
        from lm_eval.models.huggingface import HFLM

        loaded = _load_tasks(names, limit, text)
        batch = 32 if model.device.type == "cuda" else 8  # logits exist for a whole batch at a time
        harness = HFLM(pretrained=model, tokenizer=deepcopy(tokenizer), batch_size=batch)  # a copy: it is given a pad token
        found = evaluate(harness, {"tasks": loaded}, limit=limit, log_samples=False, bootstrap_iters=0)["results"]
    accuracy = {name: float(found[name].get("acc_norm,none", found[name].get("acc,none"))) for name in loaded}
    choices = {name: Counter(request.doc_id for request in task.instances).values() for name, task in loaded.items()}
    items = {name: len(counts) for name, counts in choices.items()}
    error = {name: sqrt(p * (1 - p) / (items[name] - 1)) for name, p in accuracy.items()}
    chance = {name: fmean(1 / n if n > 1 else 0.0 for n in counts) for name, counts in choices.items()}  # one request: a word to find
    return ZeroShot(tasks if isinstance(tasks, str) else "+".join(names), accuracy, error, items, chance)


def zero_shot_of(recipe: Recipe, tasks: str | list[str] = "offline", limit: int | None = None, device: str = "auto") -> Result:
    """`zero_shot` of a recipe's model, rebuilt from what is kept of it or computed; the result is kept like a run. Raises like both."""
    if not isinstance(recipe, Recipe):
        raise ValueError(f"zero_shot_of takes a Recipe, such as rl.Recipe(rotation='optrot'), not {recipe!r}")
    names = _task_names(tasks)
    _check_limit(limit)
    picked = pick_device(device)
    spec = replace(recipe, test_windows=Recipe.test_windows).spec() | {"task": "zero-shot", "tasks": list(names), "limit": limit}

    def compute(record: Record) -> None:
        with _quiet():
            _load_tasks(names, limit, recipe.text)  # what can't be loaded is refused before the model is made
        with record.stage("build"):
            model, tokenizer = build(recipe, device)
        with record.stage("evaluate"), quantized_activations(model, recipe.activations):
            record.metrics |= zero_shot(model, tokenizer, tasks, limit, recipe.text).metrics

    return store.once(spec, picked, compute)


def _task_names(tasks: str | list[str]) -> tuple[str, ...]:
    if isinstance(tasks, str):
        if tasks not in TASK_LISTS:
            raise ValueError(f"unknown task list {tasks!r}: choose one of {', '.join(TASK_LISTS)}, or give lm-eval's task names as a list")
        return TASK_LISTS[tasks]
    if not isinstance(tasks, list | tuple) or not tasks or len({name for name in tasks if isinstance(name, str)}) < len(tasks):
        raise ValueError(f"tasks must be one of {', '.join(TASK_LISTS)} or a list of different lm-eval task names, not {tasks!r}")
    return tuple(tasks)


def _check_limit(limit: int | None) -> None:
    if limit is not None:
        whole_number("limit (unless it is None)", limit, 2)


def _load_tasks(names: tuple[str, ...], limit: int | None, text: str) -> dict:
    hub = [name for name in names if name not in _METRIC]
    if strangers := [name for name in hub if name not in _task_manager().all_subtasks]:
        raise ValueError(f"unknown task {strangers[0]!r}: use {', '.join(_METRIC)} or single tasks of lm-eval, no groups")
    loaded = {name: _from_hub(name) if name in hub else _offline_task(name, limit, text) for name in names}
    for name, task in loaded.items():
        if not {"acc", "acc_norm"} & set(task.aggregation()):
            raise ValueError(f"the task {name!r} has no accuracy: choose tasks that lm-eval scores by acc or acc_norm")
        task.set_config("num_fewshot", 0)
    return loaded


@lru_cache
def _task_manager():
    from lm_eval.tasks import TaskManager  # reads thousands of files

    return TaskManager()


def _from_hub(name: str):
    dataset = (_task_manager().task_index[name].cfg or {}).get("dataset_path")
    reason = f"its dataset {dataset} isn't on this machine and the Hugging Face Hub can't be reached"
    if not dataset or on_hub(dataset, repo_type="dataset"):
        try:
            return _task_manager().load([name])["tasks"][name]
        except Exception as error:  # datasets may raise anything
            reason = f"lm-eval says: {' '.join(str(error).split()) or type(error).__name__}"
    raise ValueError(f"the task {name!r} can't be loaded ({reason}): connect to the Hub, or use 'offline', which needs no network")


def _offline_task(name: str, limit: int | None, text: str):
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    items = offline_items(name, text)[: limit or _ITEMS]
    if len(items) < 2:
        raise ValueError(f"the test split of {text} is too short for the task {name!r}: use a longer text")
    metric = {"metric": _METRIC[name], "aggregation": "mean", "higher_is_better": True}
    documents = {"custom_dataset": lambda **_: {"test": Dataset.from_list(list(items))}, "test_split": "test"}
    columns = {"doc_to_text": "context", "doc_to_choice": "choices", "doc_to_target": "answer"}
    return ConfigurableTask(config={"task": name, "output_type": "multiple_choice", "metric_list": [metric]} | documents | columns)


@lru_cache
def offline_items(task: str, text: str = "wikipedia-mini") -> tuple[dict, ...]:
    """Every item of an offline task, in an order drawn once: any first n are a sample. No tokenizer has a say in them."""
    passages, random, items = _passages(CORPORA[text]("test")), Random(0), []
    words = Counter(re.findall(r"[a-z]+", str(passages)))
    for number in random.sample(range(len(passages)), len(passages)):
        nearby = [s for away in _AWAY[task] for at in (number - away, number + away) if 0 <= at < len(passages) for s in passages[at]]
        if not (asked := (_words_asked if task == "last_word" else _sentences_asked)(passages[number])):
            continue
        context, truth = random.choice(asked)
        wrong = _other_words(context, truth, nearby, words) if task == "last_word" else _other_sentences(truth, nearby)
        if len(wrong) >= _CHOICES - 1:
            choices, answer = random.sample(wrong, _CHOICES - 1), len(items) % _CHOICES  # every position is right equally often
            items.append({"context": context, "choices": [*choices[:answer], truth, *choices[answer:]], "answer": answer})
    return tuple(items)


def _passages(text: str) -> list[list[str]]:
    """Runs of two sentences or more in one paragraph: headings, lists and what markup left behind are no sentences."""
    tidy = re.sub(r" +(?=[.,;:!?)])", "", text)
    runs = (groupby(_SENTENCE_END.split(line.strip()), lambda part: bool(_SENTENCE.fullmatch(part))) for line in tidy.split("\n"))
    return [sentences for run in runs for whole, parts in run if whole and len(sentences := list(parts)) > 1]


def _words_asked(sentences: list[str]) -> list[tuple[str, str]]:
    """(40 to 60 words from the start of a sentence on, the word that ends the last of their sentences)"""
    ends = [(last, match) for last, match in enumerate(map(_LAST_WORD.fullmatch, sentences)) if match]
    asked = [(" ".join([*sentences[first:last], match[1]]), match[2]) for last, match in ends for first in range(last + 1)]
    return [(context, truth) for context, truth in asked if 40 <= len(context.split()) <= 60]


def _other_words(context: str, truth: str, nearby: list[str], words: Counter) -> list[str]:
    """Nine words from nearby, no two forms of one: first those after the context's last word there, then those that end a sentence."""
    after = set(re.findall(rf"\b{re.escape(context.split()[-1])} ([a-z]{{4,}})\b", " ".join(nearby)))
    far = lambda word: abs(log(words[word] / words[truth])) + abs(len(word) - len(truth)) / 2  # noqa: E731
    alike = sorted(after | {m[2] for m in map(_LAST_WORD.fullmatch, nearby) if m}, key=lambda word: (word not in after, far(word), word))
    stems = {word[:4]: word for word in reversed(alike) if word[:4] != truth[:4]}
    return [word for word in alike if word in stems.values()][:9]


def _sentences_asked(sentences: list[str]) -> list[tuple[str, str]]:
    """(two sentences of 60 words at most, the short sentence after them)"""
    asked = [(f"{first} {second}", third) for first, second, third in zip(sentences, sentences[1:], sentences[2:], strict=False)]
    return [(context, truth) for context, truth in asked if len(context.split()) <= 60 and len(truth.split()) in _SHORT]


def _other_sentences(truth: str, nearby: list[str]) -> list[str]:
    """Short sentences from nearby, the nine most like the truth in length."""
    found = {sentence for sentence in nearby if len(sentence.split()) in _SHORT and sentence.lower() != truth.lower()}
    return sorted(found, key=lambda sentence: (abs(len(sentence) - len(truth)), sentence))[:9]


@contextmanager
def _quiet() -> Iterator[None]:
    """Of lm-eval's log errors alone are heard, of its bars the model's alone is shown; TQDM_DISABLE hides that one too."""
    hidden = lambda *args, **_: tqdm(*args, disable=True)  # noqa: E731
    shown = lambda *args, total=None, **_: tqdm(*args, total=total, desc="zero-shot", unit="choice")  # noqa: E731
    logger = logging.getLogger("lm_eval")
    with ExitStack() as stack:
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        for module, bar in {"api.task": hidden, "api.model": hidden, "models.huggingface": shown}.items():
            stack.enter_context(patch(f"lm_eval.{module}.tqdm", bar))
        yield
