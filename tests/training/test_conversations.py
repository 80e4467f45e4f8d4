"""Training and evaluation on tasks in several turns, with environments inside the program and in Python."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl_llm import cli
from jaxrl_llm.config import parse_config, read_tree
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.evaluation import make_evaluate, task_grader
from jaxrl_llm.experience import Source
from jaxrl_llm.reporting.metric_table import OF_MACHINE
from jaxrl_llm.rollout import EnvironmentFailure
from jaxrl_llm.run.batches import prompt_batches
from jaxrl_llm.run.explain import explanation, stages, trace
from jaxrl_llm.run.problems import data_sets
from jaxrl_llm.run.setup import opened_parts, parts
from jaxrl_llm.run.stored_answers import StoredAnswers
from jaxrl_llm.run.train import train

# Programs of many sizes: minutes of compilation.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLES = str(ROOT / "docs" / "examples")
VOCABULARY = CharacterTokenizer().vocabulary_size

TASKS = {
    "grid": {
        "task": {"levels": [1, 2], "options": {"size": 3}},
        "environment": {"max_turn_tokens": 5, "potential": True},
        "rollout": {"max_prompt_tokens": 22, "max_completion_tokens": 30},
    },
    "calculator": {
        "task": {"levels": [1]},
        "environment": {"max_turn_tokens": 12, "most_operations": 1, "error_penalty": 0.05},
        "rollout": {"max_prompt_tokens": 11, "max_completion_tokens": 40},
    },
    "self_correction": {
        "task": {"levels": [1], "options": {"problem_options": {"scratchpad": False}}},
        "environment": {"max_turn_tokens": 6},
        "rollout": {"max_prompt_tokens": 7, "max_completion_tokens": 14},
    },
    "guess": {
        "task": {"name": "chain", "levels": [1], "options": {"scratchpad": False}},
        "environment": {"python": "own_environment:guessing", "max_turns": 3},
        "rollout": {"max_prompt_tokens": 10, "max_completion_tokens": 15},
    },
}
TASKS["guess_in_jax"] = TASKS["guess"] | {"environment": {"python": "own_environment_in_jax:guessing", "max_turns": 3}}
MEASURED = {
    "grid": {"goal", "optimality"},
    "calculator": {"right", "tool_calls_per_episode", "tool_errors_per_episode", "tool_faults_per_episode"},
    "self_correction": {"first_right", "second_right", "delta", "wrong_to_right", "right_to_wrong"},
    "guess": {"failures_per_episode"},
    "guess_in_jax": {"guesses_per_episode"},
}
STOPPED = {f"stopped_by_{way}" for way in ("answer", "environment", "turn_limit", "token_limit")}


@pytest.fixture(scope="module", autouse=True)
def examples_can_be_imported():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield


@pytest.fixture(scope="session")
def config_of(data_directory):
    """A micro config of a task, with overrides."""

    def make(name, *overrides):
        chosen = TASKS[name]
        tree = {
            "name": name,
            "task": {"name": name, "train_items": 24, "validation_items": 4, "test_items": 6} | chosen["task"],
            "data": {"directory": data_directory},
            "model": {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1},
            "environment": dict(chosen["environment"]),
            "warm_start": {
                "steps": 0 if name.startswith("guess") else 30,
                "sequences_per_step": 12,
                "learning_rate": 0.02,
            },
            "rollout": {"samples_per_prompt": 4} | chosen["rollout"],
            "rewards": ["episode_reward"],
            "credit": [{"advantages": "turn_leave_one_out"}],
            "losses": ["policy_gradient"],
            "training": {"steps": 2, "prompts_per_step": 4, "learning_rate": 0.01},
            "evaluation": {"problems": 6, "samples_per_problem": 4, "k": [1, 4], "sequences_per_batch": 20},
            "checkpoints": {"every_steps": 1, "keep": 2},
            "reporting": {"samples_every_steps": 1, "samples_per_report": 4},
        }
        return parse_config(tree, overrides, vocabulary_size=VOCABULARY)

    return make


def records(directory, name="metrics.jsonl"):
    lines = [json.loads(line) for line in (Path(directory) / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in OF_MACHINE} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_run_from_start_to_final_table(name, config_of, tmp_path, capsys):
    directory = tmp_path / "run"
    summary = train(config_of(name, f"run_dir={directory}"))
    measured = MEASURED[name] | STOPPED | {"turns_per_episode"}
    for side in ("before", "after"):
        found = summary[side]
        assert {"greedy", "pass@1", "pass@4", "maj@4", *measured} <= found.keys()
        assert sum(found[way] for way in STOPPED) == pytest.approx(1)
        assert found["truncated_share"] == pytest.approx(
            found["stopped_by_turn_limit"] + found["stopped_by_token_limit"]
        )
    solved = {"grid": "goal", "calculator": "right"}.get(name)
    if solved:
        assert summary["after"]["pass@1"] == pytest.approx(summary["after"][solved])
    shown = capsys.readouterr().out
    assert "turns_per_episode" in shown
    lines = [line for line in records(directory) if line["stage"] == "reinforcement"]
    for line in lines:
        assert {f"episode/{metric}" for metric in measured} <= line.keys()
        assert line["sampler_gap_max"] < 1e-5
    texts = records(directory, "samples.jsonl")
    assert any(("<r>" if name == "self_correction" else "<o>") in line["completion"] for line in texts)

    assert cli.main(["eval", str(directory), "--k", "1,4", "--problems", "6", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again.keys() >= summary["after"].keys()


def some_step(config):
    """(parts, the experience and metrics of one step)."""
    with opened_parts(parts(config)) as built:
        batch = prompt_batches(built, data_sets(config)["train"])[0]
        state = built.step.init(jax.random.key(0), built.initial_params(jax.random.key(0)))
        _, metrics, experience = built.step.run(state, batch.prompts, batch.items, None)
    return built, experience, metrics


@pytest.mark.slow
def test_a_killed_run_with_an_environment_in_python_goes_on_exactly(config_of, tmp_path):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train(config_of("guess", f"run_dir={whole}"))
    train(config_of("guess", f"run_dir={parted}", "training.steps=1"))
    train(config_of("guess", f"run_dir={parted}"), resume=True)
    assert records(whole) == records(parted)


@pytest.mark.slow
def test_an_environment_that_fails_leaves_a_state_to_go_on_from(config_of, tmp_path, monkeypatch):
    import own_environment

    calls, right = iter(range(1000)), own_environment.step

    def failing(state, turn):
        if next(calls) == fails[0]:
            raise OSError("the game server is down")
        return right(state, turn)

    fails = [1]  # in the evaluation before, for which there is no checkpoint yet
    few = "evaluation={problems: 1, samples_per_problem: 1, k: [1], sequences_per_batch: 2}"
    config = config_of("guess", f"run_dir={tmp_path / 'run'}", few, "training.steps=1")
    monkeypatch.setattr(own_environment, "step", failing)
    with pytest.raises(EnvironmentFailure, match=r"server is down for row .*begin anew with: jaxrl train --resume"):
        train(config)
    fails = [next(calls) + 7]  # the evaluation before takes six turns at most
    with pytest.raises(EnvironmentFailure, match=r"server is down for row .*checkpoint is step 0; .*train --resume"):
        train(config, resume=True)
    monkeypatch.setattr(own_environment, "step", right)
    assert train(config, resume=True)["steps"] == 1


def test_a_step_in_python_is_host_program_program(config_of):
    built, experience, metrics = some_step(config_of("guess"))
    assert stages(built.step.composition)[0]["name"] == "host_generate_turns"
    assert [entry["program"] for entry in explanation(built)["programs"]] == ["whole step"]
    like = trace(built)
    assert jax.tree.map(lambda x: x.shape, like) == jax.tree.map(lambda x: x.shape, experience)
    assert (np.asarray(experience.source) == Source.OBSERVATION).any()
    assert np.isfinite(float(metrics["loss"]))
    assert "episode/failures_per_episode" in metrics


def test_an_environment_in_python_is_opened_for_a_single_step_too(config_of):
    config = config_of("guess")
    built = parts(config)
    batch = prompt_batches(built, data_sets(config)["train"])[0]
    state = built.step.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"reads text: call step\(state, prompts, items\)"):
        built.step(state, batch.prompts)
    _, metrics = built.step(state, batch.prompts, batch.items)
    assert np.isfinite(float(metrics["loss"]))


def test_what_solves_an_episode_does_not_depend_on_how_it_is_rewarded(config_of):
    """A penalty for errors lowers the reward of a right answer below 1, and it is right all the same."""
    built, experience, _ = some_step(config_of("grid", "rewards=[{episode_reward: {turn: 0}}]"))
    np.testing.assert_array_equal(experience["correct"], experience["solved"])
    assert stages(built.step.composition)[0]["name"] == "generate_turns"


def test_a_conversation_votes_for_its_moves():
    from jaxrl_llm.data import tasks
    from jaxrl_llm.data.tasks.items import record

    task = tasks.task("grid", size=3)
    item = record(tasks.grid.item(["S.#", ".#.", "..G"]), 0)
    grade = task_grader(task)
    turns = [f"<a>{move}</a><n><o>.....</o>" for move in "DDR"]
    assert grade(item, "".join(turns) + "<a>R</a><n>") == (True, item["answer"])
    assert grade(item, "".join(turns)) == (False, "DDR")
    assert grade(item, "none") == (False, None)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "grid",
            ["rollout.plan={prefixes: {texts: ['<a>']}}"],
            r"rollout.plan needs .* \(prefixes\), which the environment",
        ),
        ("grid", ["rollout.slots=4"], r"rollout.slots needs .* \(slots\), which the environment inside"),
        (
            "guess",
            ["rollout.plan={mixed_temperature: {prompt_share: 0.5, temperature: 0.5}}"],
            r"rollout.plan needs .* \(temperatures\), which the environment in Python",
        ),
        (
            "guess",
            ["rollout.plan={adaptive: {samples_per_round: 4, max_rounds: 2}}"],
            r"rollout.plan needs .* \(active_prompts\), which the environment in Python",
        ),
        (
            "grid",
            ["rollout.engine={url: 'http://localhost:1', model: m, reload_every_steps: 0}"],
            r"the environment needs .* \(conversations\), which rollout.engine",
        ),
        (
            "guess",
            ["credit=[advantages: reward_minus_baseline]"],
            r"the greedy baseline \('baseline_rewards'\) needs .* \(temperatures\)",
        ),
        ("grid", ["environment.potentail=true"], "option 'potentail' of the environment grid_navigation is unknown"),
        ("grid", ["environment.size=4"], "option 'size' of the environment grid_navigation is an option of the task"),
        ("grid", ["environment={python: own_environment}"], "write it as module:function"),
        ("grid", ["environment={python: 'own_environment:reset'}"], r"could not be called with the tokenizer"),
        ("grid", ["environment={python: 'own_environment:guessing', largest: 3}"], "could not .* largest else"),
        ("grid", ["environment={python: 'jaxrl_llm.data:encode'}"], "has no 'encode'"),
        (
            "grid",
            ["task={name: addition, levels: [1]}"],
            "environment.max_turn_tokens is set, but there is no environment",
        ),
        (
            "grid",
            ["task={name: addition, levels: [1]}", "environment={}"],
            "reward 'episode_reward' names 'turn_rewards', which nothing.*a task that is answered in turns provides it",
        ),
    ],
)
def test_what_cannot_be_had_with_conversations_is_refused(name, overrides, message, config_of):
    with pytest.raises(ValueError, match=message):
        parts(config_of(name, *overrides))


@pytest.mark.parametrize("source", ["replay: {share: 0.5}", "solved_answers: {sequences_per_step: 4}"])
@pytest.mark.parametrize("name", ["grid", "guess"])
def test_other_sources_go_with_conversations(name, source, config_of):
    trace(parts(config_of(name, f"source=[sampler, {{{source}}}]")))


def test_what_an_environment_says_in_a_stored_conversation_is_not_learned():
    trained = np.array([[1, 1, 0, 1, 0]], np.float32)
    one, tokens = np.ones(1, np.int32), np.arange(3, 8, dtype=np.int32)[None]
    rows = {"prompt_tokens": tokens, "prompt_length": one, "prompt_id": one, "tokens": tokens, "length": 4 * one}
    made = StoredAnswers(rows | {"trained": trained, "stored_logprobs": -trained}, one)
    np.testing.assert_array_equal(made.batch(jax.random.key(0), 0, 1, answer_width=1)["written_mask"], trained)


def test_an_environment_that_does_not_fit_the_prompts_is_refused_before_anything_is_compiled(config_of):
    with pytest.raises(ValueError, match=r"a grid of 3 rows has 11; raise max_answer_tokens"):
        trace(parts(config_of("grid", "rollout.max_completion_tokens=10")))


@pytest.mark.parametrize("name", ["grid", "calculator", "bargaining", "self_correction"])
def test_the_demos_compose(name):
    trace(parts(parse_config(read_tree(ROOT / "configs" / f"{name}.yaml"), vocabulary_size=VOCABULARY)))


def test_evaluation_opens_an_environment_in_python_by_itself(config_of):
    config = config_of("guess")
    built = parts(config)
    heard = []
    reset = built.environment.reset
    environment = built.environment._replace(reset=lambda item: heard.append(item) or reset(item), executor="thread")
    evaluate = make_evaluate(
        built.model,
        task_grader(built.task),
        built.tokenizer,
        samples_per_problem=2,
        k=(1,),
        max_prompt_tokens=10,
        max_completion_tokens=15,
        sequences_per_batch=9,
        environment=environment,
    )
    items = [data_sets(config)["test"][number] for number in range(4)]
    found = evaluate(built.initial_params(jax.random.key(0)), items, jax.random.key(1))
    assert (found["problems"], found["failures_per_episode"]) == (4, 0)
    assert 1 <= found["turns_per_episode"] <= 3
    assert len(heard) == 4 * 3  # of two batches of three problems
