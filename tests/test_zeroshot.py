import contextlib
import io
import json
import logging
import random
from hashlib import sha256

import pytest
import torch
from conftest import SHAPE
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rotlib as rl
from rotlib.measure.offline_tasks import items_of, offline_items
from rotlib.measure.zeroshot import _task_manager
from rotlib.models.text import CORPORA

OFFLINE = rl.TASK_LISTS["offline"]
ITEMS = {"last_word": "b69bd475d2672bf3", "continuation": "53980e7ac5a8676e"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte: sequences of some hundred tokens, but logits of 257, so that every test here
    is quick.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(
        models.BPE(
            vocab={"<end>": 0} | {letter: n for n, letter in enumerate(alphabet, 1)}, merges=[]
        )
    )
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>")


def small_model(**changes) -> LlamaForCausalLM:
    """A random Llama with that tokenizer's vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE | {"vocab_size": 257, "max_position_embeddings": 1024} | changes)
    model = LlamaForCausalLM(config).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(5)
    return model


def loglikelihood(model, tokenizer, context, choice):
    """Token by token, by hand and without a batch."""
    ids = tokenizer(f"{context} {choice}").input_ids
    first = len(tokenizer(context).input_ids)
    logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logprobs[at - 1, ids[at]].item() for at in range(first, len(ids)))


def by_hand(model, tokenizer, task, limit):
    """(accuracy, the smallest lead of a best choice: a lead near zero would make the comparison a
    matter of rounding)
    """
    hits, leads = [], []
    for item in offline_items(task)[:limit]:
        scores = [
            loglikelihood(model, tokenizer, item["context"], choice) for choice in item["choices"]
        ]
        if task == "continuation":
            scores = [
                score / len(choice) for score, choice in zip(scores, item["choices"], strict=True)
            ]
        hits.append(scores.index(max(scores)) == item["answer"])
        leads.append(max(scores) - sorted(scores)[-2])
    return sum(hits) / len(hits), min(leads)


@pytest.mark.parametrize("task", OFFLINE)
def test_the_offline_items_are_the_same_everywhere(task):
    text = CORPORA["wikipedia-mini"]("test")
    random.seed(1)
    first = items_of(task, text)
    random.seed(2)
    assert items_of(task, text) == first == offline_items(task)
    assert sha256(json.dumps(first).encode()).hexdigest()[:16] == ITEMS[task]


@pytest.mark.parametrize("task", OFFLINE)
def test_there_are_hundreds_of_items_and_every_position_is_right_equally_often(task):
    answers = [item["answer"] for item in offline_items(task)]
    assert len(answers) >= 300  # as many as limit=None asks for
    counts = [answers.count(position) for position in range(4)]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("task", OFFLINE)
def test_no_item_offers_a_choice_twice_or_is_asked_twice(task):
    items = offline_items(task)
    assert all(len({choice.lower() for choice in item["choices"]}) == 4 for item in items)
    assert len({item["context"] for item in items}) == len(items)


def test_the_true_choice_is_what_the_test_text_goes_on_with():
    text = CORPORA["wikipedia-mini"]("test")
    squeezed = "".join(text.split())
    for task in OFFLINE:
        for item in offline_items(task):
            assert (
                "".join(f"{item['context']}{item['choices'][item['answer']]}".split()) in squeezed
            )
            assert item["context"] == item["context"].strip()  # lm-eval puts the space


def test_last_words_are_plain_words_after_forty_to_sixty():
    for item in offline_items("last_word"):
        assert 40 <= len(item["context"].split()) <= 60
        assert all(word.isalpha() and word.islower() and len(word) >= 4 for word in item["choices"])
        assert len({word[:4] for word in item["choices"]}) == 4  # never two forms of one word


def test_continuations_are_short_sentences_of_like_length():
    spreads = []
    for item in offline_items("continuation"):
        assert len(item["context"].split()) <= 60
        assert all(
            6 <= len(choice.split()) <= 25 and choice[-1] in ".!?" for choice in item["choices"]
        )
        lengths = [len(choice) for choice in item["choices"]]
        spreads.append(max(lengths) / min(lengths))
    assert sorted(spreads)[len(spreads) // 2] < 1.1


@pytest.mark.parametrize("task", OFFLINE)
def test_the_accuracy_is_the_one_computed_by_hand(tokenizer, task):
    model = small_model()
    expected, lead = by_hand(model, tokenizer, task, 6)
    assert lead > 1e-6
    assert rl.zero_shot(model, tokenizer, [task], limit=6).accuracy == {
        task: pytest.approx(expected)
    }


def test_rounded_activations_and_online_rotations_stay_at_work(tokenizer):
    model = small_model(hidden_size=64, num_attention_heads=4, intermediate_size=64)
    plain = rl.zero_shot(model, tokenizer, limit=24)
    rl.fuse(model, rl.hadamard_rotation(model, R3=True, R4=True))
    assert rl.zero_shot(model, tokenizer, limit=24).metrics == plain.metrics
    with rl.quantized_activations(model, rl.ActivationQuant(bits=2, kv_bits=2)):
        assert rl.zero_shot(model, tokenizer, limit=24).accuracy != plain.accuracy
        assert (
            rl.zero_shot(model, tokenizer, limit=6).accuracy["last_word"]
            == by_hand(model, tokenizer, "last_word", 6)[0]
        )


def test_the_model_the_tokenizer_and_the_random_state_are_left_as_they_were(tokenizer):
    model = small_model(tie_word_embeddings=True)
    rl.fuse(
        model, rl.hadamard_rotation(model)
    )  # its head is untied: lm-eval ties what the config says is tied
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states, settings = (
        (random.getstate(), torch.get_rng_state()),
        dict(tokenizer.special_tokens_map),
    )
    rl.zero_shot(model, tokenizer, limit=2)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert dict(tokenizer.special_tokens_map) == settings


def test_nothing_is_heard_of_lm_eval_but_one_bar(tokenizer, capfd):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger().addHandler(handler)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as bars:
            rl.zero_shot(small_model(), tokenizer, limit=2)
    finally:
        logging.getLogger().removeHandler(handler)
    assert not [record for record in records if record.name.startswith("lm_eval")]
    assert {
        line.split(":")[0]
        for line in bars.getvalue().replace("\r", "\n").split("\n")
        if line.strip()
    } == {"zero-shot"}
    assert capfd.readouterr() == ("", "")


def test_a_result_names_its_list_and_goes_into_json(tokenizer):
    result = rl.zero_shot(small_model(), tokenizer, limit=6)
    assert result.tasks == "offline"
    assert result.items == {"last_word": 6, "continuation": 6}
    assert result.chance == {"last_word": 0.25, "continuation": 0.25}
    a, b = result.accuracy.values()
    assert result.average == pytest.approx((a + b) / 2)
    assert result.error["last_word"] == pytest.approx((a * (1 - a) / 5) ** 0.5)
    assert result.average_error == pytest.approx((a * (1 - a) / 5 + b * (1 - b) / 5) ** 0.5 / 2)
    assert json.loads(json.dumps(result.metrics))["average"] == result.average
    assert rl.zero_shot(small_model(), tokenizer, ["continuation"], limit=2).tasks == "continuation"


def test_every_listed_task_is_one_that_lm_eval_has():
    known = {*OFFLINE, *_task_manager().all_subtasks}
    assert {name for names in rl.TASK_LISTS.values() for name in names} <= known
    assert [len(rl.TASK_LISTS[name]) for name in ("six", "eight", "nine")] == [6, 8, 9]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": "seven"}, "unknown task list 'seven': choose one of offline, six, eight, nine"),
        ({"tasks": []}, "a list of different lm-eval task names"),
        ({"tasks": ["last_word", "last_word"]}, "a list of different lm-eval task names"),
        ({"tasks": [3]}, "a list of different lm-eval task names"),
        (
            {"tasks": ["arc_esay"]},
            "unknown task 'arc_esay': use last_word, continuation or single tasks of lm-eval",
        ),
        (
            {"tasks": ["last_word", "piqa"]},
            "the task 'piqa' can't be loaded .*baber/piqa.* use 'offline', which needs no network",
        ),
        ({"limit": 0}, "limit .* must be a whole number of at least 2, not 0"),
        ({"limit": 0.5}, "limit .* must be a whole number of at least 2"),
        ({"text": "wiki"}, "unknown text 'wiki'"),
    ],
)
def test_what_cannot_be_evaluated_gets_one_sentence(tokenizer, monkeypatch, given, message):
    monkeypatch.setattr("rotlib.measure.zeroshot.on_hub", lambda *_, **__: False)
    with pytest.raises(ValueError, match=message) as refusal:
        rl.zero_shot(small_model(), tokenizer, **given)
    assert "\n" not in str(refusal.value)


def test_a_tokenizer_of_another_model_and_a_text_without_sentences_are_refused(
    tokenizer, monkeypatch
):
    with pytest.raises(ValueError, match="this tokenizer has 257 tokens, but the model knows 96"):
        rl.zero_shot(small_model(vocab_size=96), tokenizer)
    monkeypatch.setitem(CORPORA, "wikitext2", lambda split: f"no sentence here, in {split}")
    with pytest.raises(
        ValueError, match="the test split of wikitext2 is too short for the task 'last_word'"
    ):
        rl.zero_shot(small_model(), tokenizer, text="wikitext2")


@pytest.mark.real_model
def test_the_real_model_is_far_above_chance():
    """Of 300 items it has 0.92 (last_word) and 0.59 (continuation) right."""
    found = rl.zero_shot(*rl.load("smollm2-135m"), limit=12)
    noise = (0.25 * 0.75 / 12) ** 0.5  # standard error of guessing
    assert all(accuracy > 0.25 + 2 * noise for accuracy in found.accuracy.values())
