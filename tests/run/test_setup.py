"""What is built from a config before compute is spent."""

import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.config import parse_config
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.experience import Selection, Sequences, Source
from jaxrl_llm.reporting import RunDirectory
from jaxrl_llm.rollout import Environment
from jaxrl_llm.run.batches import demonstration_batches, encoded, prompt_batches
from jaxrl_llm.run.configured import configured_environment
from jaxrl_llm.run.directories import Unwritten
from jaxrl_llm.run.explain import trace
from jaxrl_llm.run.machine import on_slices
from jaxrl_llm.run.problems import data_sets
from jaxrl_llm.run.setup import parts

VOCABULARY = CharacterTokenizer().vocabulary_size


def test_a_held_out_prompt_that_does_not_fit_is_named(micro_config):
    config = parse_config(micro_config, ["rollout.max_prompt_tokens=7"], vocabulary_size=VOCABULARY)
    with pytest.raises(ValueError, match="7"):  # two digits and two digits make nine tokens
        encoded(parts(config), data_sets(config)["test"])


def test_or_is_left_out_where_the_config_says_so(micro_config):
    changes = ["rollout.max_prompt_tokens=7", "data.overlong_prompts=drop"]
    config = parse_config(micro_config, changes, vocabulary_size=VOCABULARY)
    test = data_sets(config)["test"]
    kept = encoded(parts(config), test)
    assert 0 < len(kept.length) < len(test)
    assert kept.length.max() <= 7


CONVERSATIONS = {"name": "calculator", "levels": [1], "train_items": 8, "validation_items": 2, "test_items": 2}


def conversation_config(micro_config, *changes):
    sizes = ["rollout.max_prompt_tokens=12", "rollout.max_completion_tokens=40"]
    task = {"task": CONVERSATIONS}
    return parse_config(micro_config | task, [*sizes, *changes], vocabulary_size=VOCABULARY)


def test_the_warm_start_of_a_task_of_several_turns_leaves_observations_out(micro_config):
    config = conversation_config(micro_config)
    built = parts(config)
    batch = demonstration_batches(built, data_sets(config)["train"], 4)[0]
    observed = batch.source == Source.OBSERVATION
    assert observed.any(axis=1).all()
    np.testing.assert_array_equal(batch.mask, (batch.source == Source.DEMONSTRATION).astype(np.float32))


def test_conversations_are_not_taken_for_reference_completions(micro_config, monkeypatch):
    config = conversation_config(micro_config, "rollout.plan=demonstration_in_group")
    with pytest.raises(ValueError, match=r"\(prefixes\), which the environment inside the program does not offer"):
        parts(config)
    named = SimpleNamespace(longer=lambda length, demonstration_length: length - demonstration_length)
    monkeypatch.setitem(sys.modules, "my_credit", named)
    config = conversation_config(micro_config, "credit=[{advantages: {python: 'my_credit:longer'}}]")
    with pytest.raises(ValueError, match="those of task 'calculator' are conversations with observations"):
        prompt_batches(parts(config), data_sets(config)["train"])


# ---- what keywords are filled from ----------------------------------------------------------------------------------


def test_a_keyword_named_like_a_size_of_the_run_is_filled_from_it(micro_config, monkeypatch):
    seen = {}

    def sized(
        rewards,
        *,
        samples_per_prompt,
        max_prompt_tokens,
        max_completion_tokens,
        temperature,
        prompts_per_step,
        sequences_per_step,
        total_steps,
        seed,
        pad_id,
        prompt_ids,
        scale=3,
    ):
        return seen.update(locals()) or rewards

    monkeypatch.setitem(sys.modules, "my_credit", SimpleNamespace(sized=sized))
    tree = micro_config | {"credit": [{"advantages": {"python": "my_credit:sized", "seed": 5}}]}
    built = parts(parse_config(tree, ["rollout.temperature=0.5"], vocabulary_size=VOCABULARY))
    built.step.composition.credit[0].function(rewards=0)
    assert {name: value for name, value in seen.items() if name not in ("seen", "rewards")} == {
        "samples_per_prompt": 4,
        "max_prompt_tokens": 9,
        "max_completion_tokens": 6,
        "temperature": 0.5,
        "prompts_per_step": 4,
        "sequences_per_step": 16,
        "total_steps": 8,
        "seed": 5,  # what the recipe says goes first
        "pad_id": CharacterTokenizer().pad_id,
        "prompt_ids": 48,
        "scale": 3,  # what has a default keeps it
    }


