"""Recipes with a file, a checkpoint or several stages, at micro size."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from rich.console import Console

from jaxrl_llm.cli import main
from jaxrl_llm.commands.scored_pairs import reference_lines
from jaxrl_llm.config import Config, NetworkConfig, parse_config, read_tree
from jaxrl_llm.data import CharacterTokenizer, tasks
from jaxrl_llm.data.row_files import row_objects
from jaxrl_llm.data.written import judged_groups
from jaxrl_llm.models.decoder import transformer
from jaxrl_llm.models.export import save_model
from jaxrl_llm.models.transformer_config import TransformerConfig
from jaxrl_llm.rollout.hidden_states import predicting_hidden
from jaxrl_llm.run.batches import prompt_batches
from jaxrl_llm.run.explain import trace
from jaxrl_llm.run.nonfinite import not_finite
from jaxrl_llm.run.problems import data_sets
from jaxrl_llm.run.restored import restored_network
from jaxrl_llm.run.setup import Parts, parts
from jaxrl_llm.run.staged import staged
from jaxrl_llm.run.stages import written_of
from jaxrl_llm.run.train import train
from jaxrl_llm.shipped import recipe_path

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "examples"))
from judge_stand_in import StandIn

MICRO = {
    "task": {"name": "addition", "levels": [1], "options": {"scratchpad": False}, "train_items": 64}
    | {"validation_items": 4, "test_items": 4},
    "model": {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1},
}


def answered(count: int = 32) -> list[tuple[str, str, str]]:
    """(prompt, right answer, wrong answer) of problems of one digit."""
    made = tasks.task("addition", scratchpad=False).generate(level=1, count=count, seed=5, split="train")
    return [(item.body, f"<a>{item.answer}</a>", f"<a>{int(item.answer) + 1}</a>") for item in made]


def lines(kind: str) -> list[dict[str, Any]]:
    if kind == "pairs":
        return [{"prompt": p, "chosen": right, "rejected": wrong} for p, right, wrong in answered()]
    if kind == "steps":
        return [{"prompt": p, "steps": [right, wrong], "labels": [1, 0]} for p, right, wrong in answered()]
    return [
        {"prompt": p, "completion": text, "label": label}
        for p, right, wrong in answered()
        for text, label in ((right, True), (wrong, False))
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("judged")
    for kind in ("pairs", "labels", "steps"):
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines(kind)))
    return {kind: folder / f"{kind}.jsonl" for kind in ("pairs", "labels", "steps")}


@pytest.fixture
def micro(files, data_directory):
    """A recipe for a micro model, with its file if it needs one."""

    def make(name: str, kind: str | None, *overrides: str) -> Config:
        tree = read_tree(recipe_path(name)) | MICRO | {"data": {"directory": data_directory}}
        tree["rollout"] |= {"max_prompt_tokens": 7, "max_completion_tokens": 6}
        tree["training"] |= {"learning_rate": 0.01, "warmup_steps": 0}
        if kind is not None:
            tree["source"] = {kind: {"file": str(files[kind]), "groups_per_step": 8}}
        tree["warm_start"] = {"steps": 0}
        tree["evaluation"] = {"problems": 4, "samples_per_problem": 2, "k": [1, 2], "sequences_per_batch": 8}
        return parse_config(tree, overrides, vocabulary_size=CharacterTokenizer().vocabulary_size)

    return make


def whole_run(config: Config, directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Metrics of a whole run, by stage."""
    train(replace(config, run_dir=str(directory)), console=Console(file=io.StringIO()))
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        by_stage.setdefault((numbers := json.loads(line))["stage"], []).append(numbers)
    return by_stage


def learned(config: Config, steps: int) -> list[dict[str, float]]:
    """Metrics of some steps."""
    built = parts(config)
    rows = written_of(built, data_sets(config))
    assert rows is not None
    state, seen = built.step.init(jax.random.key(0)), []
    for index in range(steps):
        state, metrics = built.step(state, written=rows(index))
        seen.append({name: float(value) for name, value in jax.device_get(metrics).items()})
        assert not not_finite(seen[-1])
    return seen


def test_dpo_learns_from_a_file_of_pairs(micro):
    seen = learned(micro("dpo", "pairs"), 20)
    np.testing.assert_allclose(seen[0]["loss/dpo"], np.log(2), rtol=1e-5)
    assert seen[-1]["loss/dpo"] < seen[0]["loss/dpo"] - 0.02
    assert seen[-1]["margin/dpo"] > 0 == seen[0]["margin/dpo"]
    assert seen[-1]["preferred_share/dpo"] > 0.6


