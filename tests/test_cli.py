"""The command line, called as a function: its output, its status, and one sentence for bad input."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import jaxrl_llm
from jaxrl_llm import cli
from jaxrl_llm.commands.arguments import loaded_config
from jaxrl_llm.data import tasks
from jaxrl_llm.run import explain
from jaxrl_llm.shipped import method_files


@pytest.fixture
def jaxrl(capsys):
    """Call the command; returns its output, and its JSON if it prints JSON."""

    def run(*arguments: str):
        assert cli.main(arguments) == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        return json.loads(out) if "--json" in arguments else out

    return run


@pytest.fixture
def refused(capsys):
    """Call the command with bad input; returns its message."""

    def run(*arguments: str) -> str:
        assert cli.main(arguments) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
        assert "Traceback" not in said.err + said.out
        return said.err

    return run


# ---- inventories ----------------------------------------------------------------------------------------------------


def test_tasks_are_listed(jaxrl):
    listed = jaxrl("tasks", "--json")
    assert [entry["name"] for entry in listed] == list(tasks.names())
    assert all(entry["description"] and entry["reward"] for entry in listed)
    assert all(name in jaxrl("tasks") for name in tasks.names())


def test_examples_of_a_task_are_shown(jaxrl):
    examples = jaxrl("tasks", "addition", "--level", "2", "--count", "2", "--json")
    assert len(examples) == 2
    assert examples[0]["prompt"].startswith("A:")
    assert examples[0]["reference response"].startswith("<t>")
    assert examples[0]["prompt"] in jaxrl("tasks", "addition", "--level", "2", "--count", "1")


def test_methods_are_listed_by_room_and_certainty(jaxrl):
    everything = jaxrl("methods", "--json")
    rewards = jaxrl("methods", "--room", "reward", "--json")
    assert {entry["room"] for entry in rewards} == {"reward"}
    assert 0 < len(rewards) < len(everything)
    verified = jaxrl("methods", "--certainty", "verified", "--json")
    assert {entry["certainty"] for entry in verified} == {"verified"}
    table = jaxrl("methods", "--room", "loss")
    assert "certainty" in table
    assert "logprobs" in table


def test_one_method_is_shown_whole(jaxrl):
    entry = jaxrl("methods", "clipped_surrogate", "--json")
    assert entry["hyper_parameters"]["clip_low"] == 0.2
    text = jaxrl("methods", "clipped_surrogate")
    assert "clipped_surrogate (loss)" in text
    assert "x = max(-A * min(r, ratio_cap)" in text
    assert 'Recipe entry:  clipped_surrogate: {"clip_low": 0.2' in text


def test_doctor_describes_the_machine(jaxrl):
    report = jaxrl("doctor", "--json")
    assert report["devices"]["backend"] == "cpu"
    assert report["host"]["cores"] >= 1
    assert report["versions"]["jax"]
    assert report["compiled programs"]["directory"] == os.environ["JAX_COMPILATION_CACHE_DIR"]
    assert "memory_gib" in jaxrl("doctor")


# ---- explain --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def explained(micro_yaml):
    """`jaxrl explain` on the micro config, compiled once for all tests."""
    return explain.explanation(explain_parts(micro_yaml))


def explain_parts(path, *overrides):
    from jaxrl_llm.run.setup import parts

    return parts(loaded_config([str(path), *overrides]))


@pytest.mark.slow
def test_explain_gives_the_stages_in_order(explained):
    rows = [(row["stage"], row["name"], row["where"]) for row in explained["stages"]]
    assert rows == [
        ("collect", "generate", "program"),
        ("rewards", "answer_format", "program"),
        ("rewards", "exact_answer", "program"),
        ("networks", "the sampler's own", "program"),
        ("networks", "reference forward pass", "program"),
        ("credit", "running_mean_baseline", "program"),
        ("learn", "clipped_surrogate", "program"),
        ("learn", "kl_estimate", "program"),
    ]
    by_name = {row["name"]: row for row in explained["stages"]}
    assert by_name["exact_answer"]["provides"] == "reward component x 2"
    assert by_name["running_mean_baseline"]["needs"] == ["rewards", "weight"]
    assert by_name["clipped_surrogate"]["needs"][-1] == "[token_weight]"
    assert by_name["kl_estimate"]["provides"] == "loss x 0.01"


def test_explain_counts_the_rows_of_a_step_that_samples_nothing(micro_yaml):
    learns = ["source=[{demonstrations: {sequences_per_step: 6}}]", "losses=[negative_log_likelihood]"]
    built = explain_parts(
        micro_yaml,
        *learns,
        "rewards=[]",
        "credit=[]",
        "networks={}",
        "training.minibatches_per_epoch=1",
        "training.sequences_per_microbatch=6",
        "warm_start={}",
    )
    sizes = explain.sizes(built, explain.abstract_inputs(built)[0], explain.trace(built))
    assert "prompts_per_step" not in sizes
    assert (sizes["sequences_per_step"], sizes["completion_tokens_per_step_at_most"]) == (6, 36)


def test_explain_gives_shapes_sizes_and_work(explained, finished_run):
    assert explained["shapes"]["tokens"] == "int32[16, 6]"
    assert explained["shapes"]["advantages"] == "float32[16, 6]"
    assert explained["shapes"]["reward_components"] == "float32[16, 2]"
    assert "token_weight" not in explained["shapes"]
    sizes = explained["sizes"]
    assert sizes["trainable_parameters"] == sizes["parameters"]
    assert (sizes["sequences_per_step"], sizes["updates_per_step"]) == (16, 2)
    assert sizes["completion_tokens_per_step_at_most"] == 96
    # Parameters, two moments and the reference, in float32, and little else.
    assert 0 < sizes["state_bytes"] - 4 * 4 * sizes["parameters"] < 100
    (program,) = explained["programs"]
    assert program["program"] == "whole step"
    assert program["flops"] > 2 * sizes["parameters"] * 16
    assert program["argument_bytes"] > sizes["state_bytes"]


def test_explain_prints_json_and_tables(jaxrl, explained, micro_yaml, monkeypatch):
    monkeypatch.setattr("jaxrl_llm.commands.previews.explanation", lambda parts: explained)
    assert jaxrl("explain", str(micro_yaml), "--json") == explained
    text = jaxrl("explain", str(micro_yaml), "--verbose")
    for heading in ("one step, in order", "experience after a step", "sizes", "compiled programs"):
        assert heading in text


def test_a_step_with_a_host_reward_has_two_programs(micro_yaml):
    built = explain_parts(micro_yaml, "rewards=[exact_match]", "losses=[clipped_surrogate]")
    assert [row["where"] for row in explain.stages(built.step.composition) if row["stage"] == "rewards"] == ["host"]
    assert len(built.step.programs) == 2
    experience = explain.trace(built)
    assert experience["rewards"].shape == (16,)
    assert "reference_logprobs" not in experience


# ---- eval and sample ------------------------------------------------------------------------------------------------


def test_eval_measures_the_newest_checkpoint_of_a_run(jaxrl, finished_run):
    found = jaxrl("eval", str(finished_run.directory), "--k", "1,2,4", "--json")
    assert found["checkpoint"] == str(finished_run.directory / "checkpoints" / "18")
    assert (found["split"], found["problems"], found["samples_per_problem"]) == ("test", 12, 4)
    assert {"greedy", "pass@1", "pass@2", "pass@4", "maj@2", "maj@4"} <= found.keys()
    assert found["pass@1"] <= found["pass@2"] <= found["pass@4"]
    # Greedy decoding is deterministic, so it equals the run's own evaluation.
    assert found["greedy"] == finished_run.summary["after"]["greedy"]
    text = jaxrl("eval", str(finished_run.directory / "checkpoints" / "18"), "--k", "1,2,4")
    assert "pass@4" in text
    assert f"{found['pass@4']:.1%}" in text


def test_eval_of_one_checkpoint_spreads_a_few_problems_over_the_split(jaxrl, finished_run, tmp_path):
    checkpoint = finished_run.directory / "checkpoints" / "14"
    arguments = ["--split", "validation", "--problems", "2", "--k", "2", "--samples", "3", "--temperature", "0.5"]
    arguments += ["--by", "level", "--out", str(tmp_path / "out")]
    found = jaxrl("eval", str(checkpoint), *arguments, "--json")
    assert (found["checkpoint"], found["split"]) == (str(checkpoint), "validation")
    assert (found["problems"], found["samples_per_problem"], list(found["by"]["level"])) == (2, 3, ["1", "2"])
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["temperature"] == 0.5


def test_sample_completes_prompts(jaxrl, finished_run):
    arguments = [
        "sample",
        str(finished_run.directory),
        "--prompt",
        "A:1+2",
        "--prompt",
        "A:47+85",
        "-n",
        "2",
        "--greedy",
    ]
    found = jaxrl(*arguments, "--json")
    assert [entry["prompt"] for entry in found] == ["A:1+2", "A:1+2", "A:47+85", "A:47+85"]
    assert found[0] == found[1]
    for entry in found:
        assert 1 <= len(entry["tokens"]) == len(entry["logprobs"]) <= 6
        assert all(logprob <= 0 for logprob in entry["logprobs"])
        assert "<eos>" not in entry["completion"]
        assert entry["truncated"] == (entry["tokens"][-1] != 2)
    assert f"A:47+85 -> {found[2]['completion']}" in jaxrl(*arguments)


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_a_config_that_does_not_exist(refused, micro_yaml):
    assert f"did you mean {micro_yaml}?" in refused("train", str(micro_yaml.parent / "mirco.yaml"))
    assert "does not exist" in refused("explain", "nowhere.yaml")
    assert "Is a directory; give the path of a YAML file" in refused("train", str(micro_yaml.parent))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stps=3", "config key training.stps (value 3) does not exist; did you mean training.steps?"),
        ("training.steps=ten", "config key training.steps is 'ten': input should be a valid integer"),
        ("rewards=[exact_anser]", "rewards names 'exact_anser', which does not exist; did you mean 'exact_answer'?"),
        ("training.sequences_per_microbatch=3", "choose a divisor"),
        ("run_dir=nowhere://bucket/run", "cannot be reached: Protocol not known: nowhere"),
        ("data.directory=taken/data", "taken/data"),
        ("run_dir=taken/run", "taken/run"),
    ],
)
def test_overrides_that_cannot_be(refused, micro_yaml, tmp_path, monkeypatch, override, message):
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    assert message in refused("train", str(micro_yaml), override)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "no config given; write jaxrl train CONFIG.yaml"),
        (["train", "training.steps=3"], "no config given"),
        (["train", "--resume", "{tmp}"], "there is no config.yaml in it; give the directory of a run"),
        (["train", "other.yaml", "--resume", "{run}"], "leave out 'other.yaml' (overrides may follow)"),
        (["eval", "{tmp}"], "{tmp} holds no checkpoint; give a run directory"),
        (["eval", "{run}", "--k", "1,many"], "--k is '1,many'; give whole numbers separated by commas"),
        (["eval", "{run}", "--k", "8", "--samples", "4"], "k is [8], but there are 4 samples a problem"),
        (["eval", "{run}", "--k", "0"], "k is [0]"),
        (["eval", "{run}", "--samples", "0"], "--samples is 0; it must be at least 1"),
        (["eval", "{run}", "--problems", "0"], "--problems is 0; it must be at least 1"),
        (["eval", "{run}", "--problems", "-1"], "--problems is -1; it must be at least 1"),
        (["eval", "{run}", "--problems", "13"], "--problems is 13, but the test split has 12 problems"),
        (["sample", "{tmp}", "--prompt", "A:1+2"], "holds no checkpoint"),
        (["eval", "{run}/checkpoints/999"], "holds no checkpoint of step 999; there are "),
        (["sample", "{run}/checkpoints/999", "--prompt", "A:1+2"], "holds no checkpoint of step 999; there are "),
        (["export", "{run}/checkpoints/999", "{tmp}/out"], "holds no checkpoint of step 999; there are "),
        (["merge", "{run}/checkpoints/999", "{run}", "--out", "{tmp}/out"], "holds no checkpoint of step 999"),
        (["ckpt", "list", "{run}/checkpoints/999"], "holds no checkpoint of step 999; there are "),
        (["sample", "{run}", "--prompt", "A:1+2", "-n", "0"], "--samples is 0; it must be at least 1"),
        (["sample", "{run}", "--prompt", "A:1+2", "--temperature", "-1"], "temperature is -1.0; it must be at least 0"),
        (["sample", "{run}", "--prompt", "A:123456+1"], "does not fit: its prompt has 12 tokens"),
        (["sample", "{run}", "--prompt", "π"], "character 'π' at position 0"),
        (["tasks", "adition"], "there is no task 'adition'; did you mean 'addition'?"),
        (["tasks", "addition", "--level", "99"], "level 99"),
        (["tasks", "addition", "--count", "0"], "count is 0"),
        (["methods", "clipped_surogate"], "did you mean 'clipped_surrogate'?"),
    ],
)
def test_arguments_that_cannot_be(refused, finished_run, tmp_path, arguments, message):
    places = {"tmp": str(tmp_path), "run": str(finished_run.directory)}
    filled = [argument.format(**places) for argument in arguments]
    assert message.format(**places) in refused(*filled)


def test_a_checkpoint_without_its_config_is_refused(refused, finished_run, tmp_path):
    (tmp_path / "checkpoints").symlink_to(finished_run.directory / "checkpoints")
    assert "restoring a checkpoint needs the config.yaml of its run" in refused("eval", str(tmp_path))


@pytest.mark.slow
def test_a_run_may_lie_in_a_directory_of_any_name(refused, finished_run, tmp_path, monkeypatch):
    # Neither an assignment nor a number nor anything else that YAML would read.
    monkeypatch.chdir(tmp_path)
    for name in ("rate=0.1", "7", "null", "a: b"):
        Path(name).symlink_to(finished_run.directory)
        said = refused("train", "--resume", name, "training.learning_rate=0.1")
        assert f"run {name} was started with another config: training.learning_rate (0.003, now 0.1)" in said


def test_the_traceback_is_shown_where_it_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        cli.main(["--traceback", "eval", str(tmp_path)])


@pytest.mark.parametrize("arguments", [[], ["trian"], ["eval"], ["sample"], ["methods", "--room", "kitchen"]])
def test_usage_is_explained(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "usage: jaxrl" in capsys.readouterr().err


def test_every_argument_is_described_and_every_command_has_two_examples():
    (commands,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        for action in command._actions:
            assert action.help, f"{name}: {action.dest}"
        assert (command.epilog or "").count(f"  jaxrl {name}") >= 2, name


@pytest.mark.slow
def test_lists_and_wrong_names_need_no_jax(tmp_path):
    code = (
        "import sys; from jaxrl_llm.cli import main; status = main(sys.argv[1:]); "
        "sys.exit(9 if any(n in sys.modules for n in ('jax', 'tensorflow_datasets')) else status)"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}

    def run(*words):
        done = subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True)
        return done.returncode, done.stderr

    assert [run("tasks")[0], run("methods")[0], run("train", "grpo", "traning.steps=3")[0]] == [9, 9, 9]  # cached
    assert [run("tasks")[0], run("methods")[0], run("methods", "--functions")[0]] == [0, 0, 0]
    assert run("methods", "--stage", "reward")[0] == 0
    first = min(path.stem for path in method_files())
    for words, said in (
        (("tasks", "adition"), "did you mean 'addition'?"),
        (("methods", "grppo"), "did you mean 'grpo'?"),
        (("train", "grppo"), "there is no recipe 'grppo'; did you mean 'grpo'?"),
        (("explain", "configs/dmeo.yaml"), "did you mean configs/demo.yaml?"),
        (("train", "grpo", "traning.steps=3"), "config key traning (value {'steps': 3}) does not exist; did you mean"),
        (("train", "grpo", "rollout.slot=[1"), "config key rollout.slot (value '[1') does not exist; did you mean"),
        (("methods", "--stage", "kitchen"), "no recipe has the stage 'kitchen'"),
        (("plan", "qqqq", "--topology", "cpu:8"), f"there is no recipe 'qqqq'; known: {first}, "),
    ):
        status, err = run(*words)
        assert status == 2, err
        assert said in err


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "demo", "training.steps=3", "--topology", "cpu:8", "--estimate"],
        ["plan", "demo", "--topology", "cpu:8", "training.steps=3", "--estimate"],
        ["plan", "--topology", "cpu:8", "--estimate", "demo", "training.steps=3"],
    ],
)
def test_overrides_stand_anywhere(words, monkeypatch, capsys):
    seen = []

    def planned(config, topology, **_):
        seen.append((config.name, config.training.steps, topology))
        raise ValueError("seen")

    monkeypatch.setattr("jaxrl_llm.commands.previews.plan", planned)
    assert cli.main(words) == 2
    assert seen == [("demo", 3, "cpu:8")]
    with pytest.raises(SystemExit):
        cli.main([*words, "--nowhere"])
    with pytest.raises(SystemExit):
        cli.main(["tasks", "addition", "a=1"])


def test_explain_fits_a_screen(jaxrl, micro_yaml, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = jaxrl("explain", str(micro_yaml))
    assert len(text.splitlines()) <= 24
    assert max(map(len, text.splitlines())) <= 80
    for word in ("clipped_surrogate", "running_mean_baseline", "sequences per step 16", "--verbose"):
        assert word in " ".join(text.split())


def test_the_command_is_light_until_it_needs_jax():
    code = "import sys, jaxrl_llm.cli; sys.exit(any(name in sys.modules for name in ('jax', 'tensorflow_datasets')))"
    root = Path(jaxrl_llm.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_the_version_is_told_and_the_package_runs_as_a_module(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"jaxrl_llm {jaxrl_llm.__version__}\n"
    done = subprocess.run([sys.executable, "-m", "jaxrl_llm", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"jaxrl_llm {jaxrl_llm.__version__}\n"


def test_rooms_are_imported_when_they_are_used():
    code = "import sys, jaxrl_llm; assert 'jax' not in sys.modules; assert 'rewards' in dir(jaxrl_llm); "
    code += "print(jaxrl_llm.rewards.soft_overlong.__name__, jaxrl_llm.losses.Loss.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "soft_overlong Loss\n"
    with pytest.raises(AttributeError, match="no attribute 'kitchen'"):
        _ = jaxrl_llm.kitchen