def test_a_keyword_that_is_no_size_has_to_be_given(micro_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_credit", SimpleNamespace(sized=lambda rewards, *, width: rewards))
    tree = micro_config | {"credit": [{"advantages": {"python": "my_credit:sized"}}]}
    with pytest.raises(ValueError, match=r"credit\.advantages\.my_credit:sized needs width"):
        parts(parse_config(tree, vocabulary_size=VOCABULARY))


# ---- plans, sources, networks, views, selection ---------------------------------------------------------------------


def built_with(micro_config, *overrides, **sections):
    return parts(parse_config(micro_config | sections, overrides, vocabulary_size=VOCABULARY))


def test_plans_are_made_from_the_inside_out(micro_config):
    plan = "rollout.plan=[demonstration_in_group, {refill: {max_rounds: 3}}]"
    c = built_with(micro_config, plan, "credit=[{advantages: group_normalized}]").step.composition
    assert (c.plan.samples, c.plan.drawn, c.plan.most_rounds) == (4, 3, 3)
    assert "demonstrations" in c.plan.needs
    assert built_with(micro_config).step.composition.rollout.plan is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.plan=refil", r"rollout.plan names 'refil', which does not exist; did you mean 'refill'"),
        (
            "rollout.plan={refill: {max_round: 3}}",
            "max_round is not a hyper-parameter of refill; did you mean 'max_rounds'",
        ),
        ("rollout.plan={refill: {max_rounds: 0}}", r"rollout.plan.*max_rounds is 0"),
        ("rollout.plan=prefixes", "rollout.plan.prefixes needs texts"),
        ("rollout.plan=[{refill: {}, adaptive: {}}]", "is neither a name, nor"),
        ("source=sampelr", "source names 'sampelr', which does not exist; did you mean 'sampler'"),
        ("source=[sampler, {replay: {}}]", "source.replay needs share"),
        ("source=[sampler, {replay: {share: 2}}]", r"share is 2.0; .*\(0, 1\)"),
        (
            "source=[sampler, {demonstrations: {sequences_per_step: 6}}]",
            "is 6, which rollout.samples_per_prompt 4 does",
        ),
        (
            "source=[sampler, {demonstrations: {sequences_per_step: 4}}, {solved_answers: {sequences_per_step: 4}}]",
            "has demonstrations and solved_answers; a step takes written rows of one source, so remove one",
        ),
        ("source=[]", "source is empty"),
        ("source=[{replay: {share: 0.5}}]", "only a replay store"),
        ("networks={value: {head: {widht: 3}}}", "networks.value.head is {'widht': 3}"),
        ("networks={reference: {learning_rate: 0.1}}", r"networks.reference.learning_rate is 0.1, but .* has no head"),
        (
            "views={answer: {answer_after_thougth: {mark: x}}}",
            "views.answer names 'answer_after_thougth', which does not",
        ),
        ("data.selection=banditt", "data.selection names 'banditt', which does not exist"),
    ],
)
def test_an_entry_that_cannot_be_used_is_refused(micro_config, override, message):
    with pytest.raises(ValueError, match=message):
        built_with(micro_config, override)


def test_networks_are_what_their_sections_say(micro_config):
    credit = [{"returns": "gae_returns"}, {"advantages": "gae"}]
    losses = ["clipped_surrogate", "clipped_value", "kl_estimate"]
    networks = {"value": {"backbone": "shared", "learning_rate": 0.5}, "reference": {"from": "policy", "decay": 0.9}}
    c = built_with(micro_config, credit=credit, losses=losses, networks=networks).step.composition
    value, reference = c.networks["value"], c.networks["reference"]
    assert (value.backbone, value.head.outputs, value.optimizer is not None) == ("shared", 1, True)
    assert (reference.origin, reference.decay, reference.optimizer) == ("policy", 0.9, None)
    assert c.learning == {"policy", "value"}


def test_a_network_that_nothing_names_is_not_made(micro_config):
    c = built_with(micro_config, networks={"value": {}}, losses=["clipped_surrogate"]).step.composition
    assert c.networks == {}


def own(prompt_tokens, prompt_length, tokens, length, mask):
    return Sequences(prompt_tokens, prompt_length, tokens, length, mask)


def test_a_view_gives_names_to_another_sequence_of_a_row(micro_config, monkeypatch):
    views = SimpleNamespace(own=own, likely=lambda again_logprobs, again_mask: (again_logprobs * again_mask).sum(1))
    monkeypatch.setitem(sys.modules, "my_views", views)
    sections = {
        "views": {"again": {"python": "my_views:own"}},
        "rewards": ["exact_answer", {"python": "my_views:likely"}],
        "losses": ["clipped_surrogate"],
    }
    rows = trace(built_with(micro_config, **sections))
    assert rows["again_logprobs"].shape == (16, 6)
    assert rows["reward_components"].shape == (16, 2)
    with pytest.raises(ValueError, match="reward 'likely' names 'again_logprobs', which nothing in this step provides"):
        built_with(micro_config, **(sections | {"views": {}}))