@pytest.mark.slow
def test_dpo_with_the_reference_of_its_file_is_dpo_without_a_reference(micro, files, tmp_path):
    config = micro("dpo", "pairs")
    built = parts(config)
    params = built.step.init(jax.random.key(0)).params
    records, groups = row_objects(files["pairs"], "pairs")[0], judged_groups(files["pairs"], "pairs").groups
    told = reference_lines(built.model, params, built.tokenizer, records, groups, 5)
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    stored = replace(config, source=({"pairs": {"file": str(tmp_path / "scored.jsonl"), "groups_per_step": 8}},))
    assert not parts(stored).step.composition.networks
    assert trace(parts(stored))["reference_logprobs"].shape == (16, 6)
    assert "reference" in built.step.composition.networks
    wanted, found = learned(config, 3), learned(stored, 3)
    for one, other in zip(wanted, found, strict=True):
        np.testing.assert_allclose(other["loss/dpo"], one["loss/dpo"], rtol=1e-6)
    moving = replace(stored, networks={"reference": NetworkConfig(copy_every=2)})
    with pytest.raises(ValueError, match=r"networks.reference follows the policy, but the rows of the source have"):
        parts(moving)
    for change, message in (
        ({"reference_tokens": [1, 2]}, "line 1 has reference_logprobs of other tokens"),
        ({"reference_logprobs": [[0.0]]}, "there must be 2 of each, as jaxrl pairs --reference writes them"),
        ({"reference_logprobs": None}, "has reference_logprobs in some rows only"),
    ):
        lines = [{**told[0], **change}, *told[1:]]
        (tmp_path / "scored.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(ValueError, match=message):
            parts(stored)


@pytest.mark.slow
def test_dpo_in_microbatches_of_whole_pairs_is_dpo(micro):
    whole, cut = (
        learned(micro("dpo", "pairs", *given), 2)[1] for given in ((), ("training.sequences_per_microbatch=4",))
    )
    np.testing.assert_allclose(cut["loss/dpo"], whole["loss/dpo"], rtol=1e-5)
    with pytest.raises(ValueError, match=r"sequences_per_microbatch is 1, .*whole groups"):
        learned(micro("dpo", "pairs", "training.sequences_per_microbatch=1"), 1)


def test_kto_learns_from_a_file_of_labels(micro):
    seen = learned(micro("kto", "labels"), 20)
    np.testing.assert_allclose(seen[0]["loss/kto"], 0.5, rtol=1e-5)
    assert seen[0]["kl_anchor/kto"] == 0
    assert seen[-1]["loss/kto"] < 0.48
    assert seen[-1]["desirable_log_ratio/kto"] > seen[-1]["undesirable_log_ratio/kto"] + 0.5


def test_kto_scores_mismatched_completions_within_a_microbatch(micro):
    seen = learned(micro("kto", "labels", "training.sequences_per_microbatch=4"), 2)
    assert np.isfinite(seen[-1]["loss/kto"])
    with pytest.raises(ValueError, match="mismatched_completions got a single row"):
        learned(micro("kto", "labels", "training.sequences_per_microbatch=1"), 1)


@pytest.mark.slow
def test_a_reward_model_learns_from_pairs_and_the_policy_from_its_scores(micro, tmp_path):
    config = micro("reward_model_then_rl", "pairs")
    model, policy = config.stages
    model["training"]["steps"], policy["training"] = 20, {"steps": 3, "prompts_per_step": 8}
    networks = {"reward": replace(config.networks["reward"], learning_rate=0.005)}
    seen = whole_run(replace(config, stages=(model, policy), networks=networks), tmp_path / "run")
    assert list(seen) == ["reward model", "reinforcement"]
    scored = seen["reward model"]
    first, last = (np.mean([one["loss/bradley_terry"] for one in part]) for part in (scored[:4], scored[-4:]))
    assert last < first - 0.03
    assert np.mean([one["preferred_share/bradley_terry"] for one in scored[-4:]]) > 0.6
    assert "gradient_norm" not in scored[-1]  # the policy waits
    assert scored[-1]["gradient_norm/reward"] > 0
    for step in seen["reinforcement"]:
        assert step["reward"] != 0  # the verifier has no weight
        assert step["gradient_norm"] > 0
        assert "gradient_norm/reward" not in step  # the reward model is frozen
    _, _, params = restored_network(tmp_path / "run", "reward")
    np.testing.assert_allclose(optax.tree.norm(params), scored[-1]["parameter_norm/reward"], rtol=1e-5)


@pytest.mark.slow
def test_three_reward_models_learn_and_the_policy_from_what_they_agree_on(micro, tmp_path):
    config = micro("rm_ensemble", "pairs")
    models, policy = config.stages
    models["training"]["steps"], policy["training"] = 20, {"steps": 3, "prompts_per_step": 8}
    networks = {name: replace(one, learning_rate=0.005) for name, one in config.networks.items()}
    seen = whole_run(replace(config, stages=(models, policy), networks=networks), tmp_path / "run")
    for name in ("first", "second", "third"):
        assert seen["reward models"][-1][f"loss/{name}_pairs"] < seen["reward models"][0][f"loss/{name}_pairs"]
    for step in seen["reinforcement"]:
        assert len({step[f"reward/{name}"] for name in ("one", "two", "three")}) == 3  # each has its own head
        assert step["gradient_norm"] > 0


@pytest.mark.slow
def test_gaussian_heads_learn_and_the_policy_from_the_surest_and_the_lowest(micro, tmp_path):
    config = micro("reward_robust", "pairs")
    model, policy = config.stages
    model["training"]["steps"], policy["training"] = 20, {"steps": 3, "prompts_per_step": 8}
    networks = {"reward": replace(config.networks["reward"], learning_rate=0.005)}
    seen = whole_run(replace(config, stages=(model, policy), networks=networks), tmp_path / "run")
    scored = seen["reward model"]
    assert scored[-1]["loss/gaussian_bradley_terry"] < scored[0]["loss/gaussian_bradley_terry"]
    assert scored[-1]["deviation/gaussian_bradley_terry"] > 0
    for step in seen["reinforcement"]:
        assert np.isfinite(step["reward/robust_score"])
        assert step["gradient_norm"] > 0
        assert "gradient_norm/reward" not in step


@pytest.mark.slow
def test_a_process_reward_model_learns_from_labelled_steps_and_the_policy_from_its_worst_one(micro, tmp_path):
    config = micro("process_reward_model", "steps", "rollout.max_completion_tokens=14")
    model, policy = config.stages
    model["training"]["steps"], policy["training"] = 20, {"steps": 3, "prompts_per_step": 8}
    networks = {"process": replace(config.networks["process"], learning_rate=0.005)}
    seen = whole_run(replace(config, stages=(model, policy), networks=networks), tmp_path / "run")
    scored = [one["loss/step_label_likelihood"] for one in seen["process reward model"]]
    np.testing.assert_allclose(scored[0], np.log(2), atol=0.15)
    assert np.mean(scored[-4:]) < scored[0] - 0.1
    for step in seen["reinforcement"]:
        assert step["gradient_norm"] > 0
        assert "gradient_norm/process" not in step


@pytest.mark.slow
def test_a_process_reward_model_learns_from_continuations_that_nobody_labelled(micro, tmp_path):
    config = micro("math_shepherd", None, "rollout.max_completion_tokens=14")
    model, policy = config.stages
    model["training"], policy["training"] = {"steps": 20, "prompts_per_step": 8}, {"steps": 3, "prompts_per_step": 8}
    networks = {"process": replace(config.networks["process"], learning_rate=0.005)}
    seen = whole_run(replace(config, stages=(model, policy), networks=networks), tmp_path / "run")
    scored = [one["loss/step_label_likelihood"] for one in seen["process reward model"]]
    assert np.mean(scored[-4:]) < scored[0] - 0.1  # nearly all samples fail at the start, which is soon predicted
    for step in seen["process reward model"]:
        assert step["continued_tokens"] >= 0
        assert "gradient_norm" not in step  # the policy waits
    for step in seen["reinforcement"]:
        assert np.isfinite(step["loss"])
        assert "gradient_norm/process" not in step


@pytest.mark.slow
def test_a_curriculum_goes_from_all_problems_to_the_hardest_to_reinforcement(data_directory, tmp_path):
    tree = read_tree(recipe_path("light_r1")) | {"data": {"directory": data_directory}, "model": MICRO["model"]}
    tree["task"] = MICRO["task"] | {"levels": [4], "train_items": 64}
    tree["rollout"] |= {"samples_per_prompt": 4, "max_completion_tokens": 9}
    tree["evaluation"] = {"problems": 4, "samples_per_problem": 2, "k": [1, 2], "sequences_per_batch": 8}
    tree["training"] |= {"prompts_per_step": 4, "warmup_steps": 0, "schedule": "constant"}
    for stage, steps in zip(tree["stages"], (6, 4, 2), strict=True):
        stage["training"] = {"steps": steps, "learning_rate": 0.01}
    tree["stages"][0]["source"] = tree["stages"][1]["source"] = {"demonstrations": {"sequences_per_step": 16}}
    tree["stages"][1]["task"]["train_items"] = 16
    config = parse_config(tree, vocabulary_size=CharacterTokenizer().vocabulary_size)
    sets = [data_sets(stage["parts"].config)["train"] for stage in staged(config)]
    broad, hard, reinforced = ([one[index] for index in range(len(one))] for one in sets)
    assert ({item["level"] for item in broad}, {item["level"] for item in hard}) == ({2, 3, 4}, {4})
    assert (len(broad), len(hard), len(reinforced)) == (64, 16, 64)
    # The hard problems are a subset of the earlier ones.
    assert {item["body"] for item in hard} <= {item["body"] for item in broad}
    seen = whole_run(config, tmp_path / "run")
    assert {name: len(steps) for name, steps in seen.items()} == {
        "supervised on all": 6,
        "supervised on the hardest": 4,
        "reinforcement": 2,
    }
    name = "loss/negative_log_likelihood"
    assert seen["supervised on the hardest"][-1][name] < seen["supervised on all"][0][name] - 0.5
    # No answer is right yet, and long wrong answers are penalised.
    assert all(step["reward"] <= 0 for step in seen["reinforcement"])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A checkpoint of a larger model with low entropy."""
    config = TransformerConfig(
        vocabulary_size=CharacterTokenizer().vocabulary_size, width=24, layers=2, heads=3, kv_heads=1, rope_base=10.0
    )
    params = transformer(config).init(jax.random.key(7))
    params["final_norm"] = 3 * params["final_norm"]
    folder = tmp_path_factory.mktemp("teacher") / "model"
    save_model(folder, params, config)
    return folder


def student(data_directory: str, *overrides: str) -> tuple[Parts, Any]:
    """(a micro student of the teacher, its prompts by step)."""
    tree = read_tree(recipe_path("on_policy_distillation")) | MICRO | {"data": {"directory": data_directory}}
    tree["rollout"] |= {"max_prompt_tokens": 7, "max_completion_tokens": 6}
    tree["training"] |= {"prompts_per_step": 16, "learning_rate": 0.02, "warmup_steps": 0, "schedule": "constant"}
    built = parts(parse_config(tree, overrides, vocabulary_size=CharacterTokenizer().vocabulary_size))
    return built, prompt_batches(built, data_sets(built.config)["train"])


@pytest.mark.slow
def test_a_student_comes_near_a_larger_teacher(data_directory, teacher):
    built, prompts = student(data_directory, f"networks.teacher.path={teacher}")
    state, seen = built.step.init(jax.random.key(0), None, built.given()), []
    for index in range(12):
        state, metrics = built.step(state, prompts[index].prompts)
        seen.append({name: float(value) for name, value in jax.device_get(metrics).items()})
        assert not not_finite(seen[-1])
    assert seen[-1]["teacher_kl/teacher_reverse_kl"] < 0.85 * seen[0]["teacher_kl/teacher_reverse_kl"]
    assert "gradient_norm/teacher" not in seen[-1]


@pytest.mark.slow
def test_the_exact_divergence_from_a_larger_teacher_calls_it_the_reference(data_directory, teacher):
    built, prompts = student(
        data_directory, f"networks={{reference: {{path: {teacher}}}}}", "losses=[{divergence: {samples: vocabulary}}]"
    )
    given = built.given()["reference"]
    state = built.step.init(jax.random.key(0), None, {"reference": given})
    params = jax.device_get(state.params)
    _, metrics, rows = built.step.run(state, prompts[0].prompts)
    larger = built.step.composition.networks["reference"].model

    def log_softmax(model, params):
        hidden = predicting_hidden(model, params, rows.prompt_tokens, rows.prompt_length, rows.tokens, rows.length)
        return jax.nn.log_softmax(model.logits(params, hidden))

    ours, theirs = (jax.jit(partial(log_softmax, m))(p) for m, p in ((built.model, params), (larger, given)))
    expected = (rows.mask * (np.exp(ours) * (ours - theirs)).sum(-1)).sum() / rows.mask.sum()
    np.testing.assert_allclose(metrics["loss/divergence"], expected, rtol=1e-4)


@pytest.mark.slow
def test_a_guide_learns_by_dpo_and_pays_the_tokens_of_the_policy(micro, tmp_path):
    config = micro("rto", "pairs")
    models, policy = config.stages
    models["training"]["steps"], policy["training"] = 20, {"steps": 3, "prompts_per_step": 8}
    networks = {name: replace(one, learning_rate=0.005) for name, one in config.networks.items()}
    seen = whole_run(replace(config, stages=(models, policy), networks=networks), tmp_path / "run")
    guided = seen["guide and reward model"]
    np.testing.assert_allclose(guided[0]["loss/dpo"], np.log(2), rtol=1e-4)
    assert guided[-1]["loss/dpo"] < guided[0]["loss/dpo"]
    assert "gradient_norm" not in guided[0]  # the policy waits
    for step in seen["reinforcement"]:
        assert step["gradient_norm"] > 0


@pytest.mark.slow
def test_the_critic_of_unpacked_ppo_begins_as_the_reward_model(micro, tmp_path):
    config = micro("unpacked_ppo", "pairs")
    model, policy = config.stages
    model["training"]["steps"], policy["training"] = 10, {"steps": 3, "prompts_per_step": 8}
    rates = {"reward": 0.005, "value": 1e-12}
    networks = {name: replace(one, learning_rate=rates[name]) for name, one in config.networks.items()}
    seen = whole_run(replace(config, stages=(model, policy), networks=networks), tmp_path / "run")
    assert list(seen) == ["reward model", "reinforcement"]
    for step in seen["reinforcement"]:
        assert step["gradient_norm"] > 0
        assert step["gradient_norm/value"] > 0
        assert "gradient_norm/reward" not in step
    reward, value = (restored_network(tmp_path / "run", name)[2] for name in ("reward", "value"))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-8), value, reward)
    assert np.abs(reward["head"]["weight"]).max() > 0


@pytest.mark.slow
def test_the_pairs_of_a_file_are_ordered_by_the_reward_model_of_a_run(micro, files, tmp_path, capsys):
    config = micro("reward_model_then_rl", "pairs")
    networks = {name: replace(one, learning_rate=0.005) for name, one in config.networks.items()}
    stage = config.stages[0] | {"training": {"steps": 30}}
    whole_run(replace(config, stages=(stage,), networks=networks), tmp_path / "run")
    told = [
        json.loads(line) | {"from": f"part {n % 2}"} for n, line in enumerate(files["pairs"].read_text().splitlines())
    ]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    command = ["pairs", str(tmp_path / "run"), "--file", str(tmp_path / "held.jsonl"), "--by", "from", "--json"]
    assert main(command) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["source"], row["pairs"]) for row in rows] == [("all", 32), ("part 0", 16), ("part 1", 16)]
    assert rows[0]["accuracy"] > 0.6  # on training pairs
    np.testing.assert_allclose(rows[0]["accuracy"], (rows[1]["accuracy"] + rows[2]["accuracy"]) / 2)


def sums(data_directory: str, name: str, *overrides: str, **more: Any) -> Config:
    """A recipe for a micro model that can answer some sums."""
    tree = read_tree(recipe_path(name)) | MICRO | {"data": {"directory": data_directory}} | more
    tree["rollout"] |= {"samples_per_prompt": 4, "max_prompt_tokens": 7, "max_completion_tokens": 6}
    tree["training"] |= {"prompts_per_step": 8, "learning_rate": 0.003, "warmup_steps": 0, "steps": 3}
    tree["warm_start"] = {"steps": 60, "sequences_per_step": 32, "learning_rate": 0.02, "probe_every_steps": 0}
    tree["evaluation"] = {"problems": 4, "samples_per_problem": 2, "k": [1, 2], "sequences_per_batch": 8}
    return parse_config(tree, overrides, vocabulary_size=CharacterTokenizer().vocabulary_size)


@pytest.mark.slow
def test_a_copy_of_the_policy_learns_to_write_verdicts_and_the_policy_from_them(data_directory, tmp_path):
    config = sums(data_directory, "generative_judge")
    judge, policy = config.stages
    judge["training"]["steps"], policy["training"] = 40, {"steps": 4, "prompts_per_step": 8}
    networks = {"critic": replace(config.networks["critic"], learning_rate=0.02)}
    seen = whole_run(replace(config, stages=(judge, policy), networks=networks), tmp_path / "run")
    losses = [one["loss/negative_log_likelihood"] for one in seen["judge"]]
    assert np.mean(losses[-5:]) < 1.2 < losses[0] - 1  # per token of answer and verdict
    assert "gradient_norm" not in seen["judge"][-1]  # the policy waits
    for step in seen["reinforcement"]:
        assert 0 <= step["reward/judge_rating"] <= 1
        assert step["reward"] == pytest.approx(step["reward/judge_rating"])  # the verifier has no weight
        assert "gradient_norm/critic" not in step
    assert seen["judge"][-1]["gradient_norm/critic"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["critique_rl", "generator_and_critic"])
def test_a_critic_is_paid_for_verdicts_and_for_what_its_critiques_are_good_for(name, data_directory, tmp_path):
    task = MICRO["task"] | {"name": "chain", "levels": [1], "options": read_tree(recipe_path(name))["task"]["options"]}
    config = sums(data_directory, name, "rollout.max_prompt_tokens=12", "rollout.max_completion_tokens=12", task=task)
    first, *later = config.stages
    first["training"]["steps"] = 60
    for stage in later:
        stage["training"] = {"steps": 3}
    networks = {network: replace(one, learning_rate=0.01) for network, one in config.networks.items()}
    seen = whole_run(replace(config, networks=networks), tmp_path / "run")
    forms, *paid = (seen[stage["name"]] for stage in config.stages)
    learned = [loss for loss in forms[0] if loss.startswith("loss/") and loss != "loss/kl_estimate"]
    assert all(forms[-1][loss] < 0.7 * forms[0][loss] for loss in learned)
    for step in (step for stage in paid for step in stage):
        assert step["gradient_norm"] > 0
        assert 0 < step["metric/refined"] < 1
    if name == "critique_rl":
        assert "gradient_norm" not in forms[-1]  # the policy waits
        for step, most in [(step, most) for stage, most in zip(paid, (1.0, 1.2), strict=True) for step in stage]:
            assert -1 < step["reward"] < most
        assert paid[0][0]["reward"] == pytest.approx(2 * paid[0][0]["correct_share"] - 1)
    else:
        assert all(-1 < step["metric/verdict"] < 1 and step["gradient_norm/critic"] > 0 for step in paid[0])


@pytest.mark.slow
def test_a_judge_behind_an_endpoint_is_asked_about_each_step(data_directory, tmp_path):
    server = StandIn().start()
    try:
        told = {"turn_labels": {"judge_turns": {"judge": server.described(), "max_turns": 2}}}
        credit = [told if "turn_labels" in one else one for one in read_tree(recipe_path("thought_judge"))["credit"]]
        seen = whole_run(sums(data_directory, "thought_judge", credit=credit), tmp_path / "run")
        (steps,) = [lines for stage, lines in seen.items() if "reward/exact_answer" in lines[-1]]
        assert all(step["judge/judge_turns/unreadable"] == 0 < step["judge/judge_turns/calls"] for step in steps)
        assert all("Before the step:" in question for question in server.asked)
        assert any(step["gradient_norm"] > 0 for step in steps)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_shares_of_utterances_in_a_deal_are_learned_and_the_policy_from_them(data_directory, tmp_path):
    task = MICRO["task"] | {"name": "bargaining", "levels": [2], "options": {}}
    config = sums(
        data_directory, "sotopia", "rollout.max_prompt_tokens=9", "rollout.max_completion_tokens=40", task=task
    )
    shares, policy = config.stages
    shares["training"]["steps"] = 20
    networks = {"utterance": replace(config.networks["utterance"], learning_rate=0.01)}
    seen = whole_run(replace(config, stages=(shares, policy), networks=networks), tmp_path / "run")
    losses = [one["loss/step_label_likelihood"] for one in seen["utterances"]]
    np.testing.assert_allclose(losses[0], np.log(2), atol=0.15)
    assert np.mean(losses[-4:]) < losses[0] - 0.1  # most utterances contribute nothing
    assert "gradient_norm" not in seen["utterances"][-1]  # the policy waits
    for step in seen["reinforcement"]:
        assert step["gradient_norm"] > 0
        assert "gradient_norm/utterance" not in step
        assert 0 <= step["episode/own_share"] <= 1
