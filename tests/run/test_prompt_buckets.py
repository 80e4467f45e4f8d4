"""Training with prompts cut to buckets: the same numbers, and no program that nobody announced."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from jaxrl_llm import cli
from jaxrl_llm.config import ConfigError, parse_config
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.reporting.run_directory import read_records
from jaxrl_llm.run.batches import prompt_batches, prompt_widths
from jaxrl_llm.run.problems import data_sets
from jaxrl_llm.run.prompt_lengths import width_shares
from jaxrl_llm.run.setup import parts

VOCABULARY = CharacterTokenizer().vocabulary_size
# Prompts of level 1 have 7 tokens, those of level 2 have 9.
BUCKETS = "rollout.prompt_buckets=[7]"


@pytest.fixture(scope="module")
def parsed(micro_config):
    return lambda *overrides, **changes: parse_config(micro_config | changes, overrides, vocabulary_size=VOCABULARY)


def test_widths_are_those_of_the_config(parsed):
    assert prompt_widths(parsed()) == (9,)
    assert prompt_widths(parsed("rollout.prompt_buckets=[8, 7, 9]")) == (7, 8, 9)
    long = "rollout.max_prompt_tokens=200"
    assert prompt_widths(parsed(long, "rollout.prompt_buckets=true")) == (64, 128, 200)
    assert prompt_widths(parsed(long, "rollout.prompt_buckets=false")) == (200,)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["rollout.prompt_buckets=[10]"], "rollout.prompt_buckets holds 10, but widths of prompts must lie between 1"),
        (["rollout.prompt_buckets=[0]"], "rollout.prompt_buckets holds 0"),
        (["rollout.prompt_buckets=some"], "rollout.prompt_buckets"),
        (
            [BUCKETS, "rollout.off_policy_steps=1"],
            "a batch that waits in the state, whose prompts have one width (one_width)",
        ),
    ],
)
def test_buckets_that_cannot_be(parsed, overrides, message):
    with pytest.raises(ConfigError) as error:
        parsed(*overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "source",
    [
        "[sampler, {demonstrations: {sequences_per_step: 4}}]",
        "[sampler, {replay: {share: 0.5}}]",
        "[sampler, {solved_answers: {sequences_per_step: 4}}]",
    ],
)
def test_rows_of_another_source_have_prompts_of_one_width(parsed, source):
    with pytest.raises(ValueError, match=r"rows of another source have prompts of one width \(one_width\); remove"):
        parts(parsed(BUCKETS, f"source={source}"))


def test_shares_of_prompts_and_batches_are_those_of_the_data(parsed):
    config = parsed(BUCKETS, "training.prompts_per_step=2", "evaluation.sequences_per_batch=10")
    built = parts(config)
    rows = width_shares(built)
    assert [(row["stage"], row["width"]) for row in rows] == [("training", 7), ("training", 9), ("evaluation", 9)]
    # Both levels are half of the data; a batch of two is narrow where both prompts are.
    assert [row["prompts"] for row in rows] == [0.5, 0.5, 1.0]
    assert [row["batches"] for row in rows] == [0.25, 0.75, 1.0]
    batches = prompt_batches(built, data_sets(config, ["train"])["train"])
    widths = [batches[step].prompts.tokens.shape[1] for step in range(batches.steps_per_epoch)]
    assert set(widths) == {7, 9}


def test_shares_of_data_that_is_not_there_are_not_known(parsed, tmp_path):
    own = {"task": None, "data": {"path": str(tmp_path / "none.jsonl")}}
    rows = width_shares(parts(parsed(**own)))
    assert [(row["prompts"], row["batches"]) for row in rows] == [(None, None)] * 2


def test_shares_of_a_file(parsed, tmp_path):
    lines = [{"prompt": "A:" + "1" * (3 + 2 * (number % 4 == 0)), "answer": str(number)} for number in range(400)]
    lines = [line | {"prompt": line["prompt"] + f"{number:03d}"} for number, line in enumerate(lines)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = {"task": None, "data": {"path": str(tmp_path / "data.jsonl")}}
    config = parsed("rollout.max_prompt_tokens=12", "rollout.prompt_buckets=[10]", **own)
    first, second, _ = width_shares(parts(config))
    assert first["prompts"] == pytest.approx(0.75, abs=0.08)
    assert second["prompts"] == pytest.approx(1 - first["prompts"])
    assert first["batches"] == pytest.approx(first["prompts"] ** 4)


@pytest.fixture(scope="module")
def runs(micro_config, tmp_path_factory):
    """Six steps of two prompts, at one width and in buckets, the fourth being the first narrow one: metrics, output."""
    root = tmp_path_factory.mktemp("buckets")
    changes = {"warm_start": {"steps": 0}, "seed": 7}
    sizes = [
        "training.prompts_per_step=2",
        "training.steps=6",
        "evaluation={problems: 4, samples_per_problem: 1, k: [1]}",
    ]
    (root / "config.yaml").write_text(yaml.safe_dump(micro_config | changes))
    found = {}
    for name, more in (("plain", []), ("cut", [BUCKETS])):
        directory = root / name
        with (root / f"{name}.txt").open("w") as file, pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdout", file)
            assert cli.main(["train", str(root / "config.yaml"), f"run_dir={directory}", *sizes, *more]) == 0
        found[name] = (read_records(directory / "metrics.jsonl"), (root / f"{name}.txt").read_text())
    return found


@pytest.mark.slow
def test_buckets_change_no_number(runs):
    (plain, _), (cut, _) = runs["plain"], runs["cut"]
    assert len(plain) == len(cut) == 6
    for one, other in zip(plain, cut, strict=True):
        assert one.keys() == other.keys()
        for name in ("completion_tokens", "reward", "correct_share"):
            assert one[name] == other[name]
        for name in ("loss", "entropy_per_token", "gradient_norm"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-5)
        assert other["sampler_gap_max"] < 1e-5


@pytest.mark.slow
def test_a_new_width_is_announced_and_no_surprise(runs):
    shown = runs["cut"][1]
    assert shown.count("is the first with prompts of") == 1
    assert "step 4 is the first with prompts of 7 tokens: its program is compiled" in shown
    assert "after warm-up" not in shown
    assert "is the first with" not in runs["plain"][1]