def test_a_selection_chooses_the_prompts_of_a_step(micro_config, monkeypatch):
    def last(*, items, prompts_per_step):
        def choose(memory, key, count):
            return jnp.arange(items - count, items)

        return Selection(lambda: jnp.int32(0), choose, lambda memory, item: memory + 1)

    monkeypatch.setitem(sys.modules, "my_selection", SimpleNamespace(last=last))
    tree = micro_config | {"data": micro_config["data"] | {"selection": {"python": "my_selection:last"}}}
    built = parts(parse_config(tree, ["losses=[clipped_surrogate]"], vocabulary_size=VOCABULARY))
    rows = trace(built)
    assert rows["item"].shape == (16,)
    state = jax.eval_shape(built.step.init, jax.random.key(0))
    assert state.memory["selection"]["choices"].shape == (2, 4)
    batches = prompt_batches(built, data_sets(built.config)["train"])
    chosen = batches.chosen(np.arange(44, 48))
    assert [item["item_id"] for item in chosen.items] == [44, 45, 46, 47]


def test_an_environment_in_python_is_called_in_processes_where_its_functions_can_be_sent_there(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs" / "examples"))
    import own_environment

    def made(**options):
        return configured_environment({"python": "own_environment:guessing", **options}, None, CharacterTokenizer())

    assert made().executor == "process"
    assert [made(executor=how).executor for how in ("thread", "sandbox")] == ["thread", "sandbox"]
    called = made(on_failure="observation", deadline_seconds=2, failure_reward=-1)
    assert (called.on_failure, called.deadline_seconds, called.failure_reward) == ("observation", 2.0, -1.0)
    with pytest.raises(ValueError, match=r"environment\.on_failure is 'ignore': input should be 'error'"):
        made(on_failure="ignore")
    monkeypatch.setattr(own_environment, "step", lambda state, text: (state, text, 0.0, True))
    assert made().executor is None
    inside = {"python": "jaxrl_llm.rollout.tasks:task_environment", "executor": "process"}
    monkeypatch.setattr(
        "jaxrl_llm.rollout.tasks.task_environment", lambda tokenizer: Environment(None, None, 1, 1, 1, (1,))
    )
    with pytest.raises(ValueError, match=r"environment\.executor is 'process', but this environment is not a HostEnv"):
        configured_environment(inside, None, CharacterTokenizer())


@pytest.mark.parametrize(
    "there, sizes, taken",
    [
        ([0, 0, 1, 1], {"slice": 2, "fsdp": 2}, 2),
        ([1, 1], {"slice": 2, "fsdp": 2}, 1),
        ([0, 0, 2, 2, 3, 3], {"slice": 4, "fsdp": 2}, 3),
        ([0, 0, 1], {"slice": 2, "fsdp": 2}, 2),  # a slice that is not whole: refused when the mesh is made
        ([0] * 8, {"slice": 2, "fsdp": 4}, 2),  # virtual devices have no slices
    ],
)
def test_a_run_goes_on_with_the_slices_that_are_there(there, sizes, taken):
    found, reason = on_slices(sizes, [SimpleNamespace(slice_index=index) for index in there])
    assert found == sizes | {"slice": taken}
    assert ("slices" in reason) == (taken < sizes["slice"])


def test_a_config_of_two_slices_on_one(micro_config):
    built = parts(parse_config(micro_config, ["mesh.slices=2"], vocabulary_size=VOCABULARY))
    assert built.step.composition.resources.placement.mesh is None
    with pytest.raises(ValueError, match=r"mesh.slices 2 x mesh.fsdp 2 is 4, but there is 1 device;"):
        parts(parse_config(micro_config, ["mesh.slices=2", "mesh.fsdp=2"], vocabulary_size=VOCABULARY))


def test_what_a_process_that_does_not_write_is_handed_goes_nowhere(tmp_path):
    given = {"write_metrics": (1, {"loss": 1.0}), "write_samples": (1, [{"text": "a"}])}
    for name in [*(name for name in dir(RunDirectory) if name.startswith("write")), "sync", "close"]:
        getattr(Unwritten(tmp_path), name)(*given.get(name, () if name in ("sync", "close") else ({},)))
    assert list(tmp_path.iterdir()) == []
