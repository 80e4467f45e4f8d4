"""Other networks than the policy: their updates, their temperature, and trained heads."""

from __future__ import annotations

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import advantages, losses
from jaxrl_llm.experience import Loss
from jaxrl_llm.models.heads import HeadConfig
from jaxrl_llm.signatures import renamed
from jaxrl_llm.training import LossTerm, Network, Resources, Rollout, Update, make_train_step
from jaxrl_llm.training.metrics import explained_variance
from jaxrl_llm.training.networks import GIVEN, ema, initial_networks, moved, networks_named
from jaxrl_llm.training.scores import Plain, of_head

ROLLOUT = Rollout(samples_per_prompt=2, max_completion_tokens=6, eos_ids=(2,), pad_id=0)
GAE = [("returns", advantages.gae_returns), ("advantages", advantages.gae)]
VALUE = [losses.clipped_surrogate, (losses.clipped_value, 0.5)]
CRITIC = optax.adam(0.05)


def fives(tokens, length):
    """Number of tokens 5, as a share of the length limit."""
    return ((tokens == 5) & (jnp.arange(tokens.shape[1]) < length[:, None])).sum(1) / tokens.shape[1]


def composed(model, networks=None, critic=None, **changes):
    parts = {
        "source": ROLLOUT,
        "rewards": [fives],
        "credit": [("advantages", advantages.group_normalized)],
        "losses": [losses.clipped_surrogate],
        "resources": Resources(networks=networks or {}, critic=critic),
    }
    return make_train_step(model, changes.pop("optimizer", optax.adam(0.1)), **(parts | changes))


def host(tree):
    return jax.tree.map(np.array, tree)


def differ(a, b):
    return any(
        np.abs(np.asarray(x) - np.asarray(y)).max() > 1e-6 for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


# ---- their updates --------------------------------------------------------------------------------------------------


class TestAnchors:
    def test_worked_example(self):
        np.testing.assert_allclose(ema(jnp.array([1.0, -1]), jnp.array([0.0, 1]), decay=0.99), [0.01, 0.98], rtol=1e-6)

    def test_it_works_on_trees_and_keeps_the_dtype_of_the_anchor(self):
        params = {"a": jnp.ones(2, jnp.bfloat16), "b": (jnp.full(3, 4.0),)}
        anchor = {"a": jnp.zeros(2, jnp.float32), "b": (jnp.zeros(3, jnp.bfloat16),)}
        after = ema(params, anchor, decay=0.75)
        assert after["a"].dtype == jnp.float32
        assert after["b"][0].dtype == jnp.bfloat16
        np.testing.assert_allclose(after["a"], 0.25)
        np.testing.assert_allclose(after["b"][0].astype(jnp.float32), 1.0)

    def test_it_ends_at_a_policy_that_stands_still(self):
        anchor = jnp.zeros(1)
        for _ in range(100):
            anchor = ema(jnp.array([3.0]), anchor, decay=0.9)
        np.testing.assert_allclose(anchor, 3 * (1 - 0.9**100), rtol=1e-5)
        np.testing.assert_array_equal(ema(jnp.array([3.0]), anchor, decay=1.0), anchor)

    def test_a_decay_that_is_no_share_is_named(self):
        with pytest.raises(ValueError, match=r"decay is 1.5"):
            ema(jnp.zeros(1), jnp.zeros(1), decay=1.5)


KEPT = {
    "reference": Network(),
    "copied": Network(copy_every=2),
    "at": Network(copy_at=(1, 3)),
    "slow": Network(decay=0.75),
    "behind": Network(origin="slow", copy_every=3),
    "twice": Network(decay=0.5, copy_every=4),
}


def say(names):
    """A loss without gradient that reads the log-probabilities of networks with these names."""
    data = ["logprobs", "advantages", "mask", *names]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in data]

    def called(**given):
        return losses.policy_gradient(given["logprobs"], given["advantages"], given["mask"])

    called.__signature__ = inspect.Signature(parameters)
    return called


@pytest.fixture(scope="module")
def followed(bigram, make_prompts):
    """Six steps with networks of every update rule: states on the host, and rows."""
    step = composed(bigram, KEPT, losses=[say([f"{name}_logprobs" for name in KEPT])], optimizer=optax.sgd(1.0))
    state = step.init(jax.random.key(0))
    states, rows = [host(state.networks)], []
    for _ in range(4):
        state, _, seen = step.run(state, make_prompts(4))
        states.append(host(state.networks))
        rows.append(jax.device_get(seen))
    return [{name: one.params["scores"] for name, one in state.items()} for state in states], rows


