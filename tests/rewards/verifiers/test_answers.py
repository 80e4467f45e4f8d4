"""In-graph verifiers agree with the host's, on well-formed completions and on every kind of broken one."""

from __future__ import annotations

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data import CharacterTokenizer, reference_response, tasks
from jaxrl_llm.rewards import (
    answer_format,
    answer_ids,
    answer_present,
    answer_span,
    exact_answer,
    exact_match,
    extract_answer,
    paired_answer_ids,
)
from jaxrl_llm.rewards.verifiers import answers

TOKENIZER = CharacterTokenizer()

# Compiled once a shape: these tests ask many small questions.
jit_exact = jax.jit(exact_answer)
jit_format = jax.jit(answer_format, static_argnames="require_think")
jit_span = jax.jit(answer_span)
jit_ids = jax.jit(answer_ids)


def padded(rows, width, pad=0):
    tokens = np.full((len(rows), width), pad, np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return jnp.asarray(tokens), jnp.asarray([len(row) for row in rows], jnp.int32)


def encoded(texts, width=40, pad=0):
    return padded([TOKENIZER.encode(text) for text in texts], width, pad)


def exact(texts, references, pad=0):
    return jit_exact(*encoded(texts, pad=pad), *encoded(references, 8)).tolist()


def test_default_ids_are_those_of_the_built_in_tokenizer():
    assert TOKENIZER.eos_id == answers.EOS_ID
    assert (TOKENIZER.id("<t>"), TOKENIZER.id("</t>")) == (answers.THINK_ID, answers.THINK_END_ID)
    assert (TOKENIZER.id("<a>"), TOKENIZER.id("</a>")) == (answers.ANSWER_ID, answers.ANSWER_END_ID)
    assert (TOKENIZER.id(" "), TOKENIZER.id("\n")) == answers.SPACE_IDS
    named = {answers.EOS_ID, answers.THINK_ID, answers.THINK_END_ID, answers.ANSWER_ID, answers.ANSWER_END_ID}
    assert set(answers.OTHER_CONTROL_IDS) | named == set(range(len(TOKENIZER.controls)))


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<t>7+5+0=12</t><a>132</a><eos>", 1),
        ("<a>132</a>", 1),
        ("<a>132</a><eos>", 1),
        ("<a> 132\n</a>", 1),
        ("<a>1</a><a>132</a>", 1),
        ("<a>132</a><a>1</a>", 0),
        ("<a>132</a><a>132", 0),
        ("<a><a>132</a></a>", 1),
        ("<a>132<a></a>", 0),
        ("</a>132<a>", 0),
        ("<a>13 2</a>", 0),
        ("<a>13</a>", 0),
        ("<a>1321</a>", 0),
        ("<a>0132</a>", 0),
        ("<a></a>", 0),
        ("132", 0),
        ("", 0),
        ("<a>132", 0),
    ],
)
def test_the_last_answer_counts(text, reward):
    assert exact([text], ["132"]) == [reward]
    assert exact_match([text], ["132"]) == [reward]


def test_spaces_inside_an_answer_are_part_of_it():
    assert exact(["<a> 1 3 5 </a>", "<a>135</a>", "<a>1 3  5</a>"], ["1 3 5"] * 3) == [1, 0, 0]


@pytest.mark.parametrize("seed", [0, 1])
def test_random_token_strings_are_judged_as_on_the_host(seed):
    rng = random.Random(seed)
    pieces = ["<a>", "</a>", "<a>", "</a>", "<t>", "</t>", "<eos>", "1", "1", "2", " ", "\n", "<n>"]
    texts = ["".join(rng.choices(pieces, k=rng.randrange(13))) for _ in range(600)]
    texts += [f"<a>{text}</a>" for text in texts[:150]]
    references = [rng.choice(["1", "2", "11", "1 2", "12", "<eos>1"]) for _ in texts]
    # Half of the references are what stands there, so that both verdicts are frequent.
    references = [
        found if k % 2 and (found := extract_answer(text)) and len(TOKENIZER.encode(found)) <= 12 else reference
        for k, (text, reference) in enumerate(zip(texts, references, strict=True))
    ]
    got = jit_exact(*encoded(texts, 20), *encoded(references, 14))
    wanted = exact_match(texts, references)
    assert got.tolist() == wanted
    assert 50 < sum(wanted) < 600
    first, size, found = jit_span(*encoded(texts, 20))
    for k, text in enumerate(texts):
        span = TOKENIZER.decode(TOKENIZER.encode(text)[int(first[k]) : int(first[k] + size[k])])
        assert (span if found[k] else None) == extract_answer(text)


