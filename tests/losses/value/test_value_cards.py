"""Credit inside a completion and values beyond the mean: worked examples, what changes nothing, what is left out."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import advantages, losses, rewards, selection
from jaxrl_llm.advantages.process.latent_rewards import decoded_factors, mean_return_error
from jaxrl_llm.losses.value.distributional import bin_shares

NAN = float("nan")
LOGPROBS = [[-0.1, -0.5], [-1.0, -2]]
BOTH = [[1.0, 1], [1, 1]]
BINS = [[0.0, 0, 1, 0.5, 0], [1, 0, 0, 0, 0]]


def behind(steps, lengths):
    """What a head says before each token and behind the last one, where step s is token s."""
    steps, width = np.asarray(steps, np.float32), np.shape(steps)[1]
    before = np.concatenate([np.full((len(steps), 1), 7.0), steps[:, :-1]], axis=1)
    scores = steps[np.arange(len(steps)), np.asarray(lengths) - 1]
    mask = (np.arange(width) < np.asarray(lengths)[:, None]).astype(np.float32)
    turn = np.broadcast_to(np.arange(width), before.shape)
    return before, scores, turn, mask, np.asarray(lengths)


def decomposed(steps, lengths, returns, drawn=None, **hyper):
    before, scores, turn, mask, length = behind(steps, lengths)
    function = partial(losses.return_decomposition, max_turns=before.shape[1], **hyper)
    return function, (before, scores, np.asarray(returns), turn, mask, length, *([] if drawn is None else [drawn]))


STEPS = [[0.2, 0.3, 9], [0.1, 0.4, 0.4]]
LONG = [[0.2, 0.3, 0.4, 0.1], [0.1, 0.4, 0.4, 9]]
DRAWN = [[1.0, 0, 1, 0], [1, 1, 0, 0]]
LABELS = [[1.0, 0, NAN], [NAN, 1, 1]]
ONE_A_TURN = [[0, 1, 2]]
RETURNS = [1.0, 0, 0.5, -1]
OF_ONE = ([0, 0, 0, 0], [1.0] * 4)
# A function, its arguments in order, what it returns.
EXAMPLES = {
    "rlpr": (rewards.likelihood_gain, (LOGPROBS, BOTH, [[-0.7, -0.9]] * 2, BOTH), [0.304107, 0]),
    "rlp": (
        partial(rewards.likelihood_gain, form="log_probability", low=None, high=None),
        ([[-0.5], [-1.5], [-1.0]], [[1.0]] * 3, [[-1.2]] * 3, [[1.0]] * 3),
        [0.7, -0.3, 0.2],
    ),
    "rlp, advantages": (advantages.leave_one_out, ([0.7, -0.3, 0.2], [0] * 3, [1.0] * 3), [0.75, -0.75, 0]),
    "jepo": (
        lambda *given: advantages.jensen_bound(*given)[0],
        ([[-0.5], [-1], [-3]], [[1.0]] * 3, [0] * 3, [1.0] * 3),
        [0.491516, 0.039554, -0.355633],
    ),
    "jepo, answers": (
        lambda *given: advantages.jensen_bound(*given)[1],
        ([[-0.5], [-1], [-3]], [[1.0]] * 3, [0] * 3, [1.0] * 3),
        [0.592201, 0.359188, 0.048611],
    ),
    "rmt 30%": (
        partial(rewards.shrinking_budget_length, total_steps=100, first_tokens=800),
        ([493, 986, 0], 30),
        [1.0, 0, 0],
    ),
    "rmt": (
        partial(rewards.shrinking_budget_length, total_steps=100, first_tokens=400, decay=1.0),
        ([200, 500, 900], 7),
        [0.5, 0.75, 0],
    ),
    "lare": (*decomposed(STEPS, [2, 3], [1.0, 0.5]), 0.040139),
    "spa": (*decomposed(STEPS, [2, 3], [1.0, 0.5], reduce="sum"), 0.205),
    "spa, a step of no contribution more": (
        *decomposed([[0.2, 0, 0.3, 9], [0.1, 0.4, 0, 0.4]], [3, 4], [1.0, 0.5], reduce="sum"),
        0.205,
    ),
    "lare, k steps": (*decomposed(LONG, [4, 3], [1.0, 0.6], DRAWN, unbiased=True), -0.00375),
    "lare, k steps, biased": (*decomposed(LONG, [4, 3], [1.0, 0.6], DRAWN), 0.0025),
    "attribution": (
        rewards.progress_attribution,
        ([[0.2, 0.5, 0.3]], ONE_A_TURN, [[1.0, 1, 1]], [[1.0, 0, 0]]),
        [[0.7, 0.5, 0.8]],
    ),
    "prm": (
        losses.step_label_likelihood,
        (*behind([[1, -0.5, 0], [-1, 2, -1]], [3, 3])[:2], LABELS, [3, 3], [1.0, 1]),
        0.556882,
    ),
    **{
        f"steps, {form}": (
            partial(rewards.aggregated_steps, form=form),
            (
                [[0.9, 0.5, 0.8, 0], [0.6, 0.7, 0.95, 0.4]],
                [[0, 1, 2, 3]] * 2,
                [[1.0, 1, 1, 0], [1, 1, 1, 1]],
            ),
            expected,
        )
        for form, expected in {
            "min": [0.5, 0.4],
            "product": [0.36, 0.1596],
            "mean": [0.733333, 0.6625],
            "last": [0.8, 0.4],
        }.items()
    },
    "rl-mle": (
        rewards.duration_weights,
        ([[1.0, 10], [4, 5]], BOTH, [1.0, 1], [[0, 1], [0, 1]]),
        [[0.2, 2], [0.8, 1]],
    ),
    "milestones": (rewards.milestone_reward, ([0.62, NAN, 0.5], [3.0, 2, 7], [1.0, 1, 0]), [0.92, -9.8, -10]),
    "milestones of failures": (
        partial(rewards.milestone_reward, add_to_valid=False),
        ([0.62], [3.0], [1.0]),
        [0.62],
    ),
    "hl-gauss": (partial(bin_shares, count=5, low=-1, high=1), ([0.3, -0.9],), None),
    "hl-gauss, loss": (
        partial(losses.categorical_value, low=-1, high=1),
        ([BINS], [[0.3, -0.9]], [[1.0, 1]]),
        1.295160,
    ),
    "hl-gauss, value": (partial(advantages.bin_mean, low=-1, high=1), ([BINS],), [[0.035223, -0.204610]]),
    "two-hot": (
        partial(bin_shares, count=5, low=-1, high=1, form="two_hot"),
        ([0.3, -0.9, 1],),
        [[0, 0, 0.4, 0.6, 0], [0.8, 0.2, 0, 0, 0], [0, 0, 0, 0, 1]],
    ),
    # Both errors are 1/2: 1/4 of 1/8 each.
    "quantile": (losses.quantile_value, ([[[0.0, 1]]], [[0.5]], [[1.0]]), 0.03125),
    "pinball": (partial(losses.quantile_value, kappa=0.0), ([[[0.0, 1]]], [[0.5]], [[1.0]]), 0.125),
    "cvar": (partial(advantages.quantile_mean, lower_share=0.5), ([[RETURNS]],), [[-0.5]]),
    "cvar in part": (partial(advantages.quantile_mean, lower_share=0.375), ([[RETURNS]],), [[-2 / 3]]),
    **{
        name: (partial(advantages.return_functional, functional=name, **hyper), (RETURNS, *OF_ONE), expected)
        for name, hyper, expected in [
            ("mean", {}, [0.875, -0.125, 0.375, -1.125]),
            ("lower_tail", {"share": 0.5}, [0.5, 0.5, 0.5, -1.5]),
            ("upper_tail", {"share": 0.5}, [0.75, -0.25, -0.25, -0.25]),
            ("mean_variance", {"lam": 0.5}, [0.765625, 0.140625, 0.578125, -1.484375]),
            ("set_point", {"target": 0.5}, [0.125, 0.125, 0.625, -0.875]),
            ("exponential", {}, [0.895963, -0.302514, 0.14996, -0.743409]),
        ]
    },
    "stock": (partial(advantages.running_stock, start=-2.0), ([[1.0, 0.5]],), [[-2, -1, -0.5]]),
    "slim": (
        lambda *given: advantages.critic_per_reward(*given, weights={"a": 1.0, "b": 0.5}, reward_names=("b", "a"))[0],
        ([[100.0, 1], [300, -1]], [[[0.0, 0]]] * 2, [[1.0]] * 2, [1.0, 1]),
        [[0.5], [-0.5]],
    ),
    # RIQL: heads 1, 2, 3 and a value of 1; then critics 0, 0, 5 against the target 1 + 0.5.
    "riql, quantile": (partial(advantages.critic_quantile, level=0.25), ([[[3.0, 1, 2]]],), [[1.5]]),
    "riql, value": (partial(losses.expectile_value, expectile=0.7), ([[1.0]], [[1.5]], [[1.0]]), 0.175),
    "riql, critics": (partial(losses.several_values, delta=1.0), ([[[0.0, 0, 5]]], [[1.5]], [[1.0]]), 5 / 3),
    "several": (losses.several_values, ([[[1.0, 3]]], [[[0.0, 1]]], [[1.0]]), 1.25),
    "reach, cut": (
        lambda *given: advantages.reach_aware(*given, lam=1.0)[0],
        ([0.0], [[[0.5, 0.4], [0.6, 0.8]]], [[0.9, 0.1]], [True], [[1.0, 1]], [1.0]),
        [[-0.3, -0.5]],
    ),
    "reach, ended": (
        lambda *given: advantages.reach_aware(*given, lam=1.0)[0],
        ([1.0], [[[0.5, 0.4], [0.6, 0.8]]], [[0.9, 0.1]], [False], [[1.0, 1]], [1.0]),
        [[0.6, 0.4]],
    ),
    "reach, spread": (
        lambda *given: advantages.reach_aware(*given)[2],
        ([0.0], [[[0.5, 0.4], [0.6, 0.8]]], [[0.9, 0.1]], [True], [[1.0, 1]], [1.0]),
        0.4,
    ),
    "gae of turns": (
        lambda *given: advantages.turn_advantages(*given)[0],
        ([[0.0, 0, 1]], [[0.2, 9, 0.4, 9, 0.6]], [[0, 0, 1, 1, 2]], [[1.0, 1, 1, 0, 1]], [1.0]),
        [[0.751, 0.751, 0.58, 0, 0.4]],
    ),
    "returns of turns": (
        lambda *given: advantages.turn_advantages(*given, gamma=0.9, lam=1.0)[1],
        ([[0.1, 0.2, 1], [0.3, 1, 5]], [[0.0] * 3] * 2, ONE_A_TURN * 2, [[1.0, 1, 1], [1, 1, 0]], [1.0, 1]),
        [[1.09, 1.1, 1], [1.2, 1, 0]],
    ),
}
GAUSSIAN = [[0.001356, 0.046901, 0.324842, 0.476585, 0.150316], [0.748389, 0.236045, 0.015371, 1.943986e-04, 0]]


@pytest.fixture(scope="module")
def found():
    given = {name: tuple(jnp.asarray(x) for x in data) for name, (_, data, _) in EXAMPLES.items()}
    value = lambda out: out.value if isinstance(out, losses.Loss) else out  # noqa: E731
    return jax.jit(lambda given: {name: value(EXAMPLES[name][0](*data)) for name, data in given.items()})(given)


def test_worked_examples_in_one_program(found):
    for name, (_, _, expected) in EXAMPLES.items():
        expected = GAUSSIAN if expected is None else expected
        np.testing.assert_allclose(found[name], expected, rtol=2e-5, atol=1.5e-6, err_msg=name)


def test_spans_of_several_models_are_added():
    """Clauses, sentences and the whole text: three models of their own density."""
    mask = jnp.ones((1, 6))
    clause, sentence, whole = (jnp.array([ids]) for ids in ([0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1], [0] * 6))
    total = rewards.added_span_rewards(jnp.array([[1.0, 0, 1]]), clause, mask, offset=-0.5, scale=0.6)
    total = rewards.added_span_rewards(jnp.array([[1.0, 0]]), sentence, mask, total, offset=-0.5)
    total = rewards.added_span_rewards(jnp.array([[1.2]]), whole, mask, total, offset=0.44678, scale=0.3 / 8.30116)
    np.testing.assert_allclose(total, [[0, 0.3, 0, 0.2, 0, -0.140486]], atol=1e-6)


def test_the_decoder_of_named_factors():
    layers = [
        (jnp.array([[0.5, -0.5], [1, 0]]), jnp.array([0, 0.1])),
        (jnp.array([[1.0, 0], [0, 2]]), jnp.array([0, -0.1])),
        (jnp.array([[1], [0.5]]), jnp.array([0.1])),
    ]
    factors = jnp.array([[[1.0, 0], [0, 1]]])
    np.testing.assert_allclose(decoded_factors(layers, factors), [[0.6, 1.15]], rtol=1e-6)
    error = mean_return_error(layers, factors, jnp.ones((1, 2), bool), jnp.ones(1), jnp.ones(1))
    np.testing.assert_allclose(error, 0.140625, rtol=1e-6)


def test_the_decoder_finds_what_turns_contribute():
    """The return is the sum of the first factor; the second one is noise. An absent row of NaN changes nothing."""
    method = advantages.latent_rewards(factors=2, width=16, learning_rate=1e-2, updates=200)
    factors = jax.random.normal(jax.random.key(3), (64, 4, 2)).at[-1].set(jnp.nan)
    turn, mask = jnp.broadcast_to(jnp.arange(5), (64, 5)), jnp.ones((64, 5)).at[:, 4].set(0)
    weight = jnp.ones(64).at[-1].set(0)
    told, _ = jax.jit(method.update)(method.init(), factors, factors[..., 0].sum(1), turn, mask, weight)
    assert np.corrcoef(told[:-1].ravel(), factors[:-1, :, 0].ravel())[0, 1] > 0.8
    assert not np.asarray(told[-1]).any()


def test_prompts_whose_rewards_lie_together_are_dropped():
    method = selection.spread_filter(beta=0.5)
    rows = jnp.array([0.0, 0, -0.1, 0.1, -0.3, 0.3, NAN, NAN])
    group, weight = jnp.array([0, 0, 1, 1, 2, 2, 3, 3]), jnp.array([1.0] * 6 + [0, 0])
    kept, memory = method.update({"spread": jnp.float32(0.2), "begun": jnp.array(True)}, rows, group, weight)
    np.testing.assert_array_equal(kept, [0, 0, 1, 1, 1, 1, 0, 0])
    np.testing.assert_allclose(memory["spread"], 0.199333, rtol=1e-5)
    kept, memory = method.update(method.init(), rows, group, weight)
    np.testing.assert_allclose(memory["spread"], 0.4 / 3, rtol=1e-6)
    assert method.update(memory, rows, group, 0 * weight)[1]["spread"] == memory["spread"]


def test_thoughts_that_were_cut_off_have_no_likelihood():
    logprobs, mask = jnp.array([[-0.5], [NAN], [-3.0], [-1.0]]), jnp.array([[1.0], [0], [1], [1]])
    group, weight = jnp.array([0, 0, 0, 1]), jnp.ones(4)
    got, share = jax.jit(advantages.jensen_bound)(logprobs, mask, group, weight)
    p = np.exp([-0.5, -3])
    np.testing.assert_allclose(got, [np.log(p.mean() / p[1]), 0, np.log(p.mean() / p[0]), 0], rtol=1e-5)
    np.testing.assert_allclose(share, [p[0] / p.sum(), 0, p[1] / p.sum(), 1], rtol=1e-5)
    gain = rewards.likelihood_gain(logprobs, mask, logprobs * 0 - 2.0, jnp.ones((4, 1)), without_answer=-0.5)
    assert gain[1] == -0.5


@pytest.mark.parametrize("form", ["probability", "mean_probability", "log_probability", "mean_log_probability"])
def test_the_gradient_of_an_answer_is_that_of_its_reward(form):
    logprobs, mask, weight = jnp.array([*LOGPROBS, [NAN, NAN]]), jnp.array([[1.0, 1], [1, 0], [0, 0]]), jnp.ones(3)
    loss = lambda x: losses.answer_likelihood_gradient(x, mask, weight, form=form).value  # noqa: E731
    reward = lambda x: rewards.answer_likelihood(x, mask, form=form)[:2].mean()  # noqa: E731
    (a, b), (da, db) = jax.jit(lambda x: ((loss(x), reward(x)), (jax.grad(loss)(x), jax.grad(reward)(x))))(logprobs)
    np.testing.assert_allclose(a, -b, rtol=1e-6)
    np.testing.assert_allclose(da, -db, rtol=1e-6)


def test_an_answer_without_a_thought_stands_behind_the_mark():
    prompt, length = jnp.array([[0, 3, 4]]), jnp.array([2])
    view = rewards.answer_without_thought(
        prompt, length, jnp.array([[8, 9, 0]]), jnp.array([2]), thought_ids=(7, 5), closing_ids=(6, 2)
    )
    assert view.prompt_tokens[0, -4:].tolist() == [3, 4, 7, 5]
    assert view.tokens[0].tolist() == [8, 9, 6, 2, 0]
    assert view.mask[0].tolist() == [1, 1, 1, 1, 0]
    with pytest.raises(ValueError, match="thought_ids is empty"):
        rewards.answer_without_thought(prompt, length, prompt, length, thought_ids=())


def test_turns_are_drawn_without_replacement():
    turn, mask = jnp.broadcast_to(jnp.arange(6), (50, 6)), jnp.ones((50, 6)).at[:25, 3:].set(0).at[0].set(0)
    rows = jnp.arange(50)
    draw = jax.jit(partial(selection.drawn_turns, max_turns=6, count=4))
    drawn = draw(turn, mask, rows, rows * 0, jnp.int32(3))
    assert drawn.sum(1).tolist() == [0] + [3] * 24 + [4] * 25
    assert (drawn[25:].mean(0) > 0.3).all()
    again = draw(turn[::-1], mask[::-1], rows[::-1], rows * 0, jnp.int32(3))
    np.testing.assert_array_equal(again[::-1], drawn)


def test_scores_behind_steps():
    """Tokens that do not count at the end of a step, and a step that was not taken."""
    turn, mask = jnp.array([[0, 0, 1, 3, 3]]), jnp.array([[1.0, 0, 1, 1, 1]])
    before, score, length = jnp.array([[9.0, 1, 9, 2, 9]]), jnp.array([3.0]), jnp.array([5])
    told = partial(rewards.step_end_scores, before, score, turn, mask, length, max_turns=4)
    np.testing.assert_allclose(told(form="score"), [[1, 2, 0, 3]])
    good = np.asarray(jax.nn.sigmoid(jnp.array([1.0, 2, 3])))
    np.testing.assert_allclose(told(), [[good[0], good[1], 0, good[2]]], rtol=1e-6)
    rise = [[good[0] - 0.5, good[1] - good[0], 0, good[2] - good[1]]]
    np.testing.assert_allclose(told(form="increment"), rise, rtol=1e-5)


def test_a_target_of_two_bins_has_the_mean_of_its_return():
    y = jnp.linspace(-1.5, 1.5, 31)
    shares = jax.jit(partial(bin_shares, count=7, low=-1, high=1, form="two_hot"))(y)
    np.testing.assert_allclose((np.asarray(shares) * np.linspace(-1, 1, 7)).sum(-1), np.clip(y, -1, 1), atol=1e-6)


def test_the_scale_of_a_reward_changes_nothing_with_a_critic_of_its_own():
    key = jax.random.split(jax.random.key(0), 2)
    parts, values = jax.random.normal(key[0], (6, 2)), jax.random.normal(key[1], (6, 3, 2))
    mask, weight = jnp.ones((6, 3)), jnp.ones(6).at[2].set(0)
    function = partial(advantages.critic_per_reward, weights={"a": 1.0, "b": 0.3}, reward_names=("a", "b"))
    factor = jnp.array([1.0, 1000])
    compiled = jax.jit(function)
    plain, returns = compiled(parts, values, mask, weight)
    scaled, _ = compiled(parts * factor, values * factor, mask, weight)
    np.testing.assert_allclose(scaled, plain, rtol=1e-4, atol=1e-5)
    assert returns.shape == (6, 3, 2)
    assert not np.asarray(plain[2]).any()
    with pytest.raises(ValueError, match="weights names 'c'; the rewards are a, b"):
        advantages.critic_per_reward(parts, values, mask, weight, weights={"c": 1.0}, reward_names=("a", "b"))


def test_one_critic_that_ended_is_ordinary_estimation():
    values = jnp.array([[0.3, 0.1, 0.8]])
    given = jnp.array([0.5]), jnp.array([[1.0, 1, 0]]), jnp.ones(1)
    aware = given[0], values[..., None], jnp.array([[7.0]]), jnp.array([False]), *given[1:]
    plain = given[0], values, *given[1:]
    (got, returns, spread), expected, targets = jax.jit(
        lambda: (advantages.reach_aware(*aware), advantages.gae(*plain), advantages.gae_returns(*plain))
    )()
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_allclose(returns, targets, rtol=1e-6)
    assert spread == 0


def test_rows_without_steps_and_constant_returns():
    function, given = decomposed([[0.5, 0.5], [NAN, NAN]], [2, 2], [1.0, NAN])
    before, scores, returns, turn, mask, length = (jnp.asarray(x) for x in given)
    loss = lambda s: function(before, s, returns, turn, mask * jnp.array([[1.0], [0]]), length)  # noqa: E731
    both = jax.jit(lambda s: (loss(s), jax.grad(lambda s: loss(s).value)(s + 0.1)))
    found, gradient = both(scores)
    assert found.denominator == 1
    np.testing.assert_allclose(found.value, 0, atol=1e-12)
    assert gradient[0] > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: advantages.return_functional(jnp.ones(1), jnp.zeros(1, int), jnp.ones(1), functional="x"),
            "functional",
        ),
        (lambda: bin_shares(jnp.ones(1), count=1, low=0, high=1), "head has 1 outputs"),
        (lambda: losses.several_values(jnp.ones((1, 1, 2)), jnp.ones((1, 1, 3)), jnp.ones((1, 1))), "returns of 3"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