def test_all_start_where_the_policy_does_and_only_some_move(followed):
    states, _ = followed
    for name in KEPT:
        np.testing.assert_array_equal(states[0][name], states[0]["policy"])
    policies = [state["policy"] for state in states]
    assert all(differ(one, other) for one, other in itertools.pairwise(policies))
    for number in range(5):
        np.testing.assert_array_equal(states[number]["reference"], policies[0])
        np.testing.assert_array_equal(states[number]["copied"], policies[number // 2 * 2])
        np.testing.assert_array_equal(states[number]["at"], policies[[0, 1, 1, 3, 3][number]])


def test_one_that_decays_follows_at_a_distance_and_another_may_follow_it(followed):
    states, _ = followed
    slow = twice = states[0]["policy"]
    for number, state in enumerate(states[1:], 1):
        slow = 0.75 * slow + 0.25 * state["policy"]
        twice = state["policy"] if number == 4 else 0.5 * twice + 0.5 * state["policy"]
        np.testing.assert_allclose(state["slow"], slow, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state["twice"], twice, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(state["behind"], states[3]["slow"] if number >= 3 else states[0]["policy"])


def test_rows_are_scored_by_each_network_as_the_step_found_it(followed):
    states, rows = followed
    for before, seen in zip(states, rows, strict=False):
        inside = seen.mask > 0
        first = seen.prompt_tokens[:, -1:]
        previous = np.concatenate([first, seen.tokens[:, :-1]], 1)
        for name in KEPT:
            table = np.asarray(jax.nn.log_softmax(before[name], axis=-1))
            np.testing.assert_allclose(
                seen[f"{name}_logprobs"][inside], table[previous, seen.tokens][inside], atol=1e-5
            )


@pytest.mark.parametrize(
    ("network", "steps"),
    [
        (Network(), [0, 0, 0, 0]),
        (Network(copy_at=(2,)), [0, 2, 2, 2]),
        (Network(copy_every=3), [0, 0, 3, 3]),
        (Network(copy_every=3, copy_at=(1,)), [1, 1, 3, 3]),
        (Network(decay=0.0), [1, 2, 3, 4]),
    ],
)
def test_it_moves_when_it_is_told_to(bigram, network, steps):
    networks = {"reference": network}
    policy = {"scores": jnp.zeros((16, 16))}
    states = initial_networks(bigram, optax.sgd(0.1), networks, jax.random.key(0), policy, {})
    state = composed(bigram, losses=[(losses.kl_estimate, 1.0)]).init(jax.random.key(0)).replace(networks=states)
    for number, expected in enumerate(steps, 1):
        policy = state.networks["policy"].replace(params={"scores": jnp.full((16, 16), float(number))})
        state = state.replace(networks={**state.networks, "policy": policy}, step=jnp.int32(number))
        state = moved(bigram, networks, state)
        assert float(state.networks["reference"].params["scores"][0, 0]) == expected


# ---- their parameters and temperature -------------------------------------------------------------------------------


def test_a_network_speaks_at_its_own_temperature_and_may_be_given(bigram, make_prompts):
    networks = {
        "sharp": Network(temperature=0.5),
        "same": Network(temperature=2.0, always_origin=True),
        "teacher": Network(origin=GIVEN, model=bigram),
    }
    asked = [f"{name}_logprobs" for name in networks]
    step = composed(bigram, networks, losses=[say([*asked, "sharp_entropy"])], source=ROLLOUT)
    with pytest.raises(ValueError, match=r"network 'teacher' has no parameters; .* \{'teacher': \.\.\.\}"):
        step.init(jax.random.key(0))
    given = {"scores": jnp.eye(16)}
    state = step.init(jax.random.key(0), None, {"teacher": given})
    assert state.networks.keys() == {"policy", "sharp", "teacher"}, "one that is its origin needs no copy"
    policy = np.asarray(state.params["scores"])
    _, _, rows = step.run(state, make_prompts(4))
    previous = np.concatenate([rows.prompt_tokens[:, -1:], rows.tokens[:, :-1]], 1)
    inside = np.asarray(rows.mask) > 0
    for name, scores, temperature in (("sharp", policy, 0.5), ("same", policy, 2.0), ("teacher", given["scores"], 1)):
        table = np.asarray(jax.nn.log_softmax(np.asarray(scores) / temperature, axis=-1))
        np.testing.assert_allclose(
            np.asarray(rows[f"{name}_logprobs"])[inside], table[previous, rows.tokens][inside], atol=1e-5
        )
        if name == "sharp":
            entropy = -(np.exp(table) * table).sum(-1)
            np.testing.assert_allclose(np.asarray(rows["sharp_entropy"])[inside], entropy[previous][inside], atol=1e-5)
    assert not given["scores"].is_deleted()


def test_what_nothing_names_is_not_there(bigram):
    step = composed(bigram, {"proxy": Network(decay=0.9), "teacher": Network(origin=GIVEN, model=bigram)})
    assert jax.eval_shape(step.init, jax.random.key(0)).networks.keys() == {"policy"}


def test_names_bring_their_networks():
    named = lambda names, critic=CRITIC: list(networks_named(names, {}, (), critic))  # noqa: E731
    assert named({"rewards", "old_logprobs", "entropy"}) == []
    assert named({"old_values", "twin_values"}) == ["value", "twin"]
    assert named({"old_values"}, critic=None) == []
    assert named({"token_reward_logits", "twin_target_values", "reference_entropy"}) == [
        "reference", "twin", "token_reward", "twin_target"
    ]  # fmt: skip
    assert named({"over_vocabulary"}) == named({"kl_reference_per_token"}) == ["reference"]
    chain = {"slow": Network(decay=0.9), "slower": Network(origin="slow", decay=0.9), "other": Network()}
    assert list(networks_named({"slower_logprobs"}, chain, (), None)) == ["slow", "slower"]
    assert list(networks_named({"slow_answer_logprobs"}, chain, ("answer",), None)) == ["slow"]


def test_networks_that_are_made_from_nothing_are_refused():
    with pytest.raises(ValueError, match=r"networks\.slow\.origin is 'polcy'; did you mean 'policy'"):
        networks_named({"slow_logprobs"}, {"slow": Network(origin="polcy")}, (), None)
    with pytest.raises(ValueError, match="networks one, other form a cycle of origins"):
        networks_named({"one_logprobs"}, {"one": Network(origin="other"), "other": Network(origin="one")}, (), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "half"}, "backbone is 'half'"),
        ({"decay": 2.0}, "decay is 2.0; it must lie in"),
        ({"copy_every": -1}, "copy_every is -1"),
        ({"optimizer": CRITIC, "decay": 0.5}, "cannot also follow another one"),
        ({"optimizer": CRITIC, "copy_at": (3,)}, "cannot also follow another one"),
        ({"origin": "given"}, "parameters are given needs its model"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Network(**options)


def test_a_network_with_other_symbols_cannot_score_the_policys(bigram, make_bigram):
    networks = {"teacher": Network(origin=GIVEN, model=make_bigram(12))}
    with pytest.raises(ValueError, match=r"networks\.teacher has a vocabulary of 12, but the policy of 16"):
        composed(bigram, networks, losses=[say(["teacher_logprobs"])])
    networks = {"reward": Network(origin=GIVEN, model=make_bigram(12), head=HeadConfig())}
    with pytest.raises(
        ValueError, match=r"networks\.reward has a vocabulary of 12.*another tokenizer can be used through text"
    ):
        composed(bigram, networks, losses=[say(["reward_scores"])])


# ---- heads ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def valued(bigram, make_prompts):
    """Backbone -> (states, metrics) of steps with a value model, with the policy frozen for two steps."""
    done = {}

    def at(backbone):
        if backbone not in done:
            networks = {"value": Network(head=HeadConfig(), backbone=backbone, optimizer=CRITIC)}
            waits = Update(freeze_policy_steps=2)
            step = composed(bigram, networks, credit=GAE, losses=VALUE, update=waits)
            state = step.init(jax.random.key(0))
            states, metrics = [host(state.networks)], []
            for _ in range(3):
                state, shown = step(state, make_prompts(4))
                states.append(host(state.networks))
                metrics.append(jax.device_get(shown))
            done[backbone] = states, metrics
        return done[backbone]

    return at


@pytest.mark.parametrize("backbone", ["own", "shared"])
def test_a_value_model_is_trained_beside_the_policy(valued, backbone):
    states, metrics = valued(backbone)
    before, after = states[0]["value"], states[-1]["value"]
    assert ("backbone" in before.params) == (backbone == "own")
    assert differ(before.params, after.params)
    assert int(after.optimizer_state[0].count) == 3
    assert all(shown["gradient_norm/value"] > 0 for shown in metrics)
    assert all(np.isfinite(shown["value_explained_variance"]) for shown in metrics)


@pytest.mark.parametrize("backbone", ["own", "shared"])
def test_the_policy_waits_while_it_is_frozen_and_the_critic_does_not(valued, backbone):
    states, _ = valued(backbone)
    policy = [differ(states[0]["policy"].params, state["policy"].params) for state in states[1:]]
    value = [differ(states[0]["value"].params, state["value"].params) for state in states[1:]]
    assert (policy, value) == ([False, False, True], [True, True, True])


def test_a_value_model_learns_what_is_expected(bigram, make_prompts):
    # The policy is frozen, so that the returns, to which the value model is fitted, do not change.
    step = composed(bigram, critic=CRITIC, credit=GAE, losses=VALUE, update=Update(freeze_policy_steps=100))
    state, values = step.init(jax.random.key(0)), []
    for _ in range(12):
        state, metrics = step(state, make_prompts(4))
        values.append(float(metrics["loss/clipped_value"]))
    assert np.mean(values[-4:]) < np.mean(values[:4])


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "moves"), [("own", False), ("shared", True)])
def test_a_shared_backbone_learns_from_the_value_loss_and_an_own_one_leaves_the_policy_alone(
    model, make_prompts, backbone, moves
):
    networks = {"value": Network(head=HeadConfig(), backbone=backbone, optimizer=CRITIC)}
    step = composed(model, networks, credit=GAE, losses=[losses.clipped_value])
    assert step.composition.learning == ({"value", "policy"} if moves else {"value"})
    state = step.init(jax.random.key(0))
    before = host(state.params)
    state, _ = step(state, make_prompts(2))
    assert differ(before, state.params) == moves


def plain(rows):
    return Plain(rows.prompt_tokens, rows.prompt_length, rows.tokens, rows.length, None, None)


def test_own_and_shared_backbones_give_the_same_values_at_the_start(model, rows):
    key = jax.random.key(3)
    made = {name: Network(head=HeadConfig(), backbone=name, optimizer=CRITIC) for name in ("own", "shared")}

    @jax.jit
    def values(params):
        found = []
        for network in made.values():
            states = initial_networks(model, CRITIC, {"value": network}, key, params, {})
            said = of_head(
                network, model, states["value"].params, plain(rows), rows.mask, {"values", "scores"}, policy=params
            )
            found.append(said)
        return found

    own, shared = values(model.init(jax.random.key(0)))
    assert own["values"].shape == rows.tokens.shape
    assert own["scores"].shape == rows.length.shape
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), own, shared)


