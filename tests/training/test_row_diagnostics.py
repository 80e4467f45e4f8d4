"""What the rewards of a batch say of each other, and which completions are degenerate."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data.scripts import script_number, token_scripts
from jaxrl_llm.evaluation.reward_diagnostics import starc_distance
from jaxrl_llm.training.row_diagnostics import degenerate_completions, repeated_ngrams, reward_relations, within_groups


def test_correlations_and_distances_are_taken_within_prompts():
    first = jnp.array([1.0, 2, 3, 11, 12, 13])
    second = jnp.array([2.0, 1, 3, -8, -9, -7])  # the same order within both prompts, the other way between them
    group, weight = jnp.array([0, 0, 0, 4, 4, 4]), jnp.ones(6)
    nan = jnp.array([0, 0, 0, 0, 0, jnp.nan])
    components = jnp.stack([first, second, 3 * first + nan, jnp.ones(6)], 1)
    others = {"length": -first}
    found = jax.jit(lambda c: reward_relations(c, others, group, weight, "abcd", first))(components)
    value = {name: round(float(x), 6) for name, x in found.items()}
    assert value["reward_correlation/a/b"] == 0.5
    assert value["reward_correlation/a/c"] == pytest.approx(1.0, abs=1e-5)
    assert value["reward_correlation/a/length"] == pytest.approx(-1.0, abs=1e-5)
    undefined = {"reward_correlation/a/d", "reward_correlation/d/length", "starc/d"}  # d is constant
    assert undefined < {name for name, number in value.items() if np.isnan(number)}
    assert value["starc/b"] == 0.5
    assert value["starc/a"] == 0
    assert value["reward/d_constant_groups"] == 1
    assert value["reward/c_constant_groups"] == 0
    # What is absent counts for nothing, and the distance is that of the evaluation.
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 3, 4))
    hidden = lambda z: jnp.array([*z.ravel(), 99.0, jnp.nan])[:, None]  # noqa: E731
    ids, there = jnp.array([0] * 4 + [1] * 4 + [2] * 4 + [0, 1]), jnp.array([1.0] * 12 + [0, 0])
    rho, distance = jax.jit(within_groups)(hidden(x), hidden(y), ids, there)
    assert float(distance[0]) == pytest.approx(starc_distance(x, y), abs=1e-6)
    assert float(distance[0]) == pytest.approx(np.sqrt((1 - float(rho[0])) / 2), abs=1e-5)
    constant = jnp.full((14, 1), 0.1)
    for pair in ((constant, 7 * constant), (hidden(x), constant)):
        assert np.isnan(jax.jit(within_groups)(*pair, ids, there)).all()


def test_degenerate_completions_are_counted(rows):
    tokens = jnp.zeros_like(rows.tokens).at[:, 0].set(jnp.arange(8) + 20)
    length = jnp.full(8, 3).at[0].set(1).at[4].set(1)
    group = jnp.array([0, 0, 0, 0, 1, 1, 1, 1])
    tokens = tokens.at[2, 0].set(tokens[1, 0]).at[3, 0].set(tokens[1, 0]).at[5, 0].set(tokens[1, 0])
    changed = replace(rows, tokens=tokens, length=length, group=group, truncated=jnp.zeros(8).at[4].set(1))
    scripts = np.zeros(64, np.int32)
    scripts[26:28] = 3
    measured = jax.jit(lambda rows, weight: degenerate_completions(rows, weight, scripts))
    found = measured(changed, jnp.ones(8).at[2].set(0))
    assert float(found["duplicate_share"]) == pytest.approx(1 / 7)  # row 3 of row 1; row 5 is of another prompt
    assert float(found["empty_share"]) == pytest.approx(1 / 7)  # row 4 was cut off
    assert float(found["foreign_script_share"]) == pytest.approx(2 / 7)
    own = replace(changed, prompt_tokens=jnp.full_like(rows.prompt_tokens, 27))
    assert float(measured(own, jnp.ones(8))["foreign_script_share"]) == 0
    assert "foreign_script_share" not in jax.eval_shape(degenerate_completions, changed, jnp.ones(8))


def test_ngrams_that_come_again():
    tokens = jnp.array([[1, 2] * 5, list(range(10)), [1, 2, 1, 2, 3, 3, 1, 2, 1, 2]])
    assert repeated_ngrams(tokens, jnp.array([10, 10, 10])).tolist() == pytest.approx([5 / 7, 0, 1 / 7])
    assert repeated_ngrams(tokens, jnp.array([3, 0, 9])).tolist() == [0, 0, 0]
    assert repeated_ngrams(tokens[:, :2], jnp.array([2, 2, 2])).tolist() == [0, 0, 0]


def test_scripts_of_tokens():
    assert [script_number(text) for text in ("中文", " да", "\u03c0 r^2", "é", "")] == [1, 3, 0, 0, 0]
    assert token_scripts([b"a", None, b"\xff"]) is None
    assert token_scripts([b"a", " ж".encode()]).tolist() == [0, 3]  # type: ignore[union-attr]
