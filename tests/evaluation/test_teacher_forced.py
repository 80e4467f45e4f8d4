"""Scores of given texts: log-probabilities of their tokens, and the most likely tokens at each."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxrl_llm.commands import model_files
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.data.top_tokens import likely_batches, likely_rows
from jaxrl_llm.evaluation import make_most_likely, make_score

VOCABULARY = CharacterTokenizer().vocabulary_size
TEXTS = [([3], [4, 5, 6]), ([1, 2], []), ([7, 8, 9], [2]), ([3] * 9, [4, 5, 6])]


@pytest.fixture(scope="module")
def bigram(make_bigram):
    return make_bigram(VOCABULARY)


def test_the_most_likely_tokens_are_those_of_the_distribution(bigram):
    params = bigram.init(jax.random.key(0))
    found = make_most_likely(bigram, 3, temperature=0.5, sequences_per_batch=2)(params, TEXTS)
    table = np.asarray(jax.nn.log_softmax(np.asarray(params["scores"]) / 0.5, axis=-1))
    for (prompt, completion), row in zip(TEXTS, found, strict=True):
        before = [prompt[-1], *completion[:-1]] if completion else []
        expected = [np.argsort(-table[token], kind="stable")[:3] for token in before]
        assert row.tokens == [each.tolist() for each in expected]
        for token, ids, values in zip(before, expected, row.logprobs, strict=True):
            np.testing.assert_allclose(values, table[token][ids], rtol=1e-5)


def test_with_the_whole_vocabulary_the_given_tokens_are_among_them(bigram):
    params = bigram.init(jax.random.key(0))
    whole = make_most_likely(bigram, VOCABULARY)(params, TEXTS)
    for (_, completion), row, scores in zip(TEXTS, whole, make_score(bigram)(params, TEXTS), strict=True):
        said = [dict(zip(ids, logprobs, strict=True)) for ids, logprobs in zip(*row, strict=True)]
        np.testing.assert_allclose(
            [each[token] for each, token in zip(said, completion, strict=True)], scores, atol=1e-6
        )
        np.testing.assert_allclose([sum(map(np.exp, each.values())) for each in said], 1.0, atol=1e-5)


@pytest.mark.parametrize("k", [0, 10**6])
def test_a_number_of_tokens_outside_of_the_vocabulary_is_refused(bigram, k):
    with pytest.raises(ValueError, match=f"{k} tokens are asked for .* 1 to {VOCABULARY}"):
        make_most_likely(bigram, k)


def test_lines_of_the_most_likely_tokens_are_a_file_of_distributions(tmp_path, monkeypatch, bigram):
    """`jaxrl score --top` writes what `source: distributions` reads."""
    tokenizer = CharacterTokenizer()
    policy = SimpleNamespace(model=bigram, params=bigram.init(jax.random.key(0)), tokenizer=tokenizer)
    policy.for_context = lambda _: policy
    monkeypatch.setattr(model_files, "restored_policy", lambda *_, **__: policy)
    given, made = tmp_path / "given.jsonl", tmp_path / "made.jsonl"
    given.write_text(json.dumps({"prompt": "A:1+2", "completion": "<a>3</a>"}) + "\n")
    lines = model_files.score_file(str(given), str(given), temperature=1.0, batch=2, dtype=None, top=2)
    made.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, _ = likely_rows(made)
    sizes = {"max_prompt_tokens": 8, "max_completion_tokens": 8}
    batch = likely_batches(rows, tokenizer, sequences_per_step=1, seed=0, **sizes)[0]
    assert batch.length.tolist() == [len(tokenizer.completion_ids({"body": "A:1+2"}, "<a>3</a>"))]
    assert batch.top_tokens[0, 0].tolist() == lines[0]["top_tokens"][0]
    given.write_text(json.dumps({"tokens": [1, 2, 3]}) + "\n")
    with pytest.raises(ValueError, match=r"line 1 has no completion; --top needs"):
        model_files.score_file(str(given), str(given), temperature=1.0, batch=2, dtype=None, top=2)