@pytest.fixture(scope="module")
def twins(bigram, make_prompts):
    """Two steps with twin critics and their slow copy: states, and the rows of the second step."""
    networks = {
        "twin": Network(head=HeadConfig(outputs=2), says="first", optimizer=CRITIC),
        "twin_target": Network(origin="twin", decay=0.75),
    }
    step = composed(
        bigram,
        networks,
        credit=[("advantages", advantages.twin_baseline_normalized)],
        losses=[losses.clipped_surrogate, losses.twin_huber_value],
    )
    state, states = step.init(jax.random.key(0)), []
    for _ in range(2):
        states.append(host(state.networks))
        state, _, rows = step.run(state, make_prompts(4))
    return [*states, host(state.networks)], jax.device_get(rows)


def test_the_slow_copy_moves_by_its_rate(twins):
    states, _ = twins
    jax.tree.map(np.testing.assert_array_equal, states[0]["twin"].params, states[0]["twin_target"].params)
    for before, after in itertools.pairwise(states):
        follow = lambda old, new, found: np.testing.assert_allclose(found, 0.75 * old + 0.25 * new, atol=1e-6)  # noqa: E731
        jax.tree.map(follow, before["twin_target"].params, after["twin"].params, after["twin_target"].params)
    assert states[2]["twin_target"].optimizer_state is None


