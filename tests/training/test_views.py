"""Views: another sequence made from a row is scored like the row itself, by the policy and by other networks."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import advantages, losses, rewards
from jaxrl_llm.experience import Loss, Sequences
from jaxrl_llm.models.heads import HeadConfig
from jaxrl_llm.rewards.host import RewardError
from jaxrl_llm.rollout.sampled import Rollout
from jaxrl_llm.rows import Replay, Written
from jaxrl_llm.training import Network, Resources, Update, View, make_train_step
from jaxrl_llm.training.scores import viewed
from jaxrl_llm.training.segments import shapes
from jaxrl_llm.training.step import given_work

VIEW = partial(rewards.answer_after_thought, mark_id=5, opening_ids=(7,), closing_ids=(6, 2))


def verifree(model, **changed):
    given = {
        "source": Rollout(samples_per_prompt=4, max_completion_tokens=6, eos_ids=(2,), pad_id=0, temperature=0.7),
        "rewards": [rewards.answer_likelihood],
        "credit": [
            ("mask", partial(rewards.thought_mask, mark_id=5)),
            ("answer_weight", advantages.raw_rewards),
            ("advantages", advantages.leave_one_out),
        ],
        "losses": [losses.policy_gradient, losses.weighted_answer_likelihood],
        "resources": Resources(views={"answer": VIEW}),
    }
    return make_train_step(model, optax.sgd(0.5), **(given | changed))


def test_verifree_scores_the_reference_answer_and_learns_it(bigram, make_prompts):
    step = verifree(bigram)
    state = step.init(jax.random.key(0))
    table = np.asarray(state.params["scores"])
    state, metrics, rows = step.run(state, make_prompts(4))
    # For a bigram model the log-probabilities of the answer (7) 5 (6) (2) after the mark 5 are entries of a table.
    said = np.asarray(jax.nn.log_softmax(table / 0.7, axis=-1))
    expected = np.array([said[a, b] for a, b in ((5, 7), (7, 5), (5, 6), (6, 2))])
    tokens, length = np.asarray(rows.tokens), np.asarray(rows.length)
    thought = np.array([5 in row[:count] for row, count in zip(tokens, length, strict=True)])
    assert 0 < thought.sum() < len(thought), "the test needs thoughts that are closed and some that are not"
    np.testing.assert_allclose(np.asarray(rows["answer_logprobs"])[thought, :4], [expected] * thought.sum(), rtol=1e-5)
    np.testing.assert_allclose(rows["rewards"], thought * np.exp(expected.sum()), rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(rows.mask).sum(1) > 0, thought)
    assert np.isfinite(metrics["loss/weighted_answer_likelihood"])
    after = np.asarray(jax.nn.log_softmax(np.asarray(state.params["scores"]) / 0.7, axis=-1))
    assert after[7, 5] > said[7, 5]


def test_microbatches_give_the_same_parameters(bigram, make_prompts):
    found = []
    for size in (None, 4):
        step = verifree(bigram, update=Update(sequences_per_microbatch=size))
        state, _ = step(step.init(jax.random.key(0)), make_prompts(4))
        found.append(np.asarray(state.params["scores"]))
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)


def test_a_name_of_a_view_that_is_not_there_is_refused(bigram):
    with pytest.raises(ValueError, match="names 'answer_logprobs', which nothing in this step provides"):
        verifree(bigram, resources=Resources())
    with pytest.raises(ValueError, match="names 'proxy_answer_logprobs', which nothing in this step provides"):
        verifree(bigram, rewards=[lambda proxy_answer_logprobs: proxy_answer_logprobs.sum(1)])


def test_nover_scores_with_a_proxy_that_follows_slowly(bigram, make_prompts):
    mark = partial(rewards.reasoning_perplexity, mark_id=5)
    step = verifree(
        bigram,
        rewards=[partial(rewards.answer_present, open_id=5, close_id=6)],
        credit=[
            ("well_formed", partial(rewards.answer_present, open_id=5, close_id=6)),
            ("perplexity", mark),
            ("rewards", partial(rewards.perplexity_ranks, mark_id=5)),
            ("advantages", advantages.leave_one_out),
        ],
        losses=[losses.policy_gradient],
        resources=Resources(views={"answer": VIEW}, networks={"proxy": Network(decay=0.9)}),
    )
    state = step.init(jax.random.key(0))
    proxy = np.asarray(state.params["scores"])
    for _ in range(2):
        state, metrics, rows = step.run(state, make_prompts(8))
        said = np.asarray(jax.nn.log_softmax(proxy / 0.7, axis=-1))
        expected = np.array([said[a, b] for a, b in ((5, 7), (7, 5), (5, 6), (6, 2))])
        thought = np.isfinite(np.asarray(rows["perplexity"]))
        assert 0 < thought.sum() < len(thought)
        scored = np.asarray(rows["proxy_answer_logprobs"])[thought, :4]
        np.testing.assert_allclose(scored, [expected] * thought.sum(), rtol=2e-5)
        proxy = 0.9 * proxy + 0.1 * np.asarray(state.params["scores"])
        np.testing.assert_allclose(state.networks["proxy"].params["scores"], proxy, rtol=1e-5)
    assert metrics["gradient_norm"] > 0


# ---- views with several sequences per row ---------------------------------------------------------------------------


def a_token_a_turn(tokens):
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


def igpo(model, **changed):
    view = partial(rewards.answer_after_turns, max_turns=3, opening_ids=(7,), closing_ids=(2,))
    given = {
        "source": Rollout(samples_per_prompt=4, max_completion_tokens=6, eos_ids=(2,), pad_id=0),
        "rewards": [lambda tokens: (tokens[:, 0] % 2).astype(jnp.float32)],
        "credit": [
            ("turn", a_token_a_turn),
            ("turn_answer_logprobs", partial(rewards.answer_likelihood, form="mean_log_probability")),
            ("advantages", advantages.information_gain),
        ],
        "losses": [losses.policy_gradient],
        "resources": Resources(views={"answer": view}),
    }
    return make_train_step(model, optax.sgd(0.5), **(given | changed))


def test_the_answer_is_scored_behind_every_turn(bigram, make_prompts):
    step, prompts = igpo(bigram), make_prompts(4)
    state = step.init(jax.random.key(0))
    said = np.asarray(jax.nn.log_softmax(np.asarray(state.params["scores"]), axis=-1))
    rows = step.run(state, prompts)[2]
    tokens, length = np.asarray(rows.tokens), np.asarray(rows.length)
    last = np.repeat([row[-1] for row in np.asarray(prompts.tokens)], 4)
    assert rows["answer_logprobs"].shape == (16, 4, 4)  # after 0 to 3 turns; 7, answer of one of two tokens, 2
    for row in range(16):
        before = [last[row], *tokens[row, :3]][: length[row] + 1]
        expected = [np.mean([said[token, 7], said[7, 5], said[5, 2]]) for token in before]
        np.testing.assert_allclose(rows["turn_answer_logprobs"][row, : len(expected)], expected, rtol=1e-5)
        np.testing.assert_array_equal(rows["turn_answer_logprobs"][row, len(expected) :], 0)  # turns that did not occur
    assert np.abs(rows["advantages"]).max() > 0


def test_several_sequences_a_row_are_scored_before_the_update_alone(bigram, make_prompts, traced):
    def loss(logprobs, answer_logprobs, mask):
        return Loss((logprobs * mask).sum() + answer_logprobs.sum(), mask.sum())

    step = igpo(bigram, credit=[("turn", a_token_a_turn), ("advantages", advantages.leave_one_out)], losses=[loss])
    with pytest.raises(ValueError, match="view 'answer' makes several sequences of a row"):
        traced(step, make_prompts(4))


@pytest.mark.slow
def test_the_likelihood_of_an_answer_adds_at_most_its_own_forward_pass(model, make_prompts):
    """Operations of the program; loops, which are the same in both, count once."""

    def operations(step):
        state = jax.eval_shape(step.init, jax.random.key(0))
        ((program, work),) = shapes(step.segments, state, given_work(make_prompts(4), None))
        lowered = jax.jit(program.run).lower(state, work)
        _, _, rows = jax.eval_shape(program.run, state, work)
        bare = rows.replace(fields={"turn": rows["turn"]})
        score = lambda state, rows: viewed(step.composition, state, rows, {"answer_logprobs"}, own_samples=True)  # noqa: E731
        alone = jax.jit(score).lower(state, bare).cost_analysis()["flops"]
        return lowered.cost_analysis()["flops"], alone

    plain = [
        ("turn", a_token_a_turn),
        ("metric/turns", lambda turn: turn.max()),
        ("advantages", advantages.leave_one_out),
    ]
    with_view = [*plain, ("metric/likelihood", lambda answer_logprobs: answer_logprobs.mean())]
    without, (whole, alone) = operations(igpo(model, credit=plain))[0], operations(igpo(model, credit=with_view))
    assert 0 < whole - without < 1.1 * alone
    apart = operations(igpo(model._replace(cut_cache=None), credit=with_view))[1]
    assert alone < 0.5 * apart  # four sequences of 14 tokens per row, instead of one of 10 and four of 3


# ---- views that read text -------------------------------------------------------------------------------------------

ITEMS = [{"body": f"{number + 3}", "answer": f"{number + 4} 2"} for number in range(4)]


def decode(ids):
    return " ".join(map(str, ids))


def encode(text):
    return [int(part) for part in text.split()]


def likelihood(verdict_logprobs, verdict_mask):
    return (verdict_logprobs * verdict_mask).sum(1)


def judged(model, view, **changed):
    given = {
        "source": Rollout(samples_per_prompt=2, max_completion_tokens=4, eos_ids=(2,), pad_id=0),
        "rewards": [likelihood],
        "credit": [("advantages", advantages.leave_one_out)],
        "losses": [losses.policy_gradient],
        "resources": Resources(decode=decode, encode=encode, views={"verdict": view}),
    }
    return make_train_step(model, optax.sgd(0.5), **(given | changed))


def behind_the_first_token(prompt, completion, answer):
    """The answer after problem and first token; rows that begin with an even token have none."""
    first = int((completion or "2").split()[0])  # nothing but the end of sequence, 2
    return None if first % 2 == 0 else (f"{prompt} {first}", answer)


def all_at_once(prompts, completions, answers):
    return [behind_the_first_token(*row) for row in zip(prompts, completions, answers, strict=True)]


@pytest.mark.parametrize("view", [behind_the_first_token, all_at_once, View(all_at_once, 2, 2, deadline_s=60.0)])
def test_a_view_may_be_made_of_text(bigram, make_prompts, view):
    step = judged(bigram, view)
    assert len(step.programs) == 2
    state = step.init(jax.random.key(0))
    said = np.asarray(jax.nn.log_softmax(np.asarray(state.params["scores"]), axis=-1))
    _, metrics, rows = step.run(state, make_prompts(4), ITEMS)
    first, group = np.asarray(rows.tokens)[:, 0], np.asarray(rows.group)
    odd = first % 2 == 1
    assert 0 < odd.sum() < len(odd)
    expected = np.where(odd, said[first, group + 4] + said[group + 4, 2], 0.0)
    np.testing.assert_allclose(rows["rewards"], expected, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(rows["verdict_mask"]).sum(1), 2 * odd)
    assert metrics["seconds/verdict"] >= 0


def test_another_network_may_judge_and_the_policy_may_learn_a_view_of_text(bigram, make_prompts):
    def imitate(verdict_logprobs, verdict_mask):
        return Loss(-(verdict_logprobs * verdict_mask).sum(), verdict_mask.sum())

    def liked(slow_verdict_logprobs, verdict_mask):
        return (slow_verdict_logprobs * verdict_mask).sum(1)

    found = []
    for size in (None, 2):
        resources = Resources(
            decode=decode,
            encode=encode,
            views={"verdict": all_at_once},
            networks={"slow": Network(decay=0.9)},
        )
        update = Update(sequences_per_microbatch=size)
        step = judged(bigram, None, rewards=[liked], losses=[imitate], credit=[], resources=resources, update=update)
        state, before = step.init(jax.random.key(0)), None
        for _ in range(3):
            state, metrics, rows = step.run(state, make_prompts(4), ITEMS)
            before = before or metrics["loss/imitate"]
        assert metrics["loss/imitate"] < before
        found.append(np.asarray(state.params["scores"]))
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)
    assert np.isfinite(rows["slow_verdict_logprobs"]).all()


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (lambda completion: ("3 4 5", "6"), "3 tokens, but max_prompt_tokens is 2"),
        (lambda completion: ("3", "6 7 8"), "3 tokens, but max_completion_tokens is 2"),
        (lambda completion: ("", "6"), "the prompt has no tokens"),
        (lambda completion: "3 4", "must return one pair"),
        (lambda completions: [("3", "4")], "returned 1 values for 8 rows"),
    ],
)
def test_what_a_view_of_text_may_not_return(bigram, make_prompts, view, message):
    step = judged(bigram, View(view, max_prompt_tokens=2, max_completion_tokens=2))
    with pytest.raises(RewardError, match=message):
        step.run(step.init(jax.random.key(0)), make_prompts(4), ITEMS)


def test_a_view_of_text_needs_an_encoder_and_does_not_know_replayed_rows(bigram):
    with pytest.raises(ValueError, match="view 'verdict' reads and writes text, so make_train_step needs decode= and"):
        judged(bigram, all_at_once, resources=Resources(decode=decode, views={"verdict": all_at_once}))

    def imitate(verdict_logprobs, verdict_mask):
        return Loss(-(verdict_logprobs * verdict_mask).sum(), verdict_mask.sum())

    rollout = Rollout(samples_per_prompt=2, max_completion_tokens=4, eos_ids=(2,), pad_id=0)
    with pytest.raises(ValueError, match=r"loss 'imitate' names 'verdict_logprobs', .* replayed rows do not have"):
        judged(bigram, all_at_once, source=[rollout, Replay(0.5, 2, 4, 4, 2)], losses=[imitate])


# ---- views that a network generates ---------------------------------------------------------------------------------


def length_of(verdict_text):
    """Per batch: number of generated tokens, and none for rows without a prompt."""
    return [None if text is None else float(len(text.split())) for text in verdict_text]


def ask_in_the_program(tokens):
    ones = jnp.ones(tokens.shape[0], jnp.int32)
    return Sequences(tokens[:, :1], ones, tokens[:, :0], 0 * ones, jnp.zeros((tokens.shape[0], 0)))


def ask_by_text(completion):
    first = completion.split()[0]
    return None if int(first) % 2 == 0 else first


@pytest.mark.parametrize("view", [pytest.param(ask_in_the_program, marks=pytest.mark.slow), ask_by_text])
def test_a_network_may_write_a_view_and_readings_get_its_text(bigram, make_prompts, view):
    found = []
    for size in (None, 2):
        step = judged(
            bigram,
            None,
            rewards=[length_of],
            resources=Resources(
                decode=decode,
                encode=encode,
                views={"verdict": View(view, max_completion_tokens=3, written_by="judge", temperature=0.0)},
                networks={"judge": Network(copy_every=1)},
            ),
            update=Update(sequences_per_microbatch=size),
        )
        state = step.init(jax.random.key(0))
        best = np.asarray(state.params["scores"]).argmax(-1)
        _, metrics, rows = step.run(state, make_prompts(4), ITEMS)
        found.append(np.asarray(rows["verdict_tokens"]))
    np.testing.assert_array_equal(*found)
    expected = np.zeros_like(found[0])
    asked = np.zeros(len(expected), bool)
    for row, first in enumerate(np.asarray(rows.tokens)[:, 0]):
        asked[row] = view is ask_in_the_program or first % 2 == 1
        token = first
        for place in range(3 * asked[row]):
            expected[row, place] = token = best[token]
            if token == 2:
                break
    np.testing.assert_array_equal(found[0], expected)
    assert asked.any()
    np.testing.assert_array_equal(rows["verdict_length"], (expected > 0).sum(1))
    np.testing.assert_array_equal(rows["rewards"], (expected > 0).sum(1))
    np.testing.assert_array_equal(rows.weight, asked)


def test_samples_of_a_prompt_are_judged_by_different_draws_and_the_policy_may_learn_what_it_writes(
    bigram, make_prompts
):
    def same_for_all(items):
        return [[3] for _ in items]

    def imitate(verdict_logprobs, verdict_mask):
        return Loss(-(verdict_logprobs * verdict_mask).sum(), verdict_mask.sum())

    view = View(same_for_all, max_completion_tokens=4, written_by="policy")
    resources = Resources(decode=decode, encode=encode, views={"verdict": view})
    step = judged(bigram, None, rewards=[length_of], losses=[losses.policy_gradient, imitate], resources=resources)
    drawn = []
    for _ in range(2):
        state, metrics, rows = step.run(step.init(jax.random.key(0)), make_prompts(4), ITEMS)
        drawn.append(np.asarray(rows["verdict_tokens"]))
    np.testing.assert_array_equal(*drawn)
    assert len(np.unique(drawn[0], axis=0)) > 1
    assert np.isfinite(metrics["loss/imitate"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"written_by": "jugde"}, "views.verdict.written_by is 'jugde'"),
        ({"written_by": "grade"}, "has a head instead of a vocabulary"),
        ({"written_by": "judge", "temperature": -1.0}, "temperature is -1.0; it must be at least 0"),
        ({"written_by": "judge", "source": Written(8, 2)}, "nothing is sampled in this step"),
        ({"written_by": "judge", "mixed_with": "jugde"}, "views.verdict.mixed_with is 'jugde'"),
        ({"written_by": "judge", "mixed_with": "judge"}, "mixed_with is 'judge', but written_by is 'judge'; set"),
        ({"mixed_with": "judge"}, "mixed_with is 'judge', but written_by is None"),
        ({"written_by": "judge", "mixed_with": "policy", "share": 1.5}, "share is 1.5; it must lie in"),
        ({"written_by": "judge", "guided_by": "valeu"}, "views.verdict.guided_by is 'valeu'"),
        ({"written_by": "policy", "guided_by": "judge"}, "guided_by is 'judge', which has no head with one output"),
        ({"guided_by": "grade"}, "guided_by is 'grade', which guides the generation of one network"),
        ({"written_by": "judge", "guided_by": "grade", "candidates": 0}, "candidates is 0"),
    ],
)
def test_who_may_not_write_a_view(bigram, changed, message):
    source = {name: changed[name] for name in ("source",) if name in changed}
    networks = {"judge": Network(), "grade": Network(head=HeadConfig(), optimizer=optax.sgd(0.1))}

    def built():
        views = {"verdict": View(ask_by_text, **{name: value for name, value in changed.items() if name != "source"})}
        resources = Resources(decode=decode, encode=encode, views=views, networks=networks)
        return judged(bigram, None, rewards=[length_of], resources=resources, **source)

    with pytest.raises(ValueError, match=message):
        built()


def test_a_mixture_of_two_networks_writes_what_the_product_of_their_distributions_says(bigram, make_prompts):
    """Greedy decoding of the sum of both scores, which agrees with one model, with the other, or with neither."""
    view = View(ask_in_the_program, written_by="judge", mixed_with="other", share=0.4, temperature=0.0)
    networks = {"judge": Network(copy_every=1), "other": Network(copy_every=1)}
    resources = Resources(decode=decode, encode=encode, views={"verdict": view}, networks=networks)
    step = judged(bigram, None, rewards=[length_of], resources=resources)
    shape = jax.eval_shape(step.init, jax.random.key(0)).params["scores"].shape
    own, other = (3 * jax.random.normal(jax.random.key(seed), shape) for seed in (4, 5))
    state = step.init(jax.random.key(0), {"scores": own}, {"other": {"scores": other}})
    said = [log_softmax(np.asarray(scores, np.float64)) for scores in (own, other)]
    best = (0.6 * said[0] + 0.4 * said[1]).argmax(-1)
    assert (best != said[0].argmax(-1)).any()
    assert (best != said[1].argmax(-1)).any()
    _, _, rows = step.run(state, make_prompts(4), ITEMS)
    written, token = np.asarray(rows["verdict_tokens"]), np.asarray(rows.tokens)[:, 0]
    for place in range(written.shape[1]):
        token = np.where(token == 2, 0, best[token]) if place else best[token]
        going = written[:, place] > 0
        np.testing.assert_array_equal(written[going, place], token[going])


def log_softmax(scores):
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def go_on_by_text(verdict_text):
    return [None if text is None else text.split()[-1] for text in verdict_text]


def go_on_in_the_program(verdict_tokens, verdict_length):
    last = jnp.take_along_axis(verdict_tokens, jnp.maximum(verdict_length - 1, 0)[:, None], axis=1)
    ones = jnp.ones(len(last), jnp.int32)
    return Sequences(last, ones, last[:, :0], 0 * ones, jnp.zeros((len(last), 0)))


@pytest.mark.parametrize("again", [pytest.param(go_on_by_text, marks=pytest.mark.slow), go_on_in_the_program])
def test_a_view_may_be_made_of_what_a_network_wrote_as_another(bigram, make_prompts, again):
    written = {"max_completion_tokens": 3, "written_by": "policy", "temperature": 0.0}
    # In alphabetical order the second one is first.
    views = {"verdict": View(ask_in_the_program, **written), "again": View(again, **written)}
    step = judged(
        bigram,
        None,
        rewards=[lambda again_length: again_length * 1.0],
        resources=Resources(decode=decode, encode=encode, views=views),
    )
    state = step.init(jax.random.key(0))
    best = np.asarray(state.params["scores"]).argmax(-1)
    _, _, rows = step.run(state, make_prompts(4), ITEMS)
    for last, tokens in zip(np.asarray(rows["verdict_tokens"]), np.asarray(rows["again_tokens"]), strict=True):
        assert tokens[0] == best[last[last > 0][-1]]
    np.testing.assert_array_equal(rows["rewards"], (np.asarray(rows["again_tokens"]) > 0).sum(1))


def test_views_that_are_made_of_each_other(bigram):
    written = {"max_completion_tokens": 3, "written_by": "policy"}

    def of_again(again_tokens, again_length):
        return Sequences(again_tokens, again_length, again_tokens, again_length, again_tokens)

    views = {"verdict": View(of_again, **written), "again": View(go_on_in_the_program, **written)}
    resources = Resources(decode=decode, encode=encode, views=views)
    with pytest.raises(ValueError, match="views verdict, again are made of each other; make one of them of the row"):
        judged(bigram, None, rewards=[length_of], resources=resources)