@pytest.mark.parametrize(
    ("texts", "ids"),
    [
        (["<a>132</a>", "<a>13</a>", "<t>7</t><a> 132\n</a><eos>", "132"], [0, 1, 0, -1]),
        (["132", "", "<a>1", "</a>1<a>"], [-1, -1, -1, -1]),
        (["<a>12</a>", "<a>21</a>", "<a>112</a>", "<a>122</a>"], [0, 1, 2, 3]),
        (["<a></a>", "<a> </a>", "1", "<a>0</a>"], [0, 0, -1, 3]),
        (["<a>1</a><a>2</a>", "<a>2</a><a>1</a>", "<a>2</a>", "<a>1</a>"], [0, 1, 0, 1]),
        (["<a>1</a>", "<a>0", "<a>0</a>", "<a>1 </a>"], [0, -1, 2, 0]),
    ],
)
def test_equal_answers_share_the_id_of_the_first_row(texts, ids):
    tokens, length = encoded(texts)
    assert jit_ids(tokens, length, jnp.zeros(4, jnp.int32)).tolist() == ids
    assert answer_present(tokens, length).tolist() == [float(number >= 0) for number in ids]
    alone = [row if number >= 0 else answers.NO_ANSWER for row, number in enumerate(ids)]
    assert jit_ids(tokens, length, jnp.arange(4)).tolist() == alone


def test_ids_of_many_answers_are_those_of_a_comparison_of_texts():
    rng = random.Random(0)
    texts = [
        "".join(rng.choices(["<a>", "</a>", "<a>1", "2</a>", "0", "1", " "], k=rng.randrange(9))) for _ in range(512)
    ]
    texts += [f"<a>{text}</a>" for text in texts[:256]]
    group = [rng.randrange(3) for _ in texts]
    seen, wanted = {}, []
    for row, (text, number) in enumerate(zip(texts, group, strict=True)):
        answer = extract_answer(text)
        wanted.append(-1 if answer is None else seen.setdefault((number, answer), row))
    tokens, length = encoded(texts, 24)
    assert jit_ids(tokens, length, jnp.asarray(group)).tolist() == wanted
    assert len(set(wanted)) > 50
    # What stands outside of the answer, padding included, changes nothing.
    shifted = jnp.pad(tokens, ((0, 0), (1, 2)), constant_values=7)
    assert jit_ids(shifted, length + 1, jnp.asarray(group)).tolist() == wanted


def test_answers_that_differ_in_one_place_or_in_order_are_different():
    length = 12
    rows = [
        [5, *digits, 6] for digits in ([13] * length, *([13] * k + [14] + [13] * (length - 1 - k) for k in range(12)))
    ]
    rows += [[5, *([13] * k), 6] for k in range(length)]
    tokens, sizes = padded(rows, 16)
    assert jit_ids(tokens, sizes, jnp.zeros(len(rows), jnp.int32)).tolist() == list(range(len(rows)))


@pytest.mark.parametrize("pad", [0, 2, 5, 6])
def test_padding_never_changes_a_reward(pad):
    texts = ["<a>12</a><eos>", "<a>12", "12</a>", "<t></t><a>12</a><eos>", "<t>1</t><a>12</a>"]
    assert exact(texts, ["12"] * 5, pad=pad) == [1, 0, 0, 1, 0 + 1]
    assert jit_format(*encoded(texts, pad=pad)).tolist() == [0, 0, 0, 1, 0]
    assert jit_format(*encoded(texts, 30, pad)).tolist() == jit_format(*encoded(texts, 60, pad)).tolist()


def test_rows_are_independent():
    texts, references = ["<a>1</a>", "<a>2</a>", "<a>3</a>"], ["1", "1", "3"]
    order = [2, 0, 1]
    assert exact([texts[k] for k in order], [references[k] for k in order]) == [1, 1, 0]
    assert exact(texts, references) == [1, 0, 1]