def test_twin_critics_are_judged_by_their_slow_copies(twins):
    states, rows = twins
    assert rows["twin_target_values"].shape == (8, 2)
    assert differ(states[1]["twin"].params, states[1]["twin_target"].params)
    # The head reads the first token, and its backbone is a copy of the policy's table.
    head = states[1]["twin_target"].params["head"]["weight"]
    np.testing.assert_allclose(rows["twin_target_values"], head[rows.prompt_tokens[:, -1]], rtol=1e-5, atol=1e-7)


def test_a_copy_of_a_critic_that_does_not_move_on_its_own_is_the_critic(bigram):
    step = composed(
        bigram,
        critic=CRITIC,
        credit=[("advantages", advantages.twin_baseline_normalized)],
        losses=[losses.clipped_surrogate, losses.twin_huber_value],
    )
    assert jax.eval_shape(step.init, jax.random.key(0)).networks.keys() == {"policy", "twin"}
    assert step.composition.learning == {"policy", "twin"}


def test_values_split_into_microbatches_give_the_same_update(bigram, make_prompts):
    after = []
    for size in (None, 2):
        step = composed(bigram, critic=CRITIC, credit=GAE, losses=VALUE, update=Update(sequences_per_microbatch=size))
        state, _ = step(step.init(jax.random.key(0)), make_prompts(4))
        after.append(host(state.networks["value"].params["head"]))
    np.testing.assert_allclose(after[0]["weight"], after[1]["weight"], atol=2e-5)


