"""Two zero-shot tasks that need no network, cut from a corpus's test split by a fixed seed.

Each item has four choices and comes from a passage of its own. `last_word` (acc) asks for the word
that ends a sentence after 40 to 60 words, among words that nearby passages have after the same
word; `continuation` (acc_norm) for the sentence after two others.
"""

import re
from collections import Counter
from functools import lru_cache
from itertools import groupby
from math import log
from random import Random

from rotlib.models.text import CORPORA, text_content

# words compete as they are, sentences by the character
METRIC = {"last_word": "acc", "continuation": "acc_norm"}
CHOICES = 4  # of an item
WRONG = 9  # candidates for its wrong choices
SHORT = range(6, 26)  # words of a sentence to choose from
# passages to the wrong choices: sentences too near may fit as well
AWAY = {"last_word": range(1, 31), "continuation": range(9, 41)}
# three letters before it: not after St., Mr. or an initial
_SENTENCE_END = re.compile(r"(?<=[a-z)”\"]{3}[.!?]) +(?=[“\"(]?[A-Z])")
# whole: no two glued together, no formula lost
_SENTENCE = re.compile(r"(?!.*(?:[a-z)][.!?][A-Z]|  ))[A-Z“\"].*[a-z)”\"][.!?]")
_LAST_WORD = re.compile(r"(.*) ([a-z]{4,})[.!?]")


def offline_items(task: str, text: str = "wikipedia-mini") -> tuple[dict, ...]:
    """Every item of an offline task, in an order drawn once: any first n are a sample.

    No tokenizer has a say in them.
    """
    return _items_once(task, text, text_content(text))


@lru_cache
def _items_once(task: str, text: str, content: str) -> tuple[dict, ...]:
    """Those of a text that is, by its bytes, this `content`."""
    return items_of(task, CORPORA[text]("test"))


def items_of(task: str, text: str) -> tuple[dict, ...]:
    """The items that a text yields."""
    passages, random, items = _passages(text), Random(0), []
    words = Counter(re.findall(r"[a-z]+", str(passages)))
    for number in random.sample(range(len(passages)), len(passages)):
        around = (at for away in AWAY[task] for at in (number - away, number + away))
        nearby = [s for at in around if 0 <= at < len(passages) for s in passages[at]]
        asked = (_words_asked if task == "last_word" else _sentences_asked)(passages[number])
        if not asked:
            continue
        context, truth = random.choice(asked)
        if task == "last_word":
            wrong = _other_words(context, truth, nearby, words)
        else:
            wrong = _other_sentences(truth, nearby)
        if len(wrong) >= CHOICES - 1:
            choices = random.sample(wrong, CHOICES - 1)
            answer = len(items) % CHOICES  # every position is right equally often
            choices.insert(answer, truth)
            items.append({"context": context, "choices": choices, "answer": answer})
    return tuple(items)


def _passages(text: str) -> list[list[str]]:
    """Runs of two sentences or more in one paragraph.

    Headings, lists and what markup left behind are no sentences.
    """
    tidy = re.sub(r" +(?=[.,;:!?)])", "", text)
    passages = []
    for line in tidy.split("\n"):
        parts = _SENTENCE_END.split(line.strip())
        for whole, run in groupby(parts, lambda part: bool(_SENTENCE.fullmatch(part))):
            sentences = list(run)
            if whole and len(sentences) > 1:
                passages.append(sentences)
    return passages


def _words_asked(sentences: list[str]) -> list[tuple[str, str]]:
    """(40 to 60 words from the start of a sentence on, the word that ends their last sentence)"""
    asked = []
    for last, sentence in enumerate(sentences):
        if match := _LAST_WORD.fullmatch(sentence):
            starts = range(last + 1)
            contexts = (" ".join([*sentences[first:last], match[1]]) for first in starts)
            asked += [(context, match[2]) for context in contexts]
    return [(context, truth) for context, truth in asked if 40 <= len(context.split()) <= 60]


def _other_words(context: str, truth: str, nearby: list[str], words: Counter) -> list[str]:
    """Words from nearby, no two forms of one.

    First those after the context's last word there, then those that end a sentence.
    """
    before = re.escape(context.split()[-1])
    after = set(re.findall(rf"\b{before} ([a-z]{{4,}})\b", " ".join(nearby)))
    ending = {match[2] for match in map(_LAST_WORD.fullmatch, nearby) if match}

    def rank(word: str) -> tuple:
        rarer = abs(log(words[word] / words[truth]))
        return (word not in after, rarer + abs(len(word) - len(truth)) / 2, word)

    alike = sorted(after | ending, key=rank)
    first_of_stem = {word[:4]: word for word in reversed(alike) if word[:4] != truth[:4]}
    return [word for word in alike if word in first_of_stem.values()][:WRONG]


def _sentences_asked(sentences: list[str]) -> list[tuple[str, str]]:
    """(two sentences of 60 words at most, the short sentence after them)"""
    triples = zip(sentences, sentences[1:], sentences[2:], strict=False)
    asked = [(f"{first} {second}", third) for first, second, third in triples]
    return [
        (context, truth)
        for context, truth in asked
        if len(context.split()) <= 60 and len(truth.split()) in SHORT
    ]


def _other_sentences(truth: str, nearby: list[str]) -> list[str]:
    """Short sentences from nearby, those most like the truth in length."""
    short = {sentence for sentence in nearby if len(sentence.split()) in SHORT}
    other = [sentence for sentence in short if sentence.lower() != truth.lower()]
    return sorted(other, key=lambda s: (abs(len(s) - len(truth)), s))[:WRONG]