@pytest.mark.parametrize(
    ("text", "with_think", "direct"),
    [
        ("<t>7</t><a>1</a><eos>", 1, 0),
        ("<t></t><a></a><eos>", 1, 0),
        ("<a>1</a><eos>", 0, 1),
        ("<t>7</t><a>1</a>", 0, 0),
        ("<a>1</a>", 0, 0),
        ("<t>7</t><a>1</a><eos><eos>", 0, 0),
        ("<t>7</t><a>1</a>x<eos>", 0, 0),
        ("x<t>7</t><a>1</a><eos>", 0, 0),
        ("x<a>1</a><eos>", 0, 0),
        ("<t>7</t> <a>1</a><eos>", 0, 0),
        ("<t>7</t><t>7</t><a>1</a><eos>", 0, 0),
        ("<t>7</t><a>1</a><a>1</a><eos>", 0, 0),
        ("<a>1</a><a>1</a><eos>", 0, 0),
        ("<a>1</a><t>7</t><eos>", 0, 0),
        ("<t>7<a>1</a></t><eos>", 0, 0),
        ("<t>7<a></t>1</a><eos>", 0, 0),
        ("</t>7<t><a>1</a><eos>", 0, 0),
        ("<t>7</t></a>1<a><eos>", 0, 0),
        ("</a>1<a><eos>", 0, 0),
        ("<t>7<n></t><a>1</a><eos>", 0, 0),
        ("<a>1<c></a><eos>", 0, 0),
        ("<t>7</t><eos>", 0, 0),
        ("<eos>", 0, 0),
        ("", 0, 0),
    ],
)
def test_format(text, with_think, direct):
    assert jit_format(*encoded([text])).tolist() == [with_think]
    assert jit_format(*encoded([text]), require_think=False).tolist() == [direct]


def test_token_ids_are_hyper_parameters():
    tokens, length = padded([[50, 60, 7, 61, 9]], 8)
    reference, size = padded([[7]], 2)
    assert exact_answer(tokens, length, reference, size, open_id=60, close_id=61, space_ids=()).tolist() == [1]
    assert exact_answer(tokens, length, reference, size).tolist() == [0]
    ids = {"open_id": 60, "close_id": 61, "eos_id": 9, "forbidden_ids": ()}
    assert answer_format(tokens, length, require_think=False, **ids).tolist() == [0]
    assert answer_format(tokens[:, 1:], length - 1, require_think=False, **ids).tolist() == [1]


@pytest.mark.parametrize("name", ["addition", "chain", "composition", "deduction", "sorting"])
def test_reference_responses_earn_everything(name):
    task = tasks.task(name)
    items = task.generate(level=task.levels[0], count=20)
    completions = encoded([reference_response(item, task.scratchpad) for item in items])
    assert jit_exact(*completions, *encoded([item.answer for item in items], 10)).tolist() == [1] * 20
    assert jit_format(*completions, require_think=task.scratchpad).tolist() == [1] * 20


def test_empty_shapes():
    empty = jnp.zeros((2, 0), jnp.int32), jnp.zeros(2, jnp.int32)
    assert jit_exact(*empty, *encoded(["1", "1"], 3)).tolist() == [0, 0]
    assert jit_format(*empty).tolist() == [0, 0]
    assert jit_ids(*empty, jnp.zeros(2, jnp.int32)).tolist() == [-1, -1]


def test_wrong_ranks_are_refused():
    tokens, length = encoded(["<a>1</a>"])
    with pytest.raises(AssertionError):
        exact_answer(tokens[0], length, tokens, length)
    with pytest.raises(AssertionError):
        exact_answer(tokens, length, jnp.zeros((2, 3), jnp.int32), jnp.zeros(2, jnp.int32))


def test_paired_groups_share_the_ids_of_their_answers():
    tokens = jnp.array([[5, 20, 6], [5, 21, 6], [5, 21, 6], [5, 20, 6], [5, 21, 6], [5, 22, 0]])
    length, group = jnp.full(6, 3), jnp.array([0, 0, 1, 1, 2, 2])
    found = paired_answer_ids(tokens, length, group, jnp.array([1, 1, 0, 0, -1, -1]))
    np.testing.assert_array_equal(found, [0, 1, 1, 0, 4, -1])
    np.testing.assert_array_equal(
        paired_answer_ids(tokens, length, group, -jnp.ones(6)), answer_ids(tokens, length, group)
    )