def test_a_score_of_a_whole_row_is_read_behind_its_last_token(bigram, make_prompts):
    def scored(reward_scores):
        return reward_scores

    networks = {"reward": Network(head=HeadConfig())}
    step = composed(bigram, networks, rewards=[scored])
    state = step.init(jax.random.key(0))
    head = np.asarray(state.networks["reward"].params["head"]["weight"])[:, 0]
    _, _, rows = step.run(state, make_prompts(4))
    last = np.take_along_axis(np.asarray(rows.tokens), np.asarray(rows.length)[:, None] - 1, axis=1)[:, 0]
    np.testing.assert_allclose(rows["rewards"], head[last], rtol=1e-5)
    assert differ(head[last][:1], head[last][1:])


def test_explained_variance():
    returns, mask = jnp.array([[1.0, 2.0, 9.0]]), jnp.array([[1.0, 1.0, 0.0]])
    assert float(explained_variance(returns, returns, mask)) == 1.0
    assert float(explained_variance(jnp.zeros((1, 3)), returns, mask)) == pytest.approx(0.0, abs=1e-6)


def test_a_name_without_its_critic_is_refused(bigram):
    with pytest.raises(ValueError, match="names 'old_values', which nothing in this step provides; a critic provides"):
        composed(bigram, credit=GAE, losses=VALUE)


def test_a_network_that_learns_is_current_in_a_loss_and_old_names_it_as_found(bigram, make_prompts):
    """A student network: the loss updates it, and its old log-probabilities are those before the step."""

    def followed(student_logprobs, old_student_logprobs, mask):
        gap = ((student_logprobs - old_student_logprobs) * mask).sum()
        return Loss(-(student_logprobs * mask).sum(), mask.sum(), {"gap": (gap, mask.sum())})

    networks = {"student": Network(optimizer=optax.sgd(0.5))}
    step = composed(bigram, networks, credit=[], losses=[followed], update=Update(epochs_per_batch=2))
    assert step.composition.learning == {"student"}
    state = step.init(jax.random.key(0))
    before = host(state.networks)
    state, metrics = step(state, make_prompts(4))
    np.testing.assert_array_equal(state.params["scores"], before["policy"].params["scores"])
    assert differ(state.networks["student"].params, before["student"].params)
    # Two updates: the first starts at 0, so the mean over both shows the change by the first.
    assert float(metrics["gap/followed"]) > 1e-3


def test_losses_over_the_vocabulary_may_compare_with_several_networks(bigram, make_prompts):
    exact = losses.divergence(generator="reverse_kl", samples="vocabulary")
    teachers = {name: bigram.init(jax.random.key(seed)) for name, seed in (("near", 1), ("far", 2))}
    resources = Resources(networks={name: Network(origin="given", model=bigram) for name in teachers})
    step = make_train_step(
        bigram,
        optax.sgd(0.1),
        source=Rollout(samples_per_prompt=2, max_completion_tokens=6, eos_ids=(2,), pad_id=0),
        losses=[
            LossTerm(renamed(exact, over_vocabulary="near_over_vocabulary"), 1.0, "near"),
            LossTerm(exact, 1.0, "reference"),
            LossTerm(renamed(exact, over_vocabulary="far_over_vocabulary"), 1.0, "far"),
        ],
        resources=resources,
    )
    state = step.init(jax.random.key(0), None, teachers)
    log_p = jax.nn.log_softmax(jnp.copy(state.params["scores"]), axis=-1)
    _, metrics, rows = step.run(state, make_prompts(4))
    before = np.concatenate([np.asarray(rows.prompt_tokens)[:, -1:], np.asarray(rows.tokens)[:, :-1]], axis=1)
    for name, params in teachers.items():
        log_q = jax.nn.log_softmax(params["scores"], axis=-1)
        of_symbol = np.asarray((jnp.exp(log_p) * (log_p - log_q)).sum(-1))
        expected = (of_symbol[before] * rows.mask).sum() / rows.mask.sum()
        np.testing.assert_allclose(metrics[f"loss/{name}"], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss/reference"], 0.0, atol=1e-6)
    judged = renamed(exact, over_vocabulary="judge_over_vocabulary")
    with pytest.raises(ValueError, match="names 'judge_over_vocabulary', which nothing in this step provides"):
        make_train_step(bigram, optax.sgd(0.1), source=step.composition.sources, losses=[judged], resources=resources)
