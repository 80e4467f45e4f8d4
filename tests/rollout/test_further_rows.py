"""Plans whose rows start from other rows, and rows that are rewritten before training."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import advantages, losses, models, rewards
from jaxrl_llm.experience import Experience, Prompts, Source
from jaxrl_llm.rewards.shaping.parallel_paths import inside_threads
from jaxrl_llm.rollout import plans
from jaxrl_llm.rollout.generation import Pause, Prefixes, generate
from jaxrl_llm.rollout.plans.abandoned_rows import Outcomes
from jaxrl_llm.rollout.plans.demonstration_prefixes import cosine_share, most_uncertain, prefix_length
from jaxrl_llm.rollout.plans.purified_conversations import repaired_turns, without_turns
from jaxrl_llm.rollout.plans.step_trees import Tree, backed_up, selected, tree_targets
from jaxrl_llm.rollout.rewriting import compacted
from jaxrl_llm.rollout.sampled import Rollout
from jaxrl_llm.rows import empty_rows
from jaxrl_llm.selection import guided_pairs
from jaxrl_llm.training import Network, Resources, make_train_step

WIDTH, SAMPLES, EOS = 8, 4, 2


@pytest.fixture
def model(make_bigram):
    return make_bigram(16)


@pytest.fixture(scope="module")
def attending():
    return models.transformer(models.TransformerConfig(16, width=16, layers=1, heads=2, kv_heads=1))


def prompts(count=3):
    number = np.arange(count, dtype=np.int32)
    told = np.stack([number + 3, number * 0 + 9], axis=1)
    shown = np.stack([number * 0 + 5, number * 0 + 6, number * 0 + 7, number * 0 + EOS], axis=1)
    fields = {"privileged_tokens": told, "privileged_length": number * 0 + 2}
    fields |= {"demonstration_tokens": shown, "demonstration_length": number * 0 + 4}
    plain = np.stack([number * 0, number + 3], axis=1)
    return Prompts(plain, number * 0 + 1, number, number[:, None], number * 0 + 1, fields)


def odd_second(tokens):
    return (tokens[:, 1] % 2).astype(jnp.float32)


def composed(model, plan, **changed):
    given = {
        "rewards": [odd_second],
        "credit": [("advantages", advantages.group_normalized)],
        "losses": [losses.clipped_surrogate],
    }
    source = Rollout(SAMPLES, WIDTH, eos_ids=(EOS,), pad_id=0, plan=plan)
    return make_train_step(model, optax.sgd(0.1), source=source, **(given | changed))


def drawn(model, plan, steps=1, **changed):
    """The rows of the last step, its metrics and its state."""
    step = composed(model, plan, **changed)
    state = step.init(jax.random.key(0))
    for _ in range(steps):
        state, metrics, rows = step.run(state, prompts())
    return rows, metrics, state


def inside(branches):
    return plans.plain(samples_per_prompt=SAMPLES - branches)


def test_prefixes_of_demonstrations(model):
    plan = plans.demonstration_prefix(
        inside(1),
        samples_per_prompt=SAMPLES,
        max_completion_tokens=WIDTH,
        pad_id=0,
        total_steps=4,
        branches=1,
        least_share=0.5,
        first_share=0.8,
        trained_share=0.5,
    )
    rows, metrics, state = drawn(model, plan, 2)
    shown = np.asarray(rows.source == Source.DEMONSTRATION)
    branch = np.asarray(rows["branch"]) > 0
    assert int(state.memory["rollout:plan"]) == 2
    assert set(shown[branch].sum(1).tolist()) <= {2, 3}
    assert not shown[~branch].any()
    for row in np.flatnonzero(branch):
        np.testing.assert_array_equal(rows.tokens[row][shown[row]], [5, 6, 7][: shown[row].sum()])
    count = shown.sum()
    trained = np.asarray(rows.mask)[shown].sum()
    assert trained == count - int(count * 0.5)
    entropy = np.asarray(rows.behaviour_entropy)
    taught = (np.asarray(rows.mask) > 0) & shown
    assert entropy[taught].min() >= entropy[shown & ~taught].max()
    assert not np.asarray(rows.mask)[branch & np.asarray(rows.truncated)][:, 3:].any()
    assert float(metrics["prefix_tokens"]) == shown[branch].sum(1).mean()
    assert metrics["sampler_gap_max"] < 1e-5


@pytest.mark.slow
def test_help_is_there_while_sampling_and_not_while_learning(model):
    made = partial(plans.helped, inside(1), samples_per_prompt=SAMPLES, branches=1)
    rows, metrics, _ = drawn(model, made(keep="all"))
    branch = np.asarray(rows["branch"]) > 0
    np.testing.assert_array_equal(rows.prompt_tokens, np.repeat(prompts().tokens, SAMPLES, axis=0))
    np.testing.assert_array_equal(rows.group, np.repeat(np.arange(3), SAMPLES))
    assert metrics["sampler_gap_max"] < 1e-5  # of the tokens that were sampled in this row
    source = np.asarray(rows.source)
    assert (source[branch] == Source.REPLAYED).any()
    assert not (source[branch] == Source.SAMPLED).any()
    # Sampled after the other prompt: equal to `generate` for the same sample number.
    state = composed(model, None).init(jax.random.key(0))
    p = prompts()
    asked = Prompts(p.fields["privileged_tokens"], p.fields["privileged_length"], *(getattr(p, n) for n in
                    ("prompt_id", "answer_tokens", "answer_length")))  # fmt: skip
    alone = generate(model, state.params, asked, jax.random.fold_in(state.key, 3), 0, samples_per_prompt=1,
                     max_completion_tokens=WIDTH, eos_ids=(EOS,), pad_id=0, first_sample=SAMPLES - 1)  # fmt: skip
    np.testing.assert_array_equal(np.asarray(rows.tokens)[branch], alone.tokens)


def test_explanations_are_groups_of_their_own_and_only_right_ones_learn(model):
    plan = plans.helped(inside(1), samples_per_prompt=SAMPLES, branches=1, learned="written")
    rows, metrics, _ = drawn(model, plan, losses=[losses.clipped_surrogate, (losses.stored_likelihood, 0.04)])
    branch = np.asarray(rows["branch"]) > 0
    np.testing.assert_array_equal(np.asarray(rows.group)[branch], [3, 4, 5])
    assert not np.asarray(rows.mask)[branch].any()
    assert not np.asarray(rows["written_mask"])[~branch].any()
    np.testing.assert_array_equal(np.asarray(rows.weight)[branch], np.asarray(rows["correct"])[branch])
    np.testing.assert_allclose(metrics["reward"], np.asarray(rows["rewards"])[~branch].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["helped_share"], np.asarray(rows["correct"])[branch].mean())


def test_guidance_comes_after_failure_alone(model):
    plan = plans.helped(inside(2), samples_per_prompt=SAMPLES, branches=2, prompts="failed", keep="all")
    rows, _, _ = drawn(model, plan, rewards=[lambda prompt_id: (prompt_id != 1).astype(jnp.float32)])
    right, weight = (np.asarray(x).reshape(3, SAMPLES) for x in (rows["correct"], rows.weight))
    np.testing.assert_array_equal(weight[:, 2:] > 0, np.repeat(right[:, :2].max(1, keepdims=True) < 1, 2, axis=1))
    assert (weight[:, 2:] > 0).sum() == 2


def test_pairs_of_guided_and_plain_attempts():
    rewards = jnp.array([[0.0, 0, 0, 1], [0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    branch = jnp.tile(jnp.array([0.0, 0, 1, 1]), 4)
    found = guided_pairs(rewards.reshape(-1), jnp.repeat(jnp.arange(4), 4), jnp.ones(16), branch).reshape(4, 4)
    np.testing.assert_array_equal(found, [[0, -1, -1, 1], [0, -1, 1, -1], [-1] * 4, [-1] * 4])


def test_a_view_samples_and_another_is_scored(model):
    rows, metrics, _ = drawn(model, plans.under_view(plans.plain(samples_per_prompt=SAMPLES)))
    np.testing.assert_array_equal(rows.prompt_tokens, np.repeat(prompts().tokens, SAMPLES, axis=0))
    np.testing.assert_array_equal(rows.prompt_length, 1)
    assert "plain_tokens" not in rows
    assert metrics["ratio_max"] < 1 + 1e-5  # old log-probabilities are those after the plain prompt


@pytest.mark.slow
def test_pivotal_credit_and_hints_that_are_not_learned(model):
    options = {"samples_per_prompt": SAMPLES, "max_completion_tokens": WIDTH, "pad_id": 0, "branches": 2}
    made = partial(plans.resume, inside(2), choose=plans.last_share, **options)
    rows, _, _ = drawn(model, made(encode=None, trained_origin=False))
    mask, length = (np.asarray(x).reshape(3, SAMPLES, -1) for x in (rows.mask, rows.length))
    for origin in range(2):
        kept = length[:, origin, 0] // 2
        for group in range(3):
            assert not mask[group, origin, : kept[group]].any()
            assert mask[group, origin, kept[group] : length[group, origin, 0]].all()
    hinted = partial(made, hint="ab", encode=lambda text: [9, 10])
    shown = np.asarray(drawn(model, hinted())[0].tokens)
    rows, metrics, _ = drawn(model, hinted(hint_is_learned=False))
    without, branch = np.asarray(rows.tokens), np.asarray(rows["branch"]) > 0
    for row in np.flatnonzero(branch):
        group, number = divmod(row, SAMPLES)
        at = min(int(length[group, number - 2, 0]) // 2, WIDTH - 4)
        np.testing.assert_array_equal(without[row, : WIDTH - 2], np.delete(shown[row], [at, at + 1]))
    assert metrics["ratio_max"] < 1 + 1e-5
    with pytest.raises(ValueError, match="no hint and no view to remove"):
        made(encode=None, hint_is_learned=False)
    with pytest.raises(ValueError, match="always trained with the plain prompt"):
        made(encode=None, view="privileged")


def test_worked_examples():
    shares = cosine_share(jnp.array([50, 100, 300]), first=0.95, last=0.05, steps=100)
    np.testing.assert_allclose(shares, [0.5, 0.05, 0.05], atol=1e-6)
    lengths = prefix_length(jnp.array([0.5, 1.0, 0.5]), jnp.array([20, 4, 1]), 0.2, 0.8, least_tokens=1)
    np.testing.assert_array_equal(lengths, [10, 3, 0])
    entropy = jnp.array([[0.1, 0.9, 0.3, 0.7, 0.2]])
    assert most_uncertain(entropy, jnp.ones((1, 5), bool), share=0.2).tolist() == [[False, True, False, False, False]]
    assert not most_uncertain(entropy, jnp.ones((1, 5), bool), share=0.0).any()
    failed = jnp.array([[True, True, True, False], [True, False, False, False], [True, True, False, True]])
    found = repaired_turns(failed, jnp.array([4, 1, 4]), tries=2)
    np.testing.assert_array_equal(found, [[0] * 4, [0] * 4, [1, 1, 0, 0]])


def test_a_conversation_without_its_failed_turn():
    #         call  ERR    call  value  answer
    said = [5, 6, 11, 5, 7, 12, 13, 8, EOS, 0]
    source = [1, 1, 3, 1, 1, 3, 3, 1, 1, 0]
    turn = [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    rows = empty_rows(1, 2, 1, 10).filled(
        tokens=jnp.array([said]), length=jnp.array([9]), source=jnp.array([source], jnp.int8),
        mask=(jnp.array([source]) == 1).astype(jnp.float32), turn=jnp.array([turn]), turns=jnp.array([3]),
        turn_rewards=jnp.array([[-0.05, 0.0, 1.0, 0.0]]), durations=jnp.array([[3.0, 2.0, 1.0, 0.0]]),
    )  # fmt: skip
    gone = repaired_turns(plans.turns_below(rows["turn_rewards"]), rows["turns"], tries=3)
    np.testing.assert_array_equal(gone, [[1, 0, 0, 0]])
    encode = lambda text: [11]  # noqa: E731
    by_text = plans.turns_answered(
        rows.tokens, rows.source, rows["turn"], rows["turn_rewards"], text="E", encode=encode
    )
    np.testing.assert_array_equal(by_text, gone)
    made = without_turns(rows, gone, 0)
    np.testing.assert_array_equal(made.tokens, [[5, 7, 12, 13, 8, EOS, 0, 0, 0, 0]])
    np.testing.assert_array_equal(made.mask, [[1, 1, 0, 0, 1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(made["turn"], [[0, 0, 0, 0, 1, 1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(made["turn_rewards"], [[0, 1, 0, 0]])
    np.testing.assert_array_equal(made["durations"], [[2, 1, 0, 0]])
    assert int(made["turns"][0]) == 2
    assert int(made.length[0]) == 6
    replayed = np.asarray(made.source)[0, [0, 1, 4, 5]]
    assert (replayed == Source.REPLAYED).all()
    same = without_turns(rows, jnp.zeros_like(gone), 0)
    for name in ("tokens", "source", "turn", "mask", "turn_rewards"):
        np.testing.assert_array_equal(same[name], rows[name])
    with pytest.raises(ValueError, match="text is empty"):
        plans.turns_answered(rows.tokens, rows.source, rows["turn"], rows["turn_rewards"], text="", encode=lambda _: [])


def calls_counted(model):
    """A model that counts its calls by the number of positions."""
    calls = []

    def apply(params, tokens, positions, cache):
        jax.debug.callback(lambda: calls.append(tokens.shape[1]))
        return model.apply(params, tokens, positions, cache)

    return model._replace(apply=apply), calls


def sampled(model, params, **options):
    p = prompts()
    asked = Prompts(p.tokens, p.length, p.prompt_id, p.answer_tokens, p.answer_length)
    return jax.block_until_ready(
        generate(model, params, asked, jax.random.key(5), 0, samples_per_prompt=2, max_completion_tokens=WIDTH,
                 eos_ids=(), pad_id=0, **options)
    )  # fmt: skip


def same_rows(one: Experience, other: Experience):
    for name in ("tokens", "length", "behaviour_logprobs", "behaviour_entropy"):
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.slow
def test_a_look_at_rows_changes_no_bit_and_computes_nothing_again(attending):
    params = attending.init(jax.random.key(1))
    counted, calls = calls_counted(attending)
    whole = sampled(counted, params)
    jax.effects_barrier()
    before, calls[:] = list(calls), []
    looked = sampled(counted, params, pause=Pause(3, lambda known: jnp.ones(6, bool)))
    jax.effects_barrier()
    same_rows(whole, looked)
    assert sorted(calls) == sorted(before)  # the prompt once, and one call for each token but the last
    assert sum(calls) == 2 + WIDTH - 1
    assert not looked["abandoned"].any()
    first = jnp.arange(6) < 3
    some = sampled(attending, params, pause=Pause(3, lambda known: first))
    np.testing.assert_array_equal(some.tokens[:3], whole.tokens[:3])
    np.testing.assert_array_equal(some.length, [WIDTH] * 3 + [3] * 3)
    np.testing.assert_array_equal(some["abandoned"], [0] * 3 + [1] * 3)
    np.testing.assert_array_equal(some.tokens[3:, :3], whole.tokens[3:, :3])


@pytest.mark.slow
def test_a_prefix_is_read_in_one_pass_and_goes_on_to_the_same_row(attending):
    params = attending.init(jax.random.key(1))
    counted, calls = calls_counted(attending)
    whole = sampled(attending, params)
    kept = 5
    prefixes = Prefixes(whole.tokens[:, :kept], jnp.full(6, kept), jnp.full((6, kept), Source.SAMPLED, jnp.int8))
    going_on = sampled(counted, params, prefixes=prefixes)
    jax.effects_barrier()
    np.testing.assert_array_equal(going_on.tokens, whole.tokens)
    np.testing.assert_allclose(going_on.behaviour_logprobs, whole.behaviour_logprobs, atol=1e-5)
    assert sorted(calls) == [1] * (WIDTH - 1 - kept) + [2, kept + 1]


@pytest.mark.slow
def test_what_looks_lost_is_given_up_where_that_is_cheaper(model):
    look = partial(
        plans.early_abort, plans.plain(samples_per_prompt=SAMPLES), lost=lambda tokens: tokens[:, 1] % 2 == 0
    )
    rows, metrics, state = drawn(model, look(after_tokens=3, spared=0.5), 1)
    assert float(metrics["abandoned_share"]) == 0  # there are no rates yet
    known = state.memory["rollout:plan"]
    assert float(known.count.sum()) == 12
    assert float(known.count[1, 1]) == 0  # odd rows are not predicted to fail
    plain = drawn(model, plans.plain(samples_per_prompt=SAMPLES))[0]
    same_rows(plain, rows)
    rows, metrics, _ = drawn(model, look(after_tokens=3, spared=0.5, least_successes=1), 3)
    assert float(metrics["abandoned_share"]) > 0
    gone = np.asarray(rows["abandoned"]) > 0
    assert not np.asarray(rows.weight)[gone].any()
    assert set(np.asarray(rows.weight)[~gone].tolist()) <= {1.0, 2.0}
    np.testing.assert_array_equal(np.asarray(rows.length)[gone], 3)
    with pytest.raises(ValueError, match="looked at after 8 tokens"):
        drawn(model, look(after_tokens=WIDTH))
    assert isinstance(known, Outcomes)


@pytest.mark.parametrize("made", [
    partial(plans.helped), partial(plans.demonstration_prefix, max_completion_tokens=WIDTH, pad_id=0, total_steps=1),
])  # fmt: skip
def test_there_must_be_room_for_further_rows(made):
    with pytest.raises(ValueError, match=r"branches is 4 of rollout\.samples_per_prompt 4"):
        made(inside(3), samples_per_prompt=SAMPLES, branches=4)
    with pytest.raises(ValueError, match="draws 3 completions"):
        made(inside(1), samples_per_prompt=SAMPLES, branches=2)


def test_what_is_left_out_moves_with_what_is_known_of_it():
    rows = empty_rows(2, 1, 1, 4).filled(
        tokens=jnp.array([[5, 6, 7, 8], [1, 2, 0, 0]]), length=jnp.array([4, 2]), mine=jnp.arange(8.0).reshape(2, 4)
    )
    made = compacted(rows, jnp.array([[True, False, True, True], [True, True, True, True]]), 0)
    np.testing.assert_array_equal(made.tokens, [[5, 7, 8, 0], [1, 2, 0, 0]])
    np.testing.assert_array_equal(made["mine"], [[0, 2, 3, 0], [4, 5, 0, 0]])
    np.testing.assert_array_equal(made.length, [3, 2])


def test_completions_of_two_steps_are_those_of_one(model):
    plan = plans.partial_rollouts(
        plans.plain(samples_per_prompt=SAMPLES),
        samples_per_prompt=SAMPLES,
        prompts_per_step=3,
        max_prompt_tokens=2,
        max_completion_tokens=WIDTH,
        pad_id=0,
        tokens_per_step=5,
    )
    p = prompts()
    wide = Prompts(p.tokens, p.length, p.prompt_id, np.pad(p.answer_tokens, ((0, 0), (0, WIDTH - 1))), p.answer_length)
    source = Rollout(SAMPLES, WIDTH, eos_ids=(EOS,), pad_id=0, plan=plan)
    options = {"rewards": [odd_second], "credit": [("advantages", advantages.group_normalized)]}
    step = make_train_step(model, optax.sgd(0.0), source=source, losses=[losses.clipped_surrogate], **options)
    state = step.init(jax.random.key(0))
    state, metrics, rows = step.run(state, wide)
    assert not rows.weight.any()
    assert 0 < metrics["waiting_share"] < 1
    other = Prompts(wide.tokens[::-1], wide.length, wide.prompt_id[::-1], wide.answer_tokens[::-1], wide.answer_length)
    state, _, rows = step.run(state, other)
    whole = drawn(model, None)[0]
    np.testing.assert_array_equal(rows.prompt_tokens, whole.prompt_tokens)
    for name in ("tokens", "length", "group", "truncated", "source", "mask"):
        np.testing.assert_array_equal(rows[name], whole[name], err_msg=name)
    np.testing.assert_allclose(rows.behaviour_logprobs, whole.behaviour_logprobs, atol=1e-5)
    _, _, rows = step.run(state, wide)
    np.testing.assert_array_equal(rows.prompt_id, np.repeat(other.prompt_id, SAMPLES))
    with pytest.raises(ValueError, match="tokens_per_step is 3 of"):
        plans.partial_rollouts(plans.plain(samples_per_prompt=4), samples_per_prompt=4, prompts_per_step=3,
            max_prompt_tokens=2, max_completion_tokens=WIDTH, pad_id=0, tokens_per_step=3)  # fmt: skip

    def read(completions):
        return [0.0 for _ in completions]

    text = Resources(decode=str, encode=lambda text: [1])
    with pytest.raises(ValueError, match="reading 'read' needs rows of only the step's own prompts"):
        make_train_step(
            model,
            optax.sgd(0.0),
            source=source,
            losses=[losses.clipped_surrogate],
            **options | {"rewards": [read]},
            resources=text,
        )


@pytest.mark.slow
def test_a_tree_grows_where_its_bounds_are_highest_and_teaches_both_networks(attending):
    plan = plans.tree_search(
        plans.plain(samples_per_prompt=2),
        samples_per_prompt=2,
        pad_id=0,
        encode=lambda text: [5],
        step_end=";",
        rounds=4,
        children=3,
    )
    process = Network(head=models.HeadConfig(), backbone="own", optimizer=optax.sgd(0.1))
    step = make_train_step(
        attending,
        optax.sgd(0.1),
        source=Rollout(2, WIDTH, eos_ids=(EOS,), pad_id=0, plan=plan),
        rewards=[odd_second, (rewards.step_value, 0.0)],
        losses=[partial(losses.success_cloning, scale_by_advantage=False), losses.step_label_likelihood],
        resources=Resources(networks={"process": process}),
    )
    state, metrics, rows = step.run(step.init(jax.random.key(0)), prompts())
    there = np.asarray(rows.weight) > 0
    assert there.any()
    assert 3 <= metrics["tree_nodes"] <= 12
    last = np.take_along_axis(np.asarray(rows.tokens), np.asarray(rows.length)[:, None] - 1, axis=1)[:, 0]
    assert (last[there] != 5).all()  # trained rows have ended
    labels = np.asarray(rows["step_labels"])[there]
    solved = np.asarray(rows["correct"])[there] >= 1
    ends = np.asarray(rows.tokens)[there] == 5
    for row in np.flatnonzero(solved):
        known = np.flatnonzero(~np.isnan(labels[row]))
        assert known[-1] == np.asarray(rows.length)[there][row] - 1
        assert labels[row][known[-1]] == 1
        np.testing.assert_array_equal(known[:-1], np.flatnonzero(ends[row]))
        assert (np.diff(labels[row][known]) > 0).all()
    assert np.isfinite(metrics["loss"])
    with pytest.raises(ValueError, match="which is 2 tokens"):
        plans.tree_search(plans.plain(samples_per_prompt=2), samples_per_prompt=2, pad_id=0,
                          encode=lambda text: [5, 6], step_end=";;")  # fmt: skip


def test_the_search_goes_down_and_back():
    rows = empty_rows(4, 1, 1, 2)
    rows = jax.tree.map(lambda x: x[None], rows)
    parent = jnp.array([[-1, 0, 0, -1, 1]])
    tree = Tree(rows, parent, jnp.array([[0.0, 0.2, 0.9, 0, 0.5]]), jnp.array([[4.0, 1, 3, 0, 0]]),
                jnp.array([[False, False, False, True, False]]), jnp.int32(2))  # fmt: skip
    assert selected(tree, 0.0).tolist() == [2]
    assert selected(tree, 3.0).tolist() == [4]  # rarely visited, with children that were never visited
    after = backed_up(tree, jnp.array([0]))
    np.testing.assert_allclose(after.value[0, 0], 0.725)
    np.testing.assert_array_equal(after.visits, [[5, 1, 3, 0, 0]])
    shut = backed_up(tree._replace(closed=tree.closed.at[0, 4].set(True)), jnp.array([1]))
    np.testing.assert_array_equal(shut.closed, [[False, True, False, True, True]])
    same = backed_up(tree, jnp.array([-1]))
    np.testing.assert_array_equal(same.visits, tree.visits)
    assert np.isnan(tree_targets(jnp.array([-1, 0, 0]), jnp.zeros(3, bool))).all()
    chain = tree_targets(jnp.array([-1, 0, 1, 2]), jnp.arange(4) == 3)
    np.testing.assert_allclose(chain[1:], [1 / 3, 2 / 3, 1], rtol=1e-6)
    assert np.isnan(tree_targets(jnp.array([-1, 0, 0, -1]), jnp.arange(4) == 1)[3])  # the node is absent


CODES = {"~": 3, "'": 4, ":": 5, "#": 6, "_": 7, "&": 8, "1": 9, "2": 10}


@pytest.mark.slow
def test_threads_stand_behind_the_text_before_them_and_are_learned_once(model):
    wide, encode = 24, lambda text: [CODES[text]]
    plan = plans.parallel_threads(
        plans.plain(samples_per_prompt=2),
        samples_per_prompt=6,
        branches=4,
        threads=2,
        max_completion_tokens=wide,
        pad_id=0,
        encode=encode,
    )
    likely = np.full((16, 16), -8.0)
    for now, following in ((3, 4), (4, 4), (4, 5), (9, 11), (10, 12), (11, 7), (12, 12), (12, 7), (8, 13), (13, EOS)):
        likely[now, following] = 0.0
    likely[[4, 5], 3] = 0.0  # the prompts 4 and 5 open a block, the prompt 3 does not
    likely[3, 4] = 2.0
    step = make_train_step(
        model,
        optax.sgd(0.0),
        source=Rollout(6, wide, eos_ids=(EOS,), pad_id=0, plan=plan),
        rewards=[lambda tokens, length: (tokens[jnp.arange(len(length)), length - 1] == EOS).astype(jnp.float32)],
        credit=[("advantages", advantages.group_normalized), (("weight", "advantages"), rewards.with_threads)],
        losses=[losses.clipped_surrogate],
    )
    state = step.init(jax.random.key(0), {"scores": jnp.asarray(likely)})
    _, metrics, rows = step.run(state, prompts())
    tokens, mask = (np.asarray(x).reshape(3, 2, 3, wide) for x in (rows.tokens, rows.mask))
    there = np.asarray(rows["thread_weight"]).reshape(3, 2, 3) > 0
    np.testing.assert_array_equal(np.asarray(rows["trajectory"]), np.repeat(np.arange(6) * 3, 3))
    forked = 0
    for whole, own, threads in zip(
        tokens.reshape(6, 3, wide), mask.reshape(6, 3, wide), there.reshape(6, 3), strict=True
    ):
        text = [int(x) for x in whole[0] if x]
        count = int(threads[1:].sum())
        if not count:
            continue
        forked += 1
        before = text.index(5) + 1
        bodies = []
        for number in range(1, count + 1):
            row = [int(x) for x in whole[number] if x]
            assert row[:before] == text[:before]
            assert row[before : before + 2] == [6, 8 + number]
            bodies += row[before:]
            np.testing.assert_array_equal(own[number][: before + 2], 0)
            np.testing.assert_array_equal(own[number][before + 2 : len(row)], 1)
        assert text[before : before + len(bodies)] == bodies
        assert text[before + len(bodies)] == 8
        np.testing.assert_array_equal(own[0][:before], 1)
        np.testing.assert_array_equal(own[0][before : before + len(bodies) + 1], 0)
        assert own[0][before + len(bodies) + 1 : len(text)].all()
    assert forked
    np.testing.assert_allclose(metrics["forked_share"], forked / 6, rtol=1e-6)
    assert metrics["sampler_gap_max"] < 1e-5
    with pytest.raises(ValueError, match="six different texts of one token each"):
        plans.parallel_threads(plans.plain(samples_per_prompt=2), samples_per_prompt=6, branches=4,
                               max_completion_tokens=8, pad_id=0, encode=encode, tags=("~", "~"))  # fmt: skip
    with pytest.raises(ValueError, match="branches is 3 of"):
        plans.parallel_threads(plans.plain(samples_per_prompt=3), samples_per_prompt=6, branches=3,
                               max_completion_tokens=8, pad_id=0, encode=encode)  # fmt: skip


def test_longest_paths_and_what_they_are_worth():
    # x x P o T x x /T T x x x /T /P x
    said = jnp.array(
        [[11, 11, 3, 4, 6, 11, 11, 7, 6, 11, 11, 11, 7, 8, 11, 0], [7, 6, 8, 11, 3, 6, 11, 6, 11] + [0] * 7]
    )
    body, path = inside_threads(said, jnp.array([15, 9]), (3, 6, 7, 8))
    assert path.tolist() == [13, 9]
    np.testing.assert_array_equal(np.flatnonzero(body[0]), [5, 6, 9, 10, 11])
    np.testing.assert_array_equal(np.flatnonzero(body[1]), [6, 7, 8])  # open at the end; a tag inside is a token
    worth = rewards.accelerated(jnp.array([1.0, 1, 0, 1]), jnp.array([50, 85, 50, 95]), jnp.full(4, 95), jnp.ones(4))
    np.testing.assert_allclose(worth, [1.1, 1.052632, 0, 1], rtol=1e-6)
    weight, shared = rewards.with_threads(
        jnp.array([2.0, 0, 0, -1.0, 0, 0]), jnp.array([1.0, 0, 0, 0, 0, 0]), jnp.array([0, 0, 0, 3, 3, 3]),
        jnp.array([0.0, 1, 0, 0, 1, 1]),
    )  # fmt: skip
    np.testing.assert_array_equal(weight, [1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(shared, [2, 2, 2, -1, -1, -1])
