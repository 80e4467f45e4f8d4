"""Progress: lines at a bounded rate without a terminal, a live display with one, and the tables."""

from __future__ import annotations

import re
from io import StringIO

import pytest
from rich.console import Console

from jaxrl_llm.reporting import Progress, results_table, rewards_table, samples_table, units_table

METRICS = {
    "reward": 0.25,
    "correct_share": 0.125,
    "kl_reference_per_token": 0.0123,
    "kl_update": 1.5e-4,
    "entropy_per_token": 1.75,
    "completion_tokens": 10.0,
    "constant_group_share": 0.5,
    "loss": -0.0625,
    "something_else": 3.0,
}


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def plain(width=80):
    return Console(file=StringIO(), force_terminal=False, width=width)


def terminal():
    return Console(file=StringIO(), force_terminal=True, width=100, _environ={"TERM": "xterm-256color"})


def output(console):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())


def run(console, steps, seconds_per_step, **options):
    clock = Clock()
    with Progress(total=steps, stage="grpo", console=console, clock=clock, **options) as progress:
        for step in range(1, steps + 1):
            clock.now += seconds_per_step
            progress.update(step, METRICS)
    return output(console)


def test_a_plain_line_holds_everything():
    last = run(plain(), 10, 2.0, sequences_per_step=64).splitlines()[-1]
    for part in (
        "grpo 10/10",
        "0:00:20 elapsed",
        "0.5 steps/s",
        "320 tokens/s",  # 0.5 steps/s x 64 sequences x 10 tokens
        "ETA 0:00:00",
        "reward 0.250",
        "right 12.5%",
        "KL(ref) 0.0123",
        "KL(update) 1.50e-04",
        "entropy 1.750",
        "length 10.0",
        "no signal 50%",
        "loss -0.0625",
    ):
        assert part in last
    assert "something_else" not in last


@pytest.mark.parametrize(("seconds_per_step", "lines"), [(0.001, 2), (1.0, 11), (30.0, 100)])
def test_lines_are_bounded_by_time(seconds_per_step, lines):
    """100 steps: the first, then one each 10 seconds, and the last."""
    printed = run(plain(), 100, seconds_per_step).splitlines()
    assert len(printed) == lines
    assert printed[0].startswith("grpo 1/100")
    assert printed[-1].startswith("grpo 100/100")


def test_lines_every_n_steps():
    printed = run(plain(), 100, 0.001, every=25).splitlines()
    assert [line.split()[1] for line in printed] == ["1/100", "26/100", "51/100", "76/100", "100/100"]


