"""Hybrids and self-training: worked examples of the cards, invariances, bad input; nothing is compiled twice."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import group_normalized, one_sided
from jaxrl_llm.config import NetworkConfig
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.data.top_tokens import likely_batches, likely_rows
from jaxrl_llm.evaluation.comparison import continual
from jaxrl_llm.losses import aligned_gradients, binary_logit_divergence, dual_head_distillation, skewed_divergence
from jaxrl_llm.models.adapters import in_int8, stored_in_int8
from jaxrl_llm.models.decoder import TransformerConfig, transformer
from jaxrl_llm.models.merging import balanced_initialisation, selected
from jaxrl_llm.models.own_layout import in_own_layout
from jaxrl_llm.models.stored_distributions import as_states, stored_distributions
from jaxrl_llm.rewards import answer_in_prompt, behaviour_counts, difficulty_truncation, spurious_rewards
from jaxrl_llm.rows import Hardest, empty_rows
from jaxrl_llm.schedules import imitation_by_entropy, success_by_entropy
from jaxrl_llm.selection import balance_score, best_setting, kept_samples
from jaxrl_llm.training.waiting_demonstrations import asked_for, empty_demonstrations

ONES = jnp.ones(6)
PAIRS = jnp.array([0, 0, 0, 1, 1, 1])


def test_worked_examples():
    scores = jnp.array([0.1, 0.9, 0.5, 0.7, 0.2, 0.3])
    assert kept_samples(scores, PAIRS, ONES, keep=1).tolist() == [0, 1, 0, 1, 0, 0]
    assert kept_samples(scores, PAIRS, ONES, threshold=0.4).tolist() == [0, 1, 1, 1, 0, 0]
    # Of equals the first; an absent row never.
    assert kept_samples(jnp.ones(6), PAIRS, ONES.at[0].set(0), keep=1).tolist() == [0, 1, 0, 1, 0, 0]
    # RAFT's loss on the kept ones.
    logp, length, kept = jnp.array([-6.0, -3.0]), jnp.array([4, 3]), jnp.ones(2)
    assert float(-(kept * logp).sum() / (kept * length).sum()) == pytest.approx(1.285714, abs=1e-6)

    rewards, right, group = jnp.array([1.2, 1.1, 0.1, -0.2]), jnp.array([1, 1, 0, 0]), jnp.zeros(4, jnp.int32)
    np.testing.assert_allclose(balance_score(rewards, right, group, jnp.ones(4)), 0.166667, atol=1e-6)
    many = (jnp.tile(rewards, 4), jnp.tile(right, 4), jnp.zeros(16, jnp.int32), jnp.ones(16))
    np.testing.assert_allclose(balance_score(*many, threshold=-0.5), 0.5, atol=1e-6)
    assert balance_score(rewards, right, group, jnp.ones(4), threshold=2.0).tolist() == [0, 0, 0, 0]
    assert best_setting(jnp.array([[0.1, 0.4], [0.4, 0.2]])) == (0, 1)

    np.testing.assert_allclose(
        binary_logit_divergence(jnp.array([1.0, 0.0]), jnp.array([3.0, 0.0])), 0.480458, atol=1e-6
    )
    assert float(binary_logit_divergence(jnp.ones(3) + 1, jnp.ones(3))) > 0.1  # not invariant to a shift
    assert aligned_gradients(jnp.array([-1.0, 1.0]), jnp.array([1.0, 0.0])).tolist() == [1, 1]
    assert aligned_gradients(jnp.array([1.0, 1.0]), jnp.array([1.0, 0.0])).tolist() == [2, 1]

    base = {"x": jnp.zeros(4)}
    changes = {"x": jnp.array([0.1, -0.5, 0.3, 0.2])}
    np.testing.assert_allclose(selected(base, changes, density=0.5)["x"], [0, -0.5, 0.3, 0], atol=1e-7)
    np.testing.assert_allclose(selected(base, changes, density=1.0)["x"], changes["x"])
    instruct, distilled = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
    np.testing.assert_allclose(balanced_initialisation(instruct, distilled, jnp.zeros(2)), [0.4, 0.4], atol=1e-7)

    scratch = "12-6=6;6*3=18;no;12*3=36;36-6=30;yes"
    kinds = ("step", "backtracking", "verification")
    assert [behaviour_counts([scratch, ""], behaviour=kind) for kind in kinds] == [[4, 0], [1, 0], [1, 0]]

    found = continual([[0.8, 0.1, 0], [0.6, 0.9, 0.2], [0.5, 0.7, 0.85]])
    assert {n: round(v, 6) for n, v in found.items()} == {
        "average": 0.683333,
        "forgetting": 0.25,
        "backward_transfer": -0.25,
    }
    assert np.isnan(continual([[0.5]])["forgetting"])
    assert float(imitation_by_entropy(jnp.float32(0))) == 0.5 > float(imitation_by_entropy(jnp.float32(1)))
    assert float(success_by_entropy(jnp.float32(1))) == pytest.approx(0.1 * np.e)


def test_limits_are_tighter_where_a_prompt_is_solved():
    rewards, length = jnp.array([1.0, 1, 1, 1, 0, 0]), jnp.array([5, 8, 10, 10, 3, 3])
    given = rewards, length, PAIRS, ONES
    assert difficulty_truncation(*given, max_completion_tokens=10).tolist() == [1, 0, 0, 1, 0, 0]
    assert difficulty_truncation(*given, max_completion_tokens=10, least_share=1.0).tolist() == rewards.tolist()


def test_a_teacher_sees_the_answer_in_the_prompt():
    encode = {" ": [9]}.__getitem__
    made = answer_in_prompt(
        jnp.array([[0, 1, 4, 3], [1, 5, 6, 3]]),
        jnp.array([3, 4]),
        jnp.array([[7, 0], [7, 8]]),
        jnp.array([1, 2]),
        jnp.array([[2, 2], [2, 0]]),
        jnp.array([2, 1]),
        jnp.ones((2, 2)),
        encode=encode,
    )
    assert made.prompt_tokens.tolist() == [[0, 0, 1, 4, 9, 7, 3], [1, 5, 6, 9, 7, 8, 3]]
    assert made.prompt_length.tolist() == [5, 7]
    assert made.tokens.tolist() == [[2, 2], [2, 0]]


def test_a_skewed_divergence_is_bounded_and_exact():
    log_p, log_q = jnp.log(jnp.array([0.7, 0.3])), jnp.log(jnp.array([0.2, 0.8]))
    mixed = 0.1 * jnp.exp(log_q) + 0.9 * jnp.exp(log_p)
    forward = skewed_divergence(generator="forward_kl", skew=0.1).over_vocabulary
    np.testing.assert_allclose(forward(log_p, log_q), (jnp.exp(log_q) * (log_q - jnp.log(mixed))).sum(), rtol=1e-5)
    reverse = skewed_divergence(generator="reverse_kl", skew=0.1).over_vocabulary
    mixed = 0.1 * jnp.exp(log_p) + 0.9 * jnp.exp(log_q)
    np.testing.assert_allclose(reverse(log_p, log_q), (jnp.exp(log_p) * (log_p - jnp.log(mixed))).sum(), rtol=1e-5)
    assert float(forward(jnp.array([0.0, -1e4]), jnp.array([-1e4, 0.0]))) == pytest.approx(np.log(10), rel=1e-4)
    assert float(forward(log_q, log_q)) == pytest.approx(0, abs=1e-6)
    logits = jnp.array([0.3, -0.2])
    slope = jax.grad(lambda z: forward(jax.nn.log_softmax(z), log_q))(logits)
    step = 1e-3 * jnp.array([1.0, -1.0])
    change = forward(jax.nn.log_softmax(logits + step), log_q) - forward(jax.nn.log_softmax(logits - step), log_q)
    assert float(change) == pytest.approx(2 * float(slope @ step), rel=2e-2)


def hardest(rows: int = 2, capacity: int = 4) -> Hardest:
    return Hardest(rows, capacity, 2, max_prompt_tokens=1, max_answer_tokens=1)


def failed(ids, rewards):
    """Groups of two samples of these prompts."""
    count = 2 * len(ids)
    number = jnp.repeat(jnp.asarray(ids), 2)
    rows = empty_rows(count, 1, 1, 2)
    return rows.filled(
        prompt_id=number,
        group=jnp.arange(count) // 2,
        weight=jnp.ones(count),
        rewards=jnp.asarray(rewards, jnp.float32),
        demonstration_tokens=jnp.stack([number, number], axis=1),
        demonstration_length=jnp.where(number == 99, 0, 2),
    )


def test_demonstrations_of_unsolved_prompts_wait_until_there_are_enough():
    # The card: buffer [11, 12], failed [21, 22], S 3 -> SFT on [21, 22, 11], left [12]; here with groups of one.
    sizes = Hardest(3, 6, 1, max_prompt_tokens=1, max_answer_tokens=1)
    store = empty_demonstrations(sizes, 2)
    run = jax.jit(lambda store, rows: asked_for(store, rows, sizes))
    held = lambda rows: [int(i) for i, w in zip(rows.prompt_id, rows.weight, strict=True) if w > 0]  # noqa: E731
    store, learned = run(store, failed([11, 5, 12, 99], [0, 0, 1, 0, 0, 0, 0, 0]))
    assert (held(store), held(learned)) == ([11, 12], [])
    store, learned = run(store, failed([21, 6, 22, 7], [0, 0, 0.5, 0, 0, 0, 1, 1]))
    assert (held(learned), held(store)) == ([21, 22, 11], [12])
    assert learned.tokens[0].tolist() == [21, 21]
    assert learned["written_mask"].tolist() == [[1, 1]] * 3
    assert float(learned.mask.sum()) == 0
    for _ in range(3):  # the oldest go where there is no room, and nothing is learned twice
        store, learned = run(store, failed([31, 32, 33, 34], [0] * 8))
    assert held(learned) == [31, 32, 33]
    assert len(held(store)) <= 6


@pytest.mark.slow
def test_a_network_in_int8_says_nearly_the_same():
    model = transformer(TransformerConfig(vocabulary_size=11, width=32, layers=1, heads=2, kv_heads=1))
    params, ids = model.init(jax.random.key(0)), jnp.arange(8)[None]
    small = in_int8(model)
    stored = stored_in_int8(params)
    assert jax.tree.structure(jax.eval_shape(small.init, jax.random.key(0))) == jax.tree.structure(stored)
    assert stored["blocks"]["down"].values.dtype == jnp.int8
    ours, theirs = (m.apply(p, ids, ids, None)[0] for m, p in ((small, stored), (model, params)))
    assert 0 < float(jnp.abs(ours - theirs).max()) < 0.05
    with pytest.raises(ValueError, match=r"networks.*int8 is true, but only a network that is read from a path"):
        NetworkConfig(int8=True)


def test_a_second_head_follows_the_likeliest_tokens_of_a_teacher():
    auxiliary = jnp.array([[[1.0, 0, 7], [1, 0, 7]]])  # the third token is not among the teacher's
    top, logprobs = jnp.array([[[0, 1], [0, -1]]]), jnp.array([[[3.0, 0], [1, 9]]])
    loss = dual_head_distillation(auxiliary, top, logprobs, jnp.ones((1, 2)))
    np.testing.assert_allclose(loss.numerator, 0.480458, atol=1e-6)  # and nothing at equal logits
    assert float(loss.denominator) == 2
    slope = jax.grad(lambda x: dual_head_distillation(x, top, logprobs, jnp.ones((1, 2))).numerator)(auxiliary)
    assert slope[0, 0, 0] < 0
    np.testing.assert_allclose(slope[0, 0, 1:], 0, atol=1e-6)
    np.testing.assert_allclose(slope[0, 1], 0, atol=1e-6)


def test_rewards_that_say_little_and_one_side_of_a_group():
    r = jnp.array([1.0, 0, 0, 1, 0, 0])
    whole = group_normalized(r, jnp.zeros(6, jnp.int32), jnp.ones(6))
    negative, positive = (one_sided(whole, r, side=side) for side in ("negative", "positive"))
    np.testing.assert_allclose(negative, [0, -0.645496, -0.645496, 0, -0.645496, -0.645496], atol=2e-6)
    np.testing.assert_allclose(positive, [1.290992, 0, 0, 1.290992, 0, 0], atol=4e-6)
    np.testing.assert_array_equal(negative + positive, whole)
    ids = jnp.arange(400)
    given = (ids % 2.0, (ids % 4 < 3) * 1.0, ids, ids % 5, 7)
    well_formed, correct = given[1], given[0]
    np.testing.assert_array_equal(spurious_rewards(*given, form="format", seed=0), well_formed)
    np.testing.assert_array_equal(spurious_rewards(*given, form="incorrect", seed=0), well_formed * (1 - correct))
    drawn = spurious_rewards(*given, seed=0)
    assert not np.asarray(drawn)[np.asarray(well_formed) == 0].any()
    assert 120 < float(drawn.sum()) < 180
    np.testing.assert_array_equal(drawn[::-1], spurious_rewards(*(x[::-1] for x in given[:4]), 7, seed=0))
    assert (np.asarray(drawn) != np.asarray(spurious_rewards(*given[:4], 8, seed=0))).any()
    with pytest.raises(ValueError, match="form is 'coin'"):
        spurious_rewards(*given, form="coin", seed=0)


def test_a_table_of_its_own_names_axes_that_there_are():
    model = transformer(TransformerConfig(vocabulary_size=11, width=8, layers=1, heads=2, kv_heads=1))
    with pytest.raises(ValueError, match=r"names 'mlpp', which is not an axis of an array; did you mean mlp"):
        in_own_layout(model, {"mlpp": ["fsdp"]})
    with pytest.raises(ValueError, match=r"networks.*rules is set, but a network made from another"):
        NetworkConfig(rules={"mlp": ("fsdp",)})
    with pytest.raises(ValueError, match=r"networks.*rules.mlp names 'fsdpp'"):
        NetworkConfig(path="x", rules={"mlp": ("fsdpp",)})


LIMITS = {"max_prompt_tokens": 8, "max_completion_tokens": 3, "seed": 0}


def line(**changes):
    known = {"prompt": "A:1+1", "completion": "2", "top_tokens": [[3, 4], [2]], "top_logprobs": [[-0.1, -3.0], [-0.2]]}
    return known | changes


def test_distributions_of_a_file_are_arrays(tmp_path):
    file, tokenizer = tmp_path / "top.jsonl", CharacterTokenizer()
    file.write_text(json.dumps(line()) + "\n")
    batch = likely_batches(likely_rows(file)[0], tokenizer, sequences_per_step=1, **LIMITS)[0]
    assert batch.top_tokens.tolist() == [[[3, 4], [2, -1], [-1, -1]]]
    assert batch.top_logprobs[0, 1].tolist() == [pytest.approx(-0.2), 0]
    logits = stored_distributions(8).logits({}, as_states(*(jnp.asarray(x) for x in batch[5:]))[0])
    assert float(jax.nn.softmax(logits)[1, 2]) == pytest.approx(np.exp(-0.2), rel=1e-5)
    np.testing.assert_allclose(jax.nn.softmax(logits)[2], 1 / 8, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_tokens": [[3, 4]]}, "give a list of ids and one of log-probabilities for each token"),
        ({"top_tokens": [[3], [2]]}, "at token 0; give lists of one length"),
        ({"top_tokens": [[3, 3], [2]]}, "give different ids, 0 or above"),
        ({"top_logprobs": [[-0.1, -0.2], [-0.2]]}, "whose probabilities sum to more than 1"),
        ({"completion": "22"}, "has distributions of 2 tokens, but its completion has 3"),
    ],
)
def test_distributions_that_cannot_be_are_refused(tmp_path, changes, message):
    file = tmp_path / "top.jsonl"
    file.write_text(json.dumps(line(**changes)) + "\n")
    with pytest.raises(ValueError, match=message):
        likely_batches(likely_rows(file)[0], CharacterTokenizer(), sequences_per_step=1, **LIMITS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kept_samples(ONES, PAIRS, ONES), "keep and threshold are both missing"),
        (lambda: hardest(rows=3), "sequences_per_pass is 3, which rollout.samples_per_prompt 2 does not divide"),
        (lambda: hardest(capacity=1), "capacity is 1, less than the 2 demonstrations"),
        (lambda: continual([[0.1, 0.2]]), r"history has the shape \(1, 2\)"),
        (lambda: selected({"x": ONES}, {"x": ONES}, density=0.0), "density is 0.0"),
        (lambda: behaviour_counts([""], behaviour="hope"), "behaviour is 'hope'; it must be one of step, backtracking"),
        (lambda: skewed_divergence(skew=1.0), "skew is 1.0"),
        (lambda: skewed_divergence(generator="skewed"), "generator is 'skewed', which is not a known divergence"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
