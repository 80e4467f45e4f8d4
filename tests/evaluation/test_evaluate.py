"""Evaluation agrees with counting by hand, on a model whose answers are known."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data import CharacterTokenizer, Item, Task, encode_prompts
from jaxrl_llm.evaluation import majority_at_k, make_evaluate, pass_at_k, task_grader
from jaxrl_llm.rewards import extract_answer
from jaxrl_llm.rollout import generate
from jaxrl_llm.run.compilation import CompilationWatch

TOKENIZER = CharacterTokenizer()
SIZES = {"max_prompt_tokens": 4, "max_completion_tokens": 5}
SAMPLES = 4


def verify(item, answer):
    """The answer itself, or one less: two right answers that are spelled differently."""
    return float(answer in (item.answer, str(int(item.answer) - 1)))


GRADE = task_grader(Task("digits", lambda rng, level: None, verify, (1,), 1, "one digit", {}, False))


def items(answers):
    return [
        dataclasses.asdict(Item(f"q{i}", "", answer, "digits", 1, "")) | {"item_id": 3 * i} for i, answer in answers
    ]


ITEMS = items(enumerate(["1", "2", "3", "4", "2"]))


@pytest.fixture(scope="module")
def params():
    """After a newline "<a>", then one of 1, 2, 3 with 50, 30 and 20 %, then mostly "</a>" and the end."""
    after = {
        "\n": {"<a>": 1.0},
        "<a>": {"1": 0.5, "2": 0.3, "3": 0.2},
        **{digit: {"</a>": 0.7, digit: 0.3} for digit in "123"},
        "</a>": {"<eos>": 1.0},
    }
    size = TOKENIZER.vocabulary_size
    scores = np.full((size, size), -1e9, np.float32)
    for token, chances in after.items():
        for following, chance in chances.items():
            scores[TOKENIZER.id(token), TOKENIZER.id(following)] = np.log(chance)
    return {"scores": jnp.asarray(scores)}


@pytest.fixture(scope="module")
def model(make_bigram):
    return make_bigram(TOKENIZER.vocabulary_size)


@pytest.fixture(scope="module")
def evaluate(model):
    """Two problems a batch: five of them leave the last batch half empty."""
    rows = 1 + SAMPLES
    return make_evaluate(
        model, GRADE, TOKENIZER, samples_per_problem=SAMPLES, k=(1, 2, 4), sequences_per_batch=2 * rows + 1, **SIZES
    )


@pytest.fixture(scope="module")
def by_hand(model, params):
    """Completions of every problem in one batch: the greedy one, then the samples."""
    decode = partial(
        generate,
        model,
        samples_per_prompt=1 + SAMPLES,
        max_completion_tokens=5,
        eos_ids=TOKENIZER.eos_ids,
        pad_id=TOKENIZER.pad_id,
        temperature=jnp.asarray([0.0] + [1.0] * SAMPLES),
    )
    prompts = encode_prompts(ITEMS, TOKENIZER, max_prompt_tokens=4, max_answer_tokens=5)
    experience = jax.jit(decode)(params, prompts, jax.random.key(5), 0)
    texts = [
        TOKENIZER.decode(row[:length].tolist())
        for row, length in zip(np.asarray(experience.tokens), np.asarray(experience.length), strict=True)
    ]
    of_samples = np.asarray(experience.sample) > 0
    return (
        [texts[start : start + 1 + SAMPLES] for start in range(0, len(texts), 1 + SAMPLES)],
        np.asarray(experience.length)[of_samples].mean(),
        np.asarray(experience.truncated)[of_samples].mean(),
    )


@pytest.fixture(scope="module")
def metrics(evaluate, params):
    return evaluate(params, ITEMS, jax.random.key(5))


def test_the_greedy_completion_is_the_most_likely_one(metrics, by_hand):
    assert {texts[0] for texts in by_hand[0]} == {"<a>1</a><eos>"}
    # "1" is right for the answers 1 and 2: three of five problems.
    assert metrics["greedy"] == pytest.approx(3 / 5)


def test_accuracies_are_those_counted_by_hand(metrics, by_hand):
    texts, length, truncated = by_hand
    answers = [[extract_answer(text) for text in row[1:]] for row in texts]
    gold = [(item["answer"], str(int(item["answer"]) - 1)) for item in ITEMS]
    right = [[text in accepted for text in row] for accepted, row in zip(gold, answers, strict=True)]
    assert 0 < np.mean(right) < 1
    assert any(None in row for row in answers)
    for k in (1, 2, 4):
        expected = pass_at_k([sum(row) for row in right], SAMPLES, k).mean()
        assert metrics[f"pass@{k}"] == pytest.approx(expected)
    assert metrics["pass@1"] == pytest.approx(np.mean(right))
    # Answers that the verifier accepts are one class.
    classes = [["yes" if r else a for r, a in zip(*pair, strict=True)] for pair in zip(right, answers, strict=True)]
    for k in (2, 4):
        assert metrics[f"maj@{k}"] == pytest.approx(majority_at_k(classes, ["yes"] * 5, k).mean())
    assert metrics["completion_tokens"] == pytest.approx(length)
    assert metrics["truncated_share"] == pytest.approx(truncated)
    assert 0 < truncated < 1


def test_what_was_counted_is_said(metrics):
    assert (metrics["problems"], metrics["samples_per_problem"]) == (5, 4)
    assert "maj@1" not in metrics
    assert metrics["pass@1"] <= metrics["pass@2"] <= metrics["pass@4"]


def test_batches_and_their_filling_change_nothing(model, params, metrics):
    together = make_evaluate(
        model, GRADE, TOKENIZER, samples_per_problem=4, k=(1, 2, 4), sequences_per_batch=40, **SIZES
    )
    assert together(params, ITEMS, jax.random.key(5)) == metrics


def test_other_keys_draw_other_samples(evaluate, params, metrics):
    other = evaluate(params, ITEMS, jax.random.key(6))
    assert other["greedy"] == metrics["greedy"]
    assert other["completion_tokens"] != metrics["completion_tokens"]


def test_sizes_and_temperatures_that_cannot_be_are_refused_when_it_is_built(model):
    for given, message in (({"temperature": -1.0}, "temperature is -1.0"), ({"sequences_per_batch": 0}, "batch is 0")):
        with pytest.raises(ValueError, match=message):
            make_evaluate(model, GRADE, TOKENIZER, samples_per_problem=4, k=(1,), **{**SIZES, **given})


@pytest.mark.parametrize("k", [(5,), (0, 1), (1, 8)])
def test_a_k_that_the_samples_cannot_give_is_refused(model, k):
    with pytest.raises(ValueError, match=r"there are 4 samples a problem|at least 1"):
        make_evaluate(model, GRADE, TOKENIZER, samples_per_problem=4, k=k, **SIZES)


def test_short_prompts_are_decoded_at_a_narrow_width_and_give_the_same(model, params, metrics):
    """A wide limit with short problems, and one long problem: two programs, and what is counted stays."""
    sizes = {"max_prompt_tokens": 200, "max_completion_tokens": 5}
    evaluate = make_evaluate(
        model, GRADE, TOKENIZER, samples_per_problem=SAMPLES, k=(1, 2, 4), sequences_per_batch=11, **sizes
    )
    with CompilationWatch() as watch:
        assert evaluate(params, ITEMS, jax.random.key(5)) == metrics
        programs = watch.count + watch.read
        evaluate(params, [*ITEMS, ITEMS[0] | {"body": "q" * 190, "item_id": 99}], jax.random.key(5))
        assert watch.count + watch.read == programs + 1
