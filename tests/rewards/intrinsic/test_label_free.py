"""Rewards without labels: the worked example of each card, rows in another order, absent rows, no answers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import rewards
from jaxrl_llm.evaluation.collapse import collapse_step, majority_sharpening
from jaxrl_llm.experience import Prompts
from jaxrl_llm.rewards.intrinsic.novelty import banded_novelty
from jaxrl_llm.rewards.intrinsic.trusted_prompts import trajectory_scores
from jaxrl_llm.rewards.verifiers.lexical_diversity import lexical_signals
from jaxrl_llm.rollout.plans import plain, voted

NAN = float("nan")
LOG_P = jax.nn.log_softmax(jnp.array([[[2.0, 0, 0], [0, 0, 0]]]))
ENTROPY = -(jnp.exp(LOG_P) * LOG_P).sum(-1)
DRAWN = jnp.array([[LOG_P[0, 0, 0], LOG_P[0, 1, 1]]])
ANSWERS = [1, 1, 2, -1]
HIDDEN = [[1.0, 0], [1, 0.1], [-1, 2]]
PLACES = [[0.0, 0], [0.2, 0], [1, 0], [2, 0], [4, 0]]
COVERED = [[[1.0, 1, 0], [0, 1, 0], [1, 0, 1]]]

# name: (function, data of one group, expected); `group` and `weight` are added where they are named.
EXAMPLES = {
    "self-certainty": (
        lambda logits, mask: rewards.token_mean(rewards.vocabulary_certainty(jax.nn.log_softmax(logits), mask), mask),
        {"logits": [[[2.0, 0, 0], [0, 0, 0]]], "mask": [[1.0, 1]]},
        [1.335745],
    ),
    "token entropy": (rewards.negative_entropy, {"old_entropy": ENTROPY, "mask": [[1.0, 1]]}, [-0.882092]),
    "trajectory": (rewards.sequence_likelihood, {"old_logprobs": DRAWN, "mask": [[1.0, 1]]}, [-0.669079]),
    "probability": (
        partial(rewards.sequence_likelihood, form="probability"),
        {"old_logprobs": DRAWN, "mask": [[1.0, 1]]},
        [0.262329],
    ),
    "empo": (rewards.answer_frequency, {"answer_id": ANSWERS}, [0.5, 0.5, 0.25, 0]),
    "semantic entropy": (rewards.semantic_entropy, {"answer_id": ANSWERS}, [0.636514] * 4),
    "ttrv": (
        partial(rewards.answer_frequency, unanswered_votes=True, entropy_weight=0.75),
        {"answer_id": ANSWERS},
        [-0.209796, -0.209796, -0.459796, -0.459796],
    ),
    "ttrl": (rewards.majority_match, {"answer_id": [3, 5, -1, 5, 3, 7]}, [1, 0, 0, 0, 1, 0]),
    "no label in a tie": (
        partial(rewards.majority_match, break_ties=False),
        {"answer_id": [3, 5, -1, 5, 3, 7]},
        [0] * 6,
    ),
    "rlccf": (
        rewards.collective_match,
        {"answer_id": [1, 1, 1, 2, 2, 2, 3, 4], "voter": [0, 0, 0, 0, 1, 1, 1, 1]},
        [1, 1, 1, 0, 0, 0, 0, 0],
    ),
    "evol-rl": (
        banded_novelty,
        {
            "similarity": [[1.0, 0.9, 0.2, 0.5], [0.9, 1, 0.4, 0.3], [0.2, 0.4, 1, 0.6], [0.5, 0.3, 0.6, 1]],
            "agrees": [1.0, 1, 1, 0],
            "answer_id": [0, 0, 0, 3],
        },
        [0.576923, 0.5, 1, -0.5],
    ),
    "a lone answer": (
        rewards.majority_novelty,
        {"embedding": HIDDEN, "agrees": [1.0, 0, 0], "answer_id": [0, -1, -1]},
        [-1, -1, -1],
    ),
    "rep-exp": (
        rewards.leverage_bonus,
        {"rewards": [1.0, 0, 0], "embedding": HIDDEN, "step": 3},
        [1.002784, 0.002585, 0.006651],
    ),
    "rep-exp, leave one out": (
        partial(rewards.leverage_bonus, beta=0.1, leave_one_out=True),
        {"rewards": [1.0, 0, 0], "embedding": HIDDEN, "step": 3},
        [1.038575, 0.034866, 0.198632],
    ),
    "rep-exp, nothing solved": (
        rewards.leverage_bonus,
        {"rewards": [0.0, 0, 0], "embedding": HIDDEN, "step": 3},
        [0, 0, 0],
    ),
    "srpo": (
        rewards.nearness_to_success,
        {"embedding": PLACES, "correct": [1.0, 1, 0, 0, 0]},
        [1, 1, 0.595984, 0.504679, 0.004016],
    ),
    "srpo, one of each": (
        rewards.nearness_to_success,
        {"embedding": PLACES[1:3], "correct": [1.0, 0]},
        [1, 0.3],
    ),
    "srpo, no success": (rewards.nearness_to_success, {"embedding": PLACES[:3], "correct": [0.0, 0, 0]}, [0, 0, 0]),
    "e3b": (
        rewards.elliptical_bonus,
        {"features": [[[1.0, 0], [1, 0], [0, 1]]], "turn_mask": [[1.0, 1, 1]]},
        [[10, 0.909091, 10]],
    ),
    "submodular": (
        partial(rewards.coverage_gains, element_weights=(1.0, 2.0, 0.5)),
        {"covered": COVERED, "turn_mask": [[1.0, 1, 1]]},
        [[3, 0, 0.5]],
    ),
    "trapo": (
        rewards.labelled_or_voted,
        {"correct": [1.0, 0, 0], "answer_id": [0, 1, 1], "labelled": [0.0, 0, 0]},
        [0, 1, 1],
    ),
}


def asked(function):
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__wrapped__", function).__code__.co_varnames


def given(function, data, rows):
    """The data of an example with an absent row of another group behind it, which holds NaN."""
    made = {}
    for name, value in data.items():
        value = jnp.asarray(value)
        if value.ndim and name != "similarity":
            filler = jnp.full((1, *value.shape[1:]), NAN) if value.dtype == jnp.float32 else jnp.zeros_like(value[:1])
            value = jnp.concatenate([value, filler if "weight" in asked(function) else jnp.zeros_like(value[:1])])
        elif value.ndim:
            value = jnp.pad(value, (0, 1))
        made[name] = value
    if "group" in asked(function):
        made["group"] = jnp.array([2] * rows + [0], jnp.int32)
    if "weight" in asked(function):
        made["weight"] = jnp.array([1.0] * rows + [0.0])
    return made


def test_worked_examples_of_the_cards_in_one_program():
    data = {name: given(f, data, len(expected)) for name, (f, data, expected) in EXAMPLES.items()}
    found = jax.jit(lambda data: {name: EXAMPLES[name][0](**one) for name, one in data.items()})(data)
    for name, (function, _, expected) in EXAMPLES.items():
        np.testing.assert_allclose(found[name][:-1], expected, rtol=2e-5, atol=2e-6, err_msg=name)
        if "weight" in asked(function) and "rewards" not in data[name]:
            assert found[name][-1].tolist() == 0.0, name


def test_the_order_of_rows_does_not_matter_but_for_ties():
    order = np.array([3, 0, 2, 1])
    for name in ("empo", "semantic entropy", "ttrv", "evol-rl"):
        function, data, _ = EXAMPLES[name]
        one = given(function, data, 4)
        turned = {key: value if not value.ndim else value.at[:4].set(value[:4][order]) for key, value in one.items()}
        if "similarity" in turned:
            turned["similarity"] = turned["similarity"].at[:4, :4].set(turned["similarity"][:4, :4][:, order])
        np.testing.assert_allclose(function(**turned)[:4], function(**one)[:4][order], rtol=1e-6, err_msg=name)


def test_counts_of_visits_are_remembered():
    states, mask, weight = jnp.array([[0, 1, 0, 2]]), jnp.ones((1, 4)), jnp.ones(1)
    for scope, expected, later in (
        ("episodic", [1, 1, 0.707107, 1], [1, 1, 0.707107, 1]),
        ("product", [1, 1, 0.5, 1], [0.57735, 0.707107, 0.353553, 0.707107]),
        ("global", [1, 1, 0.707107, 1], [0.57735, 0.707107, 0.5, 0.707107]),
    ):
        method = rewards.count_bonus(scope=scope, buckets=8)
        first, memory = method.update(method.init(), states, mask, weight)
        np.testing.assert_allclose(first[0], expected, rtol=1e-5)
        np.testing.assert_allclose(method.update(memory, states, mask, weight)[0][0], later, rtol=1e-5)
    with pytest.raises(ValueError, match="scope is 'local'; it must be one of episodic, global, product"):
        rewards.count_bonus(scope="local")


def test_prompts_whose_pass_rates_move_like_those_of_labelled_ones_are_trusted():
    history = jnp.array([[0.1, 0.3, 0.6, 0.8], [0.2, 0.3, 0.5, 0.9], [0.9, 0.5, 0.3, 0.2], [0.5, 0.2, 0.4, 0.5]])
    first = jnp.arange(4) == 0
    scores = trajectory_scores(history, jnp.full(4, 4), first, jnp.arange(4), ~first)
    np.testing.assert_allclose(scores[1:], [0.95239, -0.95239, 0.227429], rtol=1e-5)
    method = rewards.trusted_trajectories(prompt_ids=5, epochs=8, warm_up_epochs=3)
    memory, ids = method.init(), jnp.arange(4)
    update = jax.jit(method.update)
    for epoch in range(4):
        labelled = first.astype(jnp.float32)
        learned, memory = update(memory, history[:, epoch], labelled, ids, ids, jnp.ones(4))
        np.testing.assert_array_equal(learned, [1, float(epoch == 3), 0, 0])
    np.testing.assert_array_equal(memory["trusted"], [True, True, False, False, False])
    np.testing.assert_array_equal(memory["visits"], [4, 4, 4, 4, 0])
    unlabelled, _ = update(method.init(), history[:, 0], jnp.zeros(4), ids, ids, jnp.ones(4))
    assert not unlabelled.any()
    share = rewards.known_share(jnp.arange(2000), share=0.1)
    assert 0.07 < share.mean() < 0.13


def test_a_vote_of_texts_and_embeddings_of_texts():
    texts = ["<a>3</a>", "<a>5</a>", "", "<a> 5</a>", "<a>3</a>", "<a>7</a>", "no answer", ""]
    assert rewards.voted_answer(texts, [0] * 6 + [1, 1]) == [1, 0, 0, 0, 1, 0, 0, 0]
    inner = rewards.ngram_counts(["so <a>abcabc</a>", "abcabc"], letters=3, buckets=16, tags=("<a>", "</a>"))
    np.testing.assert_array_equal(inner, [rewards.ngram_counts(["abcabc"], letters=3, buckets=16)[0], np.zeros(16)])
    counts = rewards.ngram_counts(["abcabc", "ab", ""], letters=3, buckets=16)
    assert [count.sum() for count in counts] == [4, 0, 0]
    assert counts[0].max() >= 2


def test_lexical_diversity():
    np.testing.assert_allclose(lexical_signals("1 2 3. 1 2 4"), [0.666667, 0.75, 0.742098, 0.888889, 0.5], rtol=1e-5)
    np.testing.assert_allclose(rewards.lexical_diversity(["1 2 3\n1 2 4.", "", "once"]), [0.709531, 0, 0], rtol=1e-5)


def test_more_samples_vote_than_learn():
    plan = voted(plain(samples_per_prompt=2), samples_per_prompt=2, samples_voted=6)
    prompts = Prompts(*(jnp.zeros(shape, jnp.int32) for shape in ((3, 4), (3,), (3,), (3, 2), (3,))))
    (request,) = plan.requests(None, None, prompts)
    assert (request.samples_per_prompt, plan.drawn, plan.samples) == (6, 6, 2)
    with pytest.raises(ValueError, match=r"samples_voted is 1, but rollout[.]samples_per_prompt 2 of them learn"):
        voted(plain(samples_per_prompt=2), samples_per_prompt=2, samples_voted=1)


def test_collapse_of_training_without_labels():
    np.testing.assert_allclose(majority_sharpening(0.4, beta=1.0, rounds=3), [0.4, 0.644405, 0.831253, 0.930509], 1e-5)
    assert collapse_step([0.3, 0.5, 0.6, 0.55, 0.2], window=1, margin=0.05) == (2, True)
    assert collapse_step([0.3, 0.5], window=1) == (1, False)
    with pytest.raises(ValueError, match="accuracy is empty"):
        collapse_step([])
