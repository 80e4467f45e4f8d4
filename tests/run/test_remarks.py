"""What a run says before its steps and about them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from jaxrl_llm.config import StopWhenConfig, TrainingConfig, parse_config
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.run.remarks import Remarks, before_the_steps
from jaxrl_llm.run.staged import WARM_START, earlier_stages


def stage(name, steps=10, warmup=20, **rule):
    parts = SimpleNamespace(config=SimpleNamespace(training=TrainingConfig(steps=steps, warmup_steps=warmup, **rule)))
    return SimpleNamespace(name=name, steps=steps, parts=parts)


STAGES = [stage(WARM_START), stage("reinforcement", steps=20)]


@pytest.fixture
def config(micro_config):
    return lambda *overrides: parse_config(
        micro_config, overrides, vocabulary_size=CharacterTokenizer().vocabulary_size
    )


def test_a_branch_leaves_the_warm_start_out_and_says_so(config):
    branch = config("init_from=runs/demo@3")
    assert branch.warm_start_steps == 0
    assert earlier_stages(branch) == []
    (said,) = before_the_steps(branch, [stage("reinforcement", warmup=0)], {"stage": "reinforcement"})
    assert said.startswith("no warm start: the policy of runs/demo takes its place")
    for whole in (config(), config("init_from={path: runs/demo, step: 3, warm_start: true}")):
        assert whole.warm_start_steps == whole.warm_start.steps > 0
        assert [name for name, _ in earlier_stages(whole)] == [WARM_START]
        assert before_the_steps(whole, [stage("reinforcement", warmup=0)], {"stage": "reinforcement"}) == []
    without = config("init_from=runs/demo@3", "warm_start={steps: 0}")
    assert before_the_steps(without, [stage("reinforcement", warmup=0)], {"stage": "reinforcement"}) == []


@pytest.mark.parametrize(
    ("meta", "keys"),
    [
        ({"stage": WARM_START}, ["warm start: warm_start", "reinforcement: training"]),
        ({"stage": WARM_START, "stage_step": 4}, ["warm start: warm_start", "reinforcement: training"]),
        ({"stage": WARM_START, "stage_step": 10}, ["reinforcement: training"]),
        ({"stage": "reinforcement", "stage_step": 0}, ["reinforcement: training"]),
        ({"stage": "reinforcement", "stage_step": 20}, []),
    ],
)
def test_a_long_warm_up_is_told_with_its_own_key_until_the_stage_is_over(config, meta, keys):
    said = before_the_steps(config(), STAGES, meta)
    assert [each.partition(".warmup_steps is 20, but there are ")[0] for each in said] == keys


def run(tmp_path, before=70):
    return SimpleNamespace(meta={"steps_before": before}, config=SimpleNamespace(directory=tmp_path))


def test_failures_are_told_first_and_when_their_share_doubles_and_their_total_is_kept(tmp_path):
    held, remarks, told = run(tmp_path), Remarks(), []
    for done, count in enumerate([0, 1, 1, 2, 3, 16, 16], 1):
        for text in remarks.on(held, stage("reinforcement"), done, {"failures/slow": count, "failures/other": 0}, 16):
            told.append((done, text))
    assert [done for done, _ in told] == [2, 4, 6]
    assert told[-1][1] == (
        "step 6 of the reinforcement (76 in metrics.jsonl): 'slow' failed for 16 of 16 completions, which got its "
        "value_on_failure (failures/slow in metrics.jsonl)"
    )
    assert held.meta["failures"] == {"slow": 39, "other": 0}
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "slow.log").touch()
    (said,) = Remarks().on(held, stage("reinforcement"), 8, {"failures/slow": 3.0}, None)
    assert "failed for 3 rows" in said
    assert said.endswith(f"their tracebacks are in {tmp_path}/logs/slow.log")


def test_failing_turns_of_an_environment_are_told(tmp_path):
    held, remarks = run(tmp_path), Remarks()
    values = [0.0, 0.1, 0.1, 0.5]
    told = [remarks.on(held, stage("reinforcement"), 1, {"episode/failures_per_episode": one}, 16) for one in values]
    assert [len(each) for each in told] == [0, 1, 0, 1]
    assert "the environment failed in 0.5 turns per episode" in told[-1][0]


def test_remarks_name_the_step_of_the_records_too(tmp_path):
    rule = {"stop_when": StopWhenConfig(metric="reward", patience=1)}
    ending = stage("reinforcement", **rule)
    held, remarks = run(tmp_path), Remarks()
    remarks.on(held, ending, 1, {"reward": 1.0}, 16)
    (said,) = remarks.on(held, ending, 2, {"reward": 0.0}, 16)
    assert "at step 1 of the reinforcement (71 in metrics.jsonl), for 1 value" in said
    for before, where in ((0, "step 1 of the warm start: "), (70, "step 1 of the warm start (71 in metrics.jsonl): ")):
        remarks = Remarks()
        for done in range(-8, 1):
            assert remarks.on(run(tmp_path, before), stage(WARM_START), done, {"sampler_gap_mean": 1.0}, 16) == []
        (alarm,) = remarks.on(run(tmp_path, before), stage(WARM_START), 1, {"sampler_gap_mean": 1.0}, 16)
        assert alarm.startswith(f"alarm at {where}")
