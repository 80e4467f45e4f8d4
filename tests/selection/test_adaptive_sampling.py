"""Reinforce-Ada: when a prompt has samples enough, and which it keeps."""

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.advantages import pool_centred
from jaxrl_llm.selection import balanced_samples, finished_prompts

ARRIVED = jnp.array([[0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0]], jnp.float32)


def test_reinforce_ada_card():
    rounds = [int(finished_prompts(ARRIVED[:, :n], jnp.ones((1, n), bool), kept=4)[0]) for n in (4, 8, 12)]
    assert rounds == [0, 0, 1]
    places, there = balanced_samples(ARRIVED, jnp.ones((1, 12), bool), kept=4)
    assert places.tolist() == [[2, 9, 0, 1]]
    assert there.all()
    advantages = pool_centred(ARRIVED[0, places[0]], jnp.full(4, 2 / 12), jnp.full(4, 12.0), jnp.ones(4))
    np.testing.assert_allclose(advantages, [0.833333, 0.833333, -0.166667, -0.166667], rtol=2e-6)


def test_what_one_kind_lacks_the_other_fills():
    label = jnp.array([[1.0] * 10 + [0.0]])
    places, _ = balanced_samples(label, jnp.ones((1, 11), bool), kept=8)
    assert label[0, places[0]].tolist() == [1] * 7 + [0]
    assert places.tolist() == [[*range(7), 10]]
    places, there = balanced_samples(label * 0, jnp.ones((1, 11), bool), kept=8)
    assert places.tolist() == [list(range(8))]
    assert there.all()


def test_samples_that_were_not_drawn_are_not_kept():
    label, drawn = jnp.array([[1.0, 1, 0, 0, 1]]), jnp.array([[True, False, True, False, False]])
    places, there = balanced_samples(label, drawn, kept=4)
    assert there.tolist() == [[True, True, False, False]]
    assert places[0, :2].tolist() == [0, 2]
    assert not finished_prompts(label, drawn, kept=4)[0]
    assert finished_prompts(label, drawn, kept=4, both_kinds=False)[0]