def test_the_last_update_is_printed_when_a_run_stops_early():
    console, clock = plain(), Clock()

    def stop_early():
        with Progress(total=100, stage="sft", console=console, clock=clock) as progress:
            for step in (1, 2, 3):
                progress.update(step, {"loss": 1.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_early()
    assert [line.split()[1] for line in output(console).splitlines()] == ["1/100", "3/100"]


def test_the_rate_forgets_compilation_and_the_steps_before_resuming():
    clock = Clock()
    progress = Progress(total=1000, stage="grpo", console=plain(), clock=clock)
    assert progress.steps_per_second() is None
    clock.now += 90  # the first step compiles
    progress.update(501, METRICS)
    assert progress.steps_per_second() is None
    for step in range(502, 601):
        clock.now += 0.25
        progress.update(step, METRICS)
    assert progress.steps_per_second() == pytest.approx(4.0)
    for step in range(601, 701):
        clock.now += 2.0
        progress.update(step, METRICS)
    assert progress.steps_per_second() == pytest.approx(0.5)


def test_steps_longer_than_the_window_have_a_rate():
    clock = Clock()
    progress = Progress(total=10, stage="grpo", console=plain(), clock=clock)
    for step in (1, 2, 3):
        clock.now += 300
        progress.update(step, METRICS)
    assert progress.steps_per_second() == pytest.approx(1 / 300)


def test_many_fast_updates_keep_little():
    clock = Clock()
    progress = Progress(total=10**6, stage="grpo", console=plain(), clock=clock)
    for step in range(1, 20_001):
        clock.now += 0.001
        progress.update(step, METRICS)
    assert progress.steps_per_second() == pytest.approx(1000, rel=1e-3)
    assert len(progress._window) < 150


def test_a_terminal_shows_a_live_display_and_messages_above_it():
    console, clock = terminal(), Clock()
    with Progress(total=4, stage="grpo", console=console, clock=clock, sequences_per_step=64) as progress:
        for step in (1, 2):
            clock.now += 1
            progress.update(step, METRICS)
        progress.message("checkpoint [step 2] saved")
    shown = output(console)
    assert "checkpoint [step 2] saved" in shown
    last = shown[shown.rindex("grpo") :]
    for part in (
        "━",
        "2/4",
        "1 steps/s",
        "640 tokens/s",
        "ETA 0:00:02",
        "reward 0.250",
        "no signal 50%",
        "loss -0.0625",
    ):
        assert part in last


def test_a_terminal_without_updates_shows_the_stage():
    console = terminal()
    with Progress(total=4, stage="grpo", console=console):
        pass
    assert "0/4" in output(console)


def test_messages_are_not_wrapped_or_read_as_markup_without_a_terminal():
    console = plain()
    Progress(total=1, stage="s", console=console).message("[bold] " + "x" * 200)
    assert output(console) == "[bold] " + "x" * 200 + "\n"


@pytest.mark.parametrize("bad", [{"total": 0}, {"total": 5, "every": 0}])
def test_bad_steps_are_refused(bad):
    with pytest.raises(ValueError, match="=0 must be at least 1"):
        Progress(stage="s", **bad)


def test_results_are_in_the_order_of_reading():
    console = plain()
    before = {"pass@8": 0.5, "maj@8": 0.25, "pass@1": 0.125, "greedy": 0.25, "pass@16": 0.5, "agreement": 0.3}
    after = {"pass@8": 0.625, "maj@8": 0.25, "pass@1": 0.5, "greedy": 0.2, "cons@16": 0.5, "pass@16": 0.5}
    console.print(results_table(before, after))
    cells = [re.split(r"\s*[│┃]\s*", line.strip("│ ")) for line in output(console).splitlines() if "│" in line]
    assert cells == [
        ["greedy", "25.0%", "20.0%", "-5.0"],
        ["pass@1", "12.5%", "50.0%", "+37.5"],
        ["pass@8", "50.0%", "62.5%", "+12.5"],
        ["pass@16", "50.0%", "50.0%", "0.0"],
        ["maj@8", "25.0%", "25.0%", "0.0"],
        ["cons@16", "–", "50.0%", "–"],
        ["agreement", "30.0%", "–", "–"],
    ]


def test_each_reward_is_shown_at_the_end_of_a_run():
    console = plain()
    numbers = {"first": 0.25, "last": None, "adds_first": -0.125, "adds_last": 0.0}
    console.print(
        rewards_table([{"name": "short", "weight": -0.5} | numbers, {"name": None, "weight": None} | numbers])
    )
    shown = output(console)
    assert re.search(r"short .* -0.5 .* 0.250 .* – .* -0.125 .* 0.000", shown)
    assert re.search(r"sum .* 0.250 .* – ", shown)


def test_samples_are_shown_with_each_of_several_rewards():
    sample = {"prompt": "1+1", "completion": "2", "answer": "2", "reward": 0.5}
    several, one = plain(), plain()
    several.print(samples_table([sample | {"rewards": {"right": 1.0, "short": float("nan")}}], 3))
    assert re.search(r"0.5 │\n.*right 1 │\n.*short – │", output(several))
    one.print(samples_table([sample | {"rewards": {"right": 0.5}}, {**sample, "reward": 0.25}], 3))
    assert "right" not in output(one)


def test_units_say_what_a_config_implies():
    console = plain(width=120)
    console.print(
        units_table(
            [
                ("sequences_per_step", 16384, "prompts_per_step 1024 x samples_per_prompt 16"),
                ("dtype", "bfloat16", "model.dtype"),
                ("learning_rate", 1e-6, "constant"),
            ]
        )
    )
    shown = output(console)
    assert re.search(r"sequences_per_step .* 16,384 .* prompts_per_step 1024 x samples_per_prompt 16", shown)
    assert re.search(r"dtype .* bfloat16", shown)
    assert re.search(r"learning_rate .* 1e-06", shown)


def test_an_evaluation_on_the_validation_split_is_one_line():
    console = plain(200)
    progress = Progress(total=200, stage="grpo", console=console)
    progress.validation(50, {"validation/pass@10": 0.75, "validation/greedy": 0.5, "validation/pass@2": 0.625})
    progress.validation(50, {})
    progress.validation(50, {"validation/problems": 12, "validation/source/a/pass@1": 0.5, "validation/maj@2": 0.6})
    assert console.file.getvalue().splitlines() == [
        "grpo 50/200  validation: greedy 50.0%, pass@2 62.5%, pass@10 75.0%",
        "grpo 50/200  validation: maj@2 60.0%",
    ]
