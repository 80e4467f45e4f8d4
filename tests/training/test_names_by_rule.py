"""Names that rules make: of networks that are called like a field of credit, and of views of what credit fills."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import advantages, losses
from jaxrl_llm.experience import Sequences
from jaxrl_llm.rollout import Endpoint
from jaxrl_llm.rollout.controls import Controls
from jaxrl_llm.rollout.hand_over import External
from jaxrl_llm.training import Network, Resources, Rollout, make_train_step


def fives(tokens):
    return (tokens == 5).mean(1)


def composed(model, *, credit=(), sampled=(), **resources):
    rollout = Rollout(samples_per_prompt=2, max_completion_tokens=6, eos_ids=(2,), pad_id=0, **dict(sampled))
    credit = [*credit, ("advantages", advantages.group_normalized)]
    return make_train_step(
        model,
        optax.adam(0.1),
        source=rollout,
        rewards=[fives],
        credit=credit,
        losses=[losses.clipped_surrogate],
        resources=Resources(**resources),
    )


def test_a_network_may_be_called_like_a_name_that_credit_may_fill(bigram, make_prompts):
    def toward_proxy(rewards, proxy_logprobs, mask):
        return rewards + 0.0 * (proxy_logprobs * mask).sum(1)

    step = composed(bigram, credit=[("rewards", toward_proxy)], networks={"proxy": Network(decay=0.5)})
    state, _, rows = step.run(step.init(jax.random.key(0)), make_prompts(4))
    inside = np.asarray(rows.mask) > 0
    np.testing.assert_allclose(rows["proxy_logprobs"][inside], rows.behaviour_logprobs[inside], atol=1e-5)
    assert not np.allclose(*(jax.tree.leaves(state.networks[name].params)[0] for name in ("policy", "proxy")))


def test_a_view_is_made_of_what_credit_has_filled(bigram, make_prompts):
    def kept(length):
        return jnp.maximum(length // 2, 1)

    def first_half(prompt_tokens, prompt_length, tokens, kept):
        inside = (jnp.arange(tokens.shape[1]) < kept[:, None]).astype(jnp.float32)
        return Sequences(prompt_tokens, prompt_length, tokens, kept, inside)

    def summed(rewards, half_logprobs, half_mask):
        return (half_logprobs * half_mask).sum(1)

    step = composed(bigram, credit=[("kept", kept), ("rewards", summed)], views={"half": first_half})
    _, _, rows = step.run(step.init(jax.random.key(0)), make_prompts(4))
    inside = np.arange(6) < np.asarray(rows["kept"])[:, None]
    expected = np.where(inside, rows.behaviour_logprobs, 0).sum(1)
    np.testing.assert_allclose(rows["rewards"], expected, atol=1e-5)


def test_an_engine_samples_the_whole_vocabulary(bigram):
    engine = External(Endpoint("http://localhost:1", "policy"))
    sampled = {"engine": engine, "truncation": Controls(top_k=4)}
    with pytest.raises(ValueError, match=r"which rollout\.engine does not offer; leave rollout\.truncation out"):
        composed(bigram, sampled=sampled.items())
