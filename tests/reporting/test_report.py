"""The report: what is drawn of which metrics, that text stays text, and what cannot be reported."""

from __future__ import annotations

import ast
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

import jaxrl_llm
from jaxrl_llm import cli
from jaxrl_llm.reporting import RunDirectory
from jaxrl_llm.reporting.drawn_curves import kl_curves, pass_curves, series, smoothed, smoothing_of, stages
from jaxrl_llm.reporting.figures import Drawn
from jaxrl_llm.reporting.figures import _curve as curve_of
from jaxrl_llm.reporting.figures import _pass_at_k as draw_pass_at_k
from jaxrl_llm.reporting.file_columns import COMPLETION, FILES
from jaxrl_llm.reporting.machine_report import memory_in_use
from jaxrl_llm.reporting.metric_alarms import alarms
from jaxrl_llm.reporting.metric_table import described, panels
from jaxrl_llm.reporting.report import different_settings, rendered, write_report
from jaxrl_llm.reporting.reported_run import ReportedRun, headline, headlines, read_run
from jaxrl_llm.reporting.reward_summary import reward_rows, reward_tables

NASTY = "</script><script>document.title='taken'</script><!-- <img src=x onerror=\"document.title='taken'\">"


def metrics(step, seed=0):
    wave = math.sin(step / 30 + seed)
    return {
        "stage": "warm start" if step <= 20 else "reinforcement",
        **{f"loss/part {i}": wave * i for i in range(4)},
        **{"reward": math.tanh(step / 30), "correct_share": 0.5, "kl_update": 1e-9, "kl_reference_per_token": 0.01},
        **{"entropy_per_token": 0.3, "completion_tokens": 24.0, "truncated_share": 0.0, "gradient_norm": 1 + wave / 2},
        **{"constant_group_share": 0.2, "clip_share/clipped_surrogate": 0.01, "sampler_gap_max": 1e-5},
        **{"validation/pass@1": 0.4, "learning_rate": 1e-4, "advantage_abs_per_token": 0.4, "ratio_max": 1.1},
        **{f"reward/{name}": wave for name in ("exact", "length")},
        "my_own_number": 3.0,
    }


def sample(i):
    tokens = {"text": ["<t>", "1", "</t>"], "advantage": [0.5, -0.5, 0.0], "logprob": [-0.1, -2.0, -0.3]}
    told = {"reward": 0.5 * (i % 2), "correct": bool(i % 2), "rewards": {"answer_match": float(i % 2), "brevity": -1.0}}
    return {"prompt": f"A:{i}", "completion": NASTY, "truncated": False, "tokens": tokens} | told


def made_run(path, *, steps=60, seed=0, **config):
    """A run directory as training leaves it."""
    with RunDirectory(path, {"name": path.name, "seed": seed, "training": {"learning_rate": 1e-3}, **config}) as run:
        before, after = {"greedy": 0.25, "pass@1": 0.2, "problems": 8}, {"greedy": 0.75, "pass@1": 0.6, "problems": 8}
        run.write_summary({"before": before, "after": after, "seconds": {"set-up": 2.0, "rl": 30.0, "total": 32.0}})
    written(path / "metrics.jsonl", [{"step": step, **metrics(step, seed)} for step in range(1, steps + 1)])
    written(path / "samples.jsonl", [{"step": s, **sample(i)} for s in range(10, steps + 1, 10) for i in range(4)])
    for when, right in (("before", 2), ("after", 6)):
        place = path / "evaluations" / when
        place.mkdir(parents=True)
        written(place / "problems.jsonl", [record(number, number < right) for number in range(8)])
    return path


def written(file, lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def record(number, right):
    said = {"completion": NASTY, "correct": right, "answer": "1", "tokens": 3, "truncated": False, "logprob": -1.0}
    drawn = {"greedy": said, "samples": [said, {**said, "correct": False}]}
    return {"item_id": number, "prompt": f"Q{number}", "answer": "1", "columns": {}} | drawn


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return read_run(made_run(tmp_path_factory.mktemp("runs") / "one"))


def embedded(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_every_metric_has_its_panel_and_none_is_drawn_twice(run):
    drawn = panels(list(series(run)))
    names = [name for panel in drawn for name in panel.metrics]
    assert sorted(names) == sorted(series(run))
    by_title = {panel.title: panel.metrics for panel in drawn}
    assert by_title["Individual rewards"] == ("reward/exact", "reward/length")
    assert by_title["Validation"] == ("validation/pass@1",)
    assert by_title["Advantages and ratios"] == ("advantage_abs_per_token",)
    assert by_title["Advantages and ratios: ratio"] == ("ratio_max",)
    assert {panel.unit for panel in drawn if panel.title == "Advantages and ratios: ratio"} == {"ratio"}
    assert panels(["validation/problems", "validation/samples_per_problem"]) == []  # settings
    assert by_title["Reward"] == ("reward",)
    assert by_title["my_own_number"] == ("my_own_number",)
    assert "Throughput" not in by_title


def test_the_reward_is_drawn_against_the_divergence():
    kl = [{"kl_reference_per_token": 0.1 * step} if step else {} for step in range(3)]
    lines = [one | {"step": step, "reward": step, "correct_share": 1 - step} for step, one in enumerate(kl)]
    found = kl_curves([ReportedRun("one", Path(), {}, lines, [], {})], ["one"])
    assert [curve["name"] for curve in found] == ["one, reward", "one, correct_share"]
    assert found[1] == {"name": "one, correct_share", "step": [1, 2], "kl": [0.1, 0.2], "value": [0, -1], "spacing": 1}
    assert kl_curves([ReportedRun("one", Path(), {}, lines[:2], [], {})], ["one"]) == []
    # Two seeds: the mean of both at each step of the last stage; and a curve for each stage.
    later = [one | {"stage": "rl", "step": one["step"] + 5} for one in lines]
    more = [one | {"reward": 3 * one["reward"]} for one in lines]
    runs = [ReportedRun("a", Path(), {}, lines, [], {}), ReportedRun("b", Path(), {}, more, [], {})]
    assert kl_curves(runs, ["a", "a"])[0] | {"step": []} == {
        **found[0],
        "name": "a, reward",
        "value": [2, 4],
        "step": [],
    }
    names = [curve["name"] for curve in kl_curves([ReportedRun("a", Path(), {}, [*lines, *later], [], {})], ["a"])]
    assert names == ["a, reward, ", "a, reward, rl", "a, correct_share, ", "a, correct_share, rl"]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("loss", "loss"),
        ("loss/dpo", "loss/<loss>"),
        ("reward/a_std", "reward/<reward>_std"),
        ("reward/a", "reward/<reward>"),
        ("seconds", "seconds"),
        ("seconds/judge", "seconds/<function>"),
        ("validation/pass@8", "validation/pass@<k>"),
        ("validation/problems", "validation/<name>"),
        ("my_own_number", None),
    ],
)
def test_a_number_is_described_by_its_own_row_before_a_form_of_names(name, row):
    found = described(name)
    assert (found and found.name) == row


def written_names():
    """Names of the numbers that losses and plans of the package write, read in their source."""
    for room, form in (("losses", "{}/a_loss"), ("rollout/plans", "{}")):
        for path in (Path(jaxrl_llm.__file__).parent / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                target = node.targets[0] if isinstance(node, ast.Assign) else None
                named = ast.unparse(target).split("[")[0] if target is not None else getattr(node, "arg", None)
                if named == "metrics" and isinstance(target, ast.Subscript):
                    yield form.format(target.slice.value)
                elif named in ("metrics", "reports") and isinstance(node, ast.Assign | ast.keyword):
                    for each in ast.walk(node.value):
                        keys = each.keys if isinstance(each, ast.Dict) else getattr(each, "elts", ())
                        strings = [key.value for key in keys if isinstance(key, ast.Constant)]
                        yield from map(form.format, [value for value in strings if isinstance(value, str)])


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    held = [{"bytes_in_use": 2**30, "peak_bytes_in_use": 2**32}, {"bytes_in_use": 2**31, "bytes_limit": 2**33}, None]
    devices = [SimpleNamespace(memory_stats=lambda stats=stats: stats) for stats in held]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    found = memory_in_use()
    assert found.pop("host_memory_gib") > 0.01
    assert found == {"device_memory_gib": 2.0, "device_peak_memory_gib": 4.0}
    drawn = {panel.title: panel.metrics for panel in panels(["host_memory_gib", "device_memory_gib", "loss"])}
    assert drawn["Memory"] == ("host_memory_gib", "device_memory_gib")


def test_what_a_run_writes_is_in_the_table(finished_run):
    names = {*series(read_run(finished_run.directory)), *written_names()}
    assert {"rounds", "clip_share/a_loss", "dual_clip_share/a_loss", "margin/a_loss", "learning_rate"} <= names
    assert not {name for name in names if described(name) is None}, "describe them in reporting/metric_table.py"


def test_what_files_hold_is_in_their_tables(finished_run):
    def keys(name):
        lines = (finished_run.directory / name).read_text().splitlines()
        return {key for line in lines for key in json.loads(line)}

    known = {name: set(columns) for name, columns in FILES.items()}
    assert keys("samples.jsonl") == known["samples.jsonl"]
    assert json.loads((finished_run.directory / "summary.json").read_text()).keys() == known["summary.json"]
    problems = "evaluations/after/problems.jsonl"
    assert keys(problems) == known["problems.jsonl"] - {"episodes"}
    line = json.loads((finished_run.directory / problems).read_text().splitlines()[0])
    drawn = {key for each in (line["greedy"], *line["samples"]) for key in each}
    assert drawn >= {"completion", "correct", "answer", "tokens", "truncated", "logprob"}
    assert drawn <= COMPLETION.keys()


def test_the_page_holds_the_numbers_and_no_text_becomes_markup(run):
    page = rendered([run])
    data = embedded(page)
    assert data["runs"][0]["series"]["reward"][0] == list(range(1, 61))
    assert data["runs"][0]["stages"] == [{"name": "warm start", "step": 1}, {"name": "reinforcement", "step": 21}]
    assert any(each["completion"] == NASTY for each in data["samples"])
    assert NASTY not in page
    assert page.count("<script") == 3
    assert {each["from"] for each in data["samples"]} == {"training", "evaluation before", "evaluation after"}
    assert "http://" not in page.split('id="plotly"')[0]
    assert "https://" not in page.split('id="plotly"')[0]


def test_the_headline_has_paired_intervals(run):
    rows = {row["name"]: row for row in headline(run)}
    assert rows["greedy"]["difference"] == 0.5
    low, high = rows["greedy"]["interval"]
    assert 0 < low < 0.5 < high
    assert rows["pass@1"]["after_interval"][0] < 0.6


def test_long_runs_are_thinned_and_stay_small(tmp_path):
    page = write_report([read_run(made_run(tmp_path / "long", steps=1000))], tmp_path / "page.html")
    assert page.stat().st_size < 5e6
    run = read_run(tmp_path / "long")
    longer = [{"step": step, "x": float(step)} for step in range(10_001)]
    steps, values = series(type(run)(**{**vars(run), "metrics": longer}))["x"]
    assert (len(steps), steps[-1]) == (2000, 10_000)
    assert sum(values) / 2000 == pytest.approx(5000, rel=1e-3)


def test_numbers_that_are_not_finite_leave_a_gap(run):
    spoiled = type(run)(**{**vars(run), "metrics": [{"step": 1, "x": float("nan")}, {"step": 2, "x": 1.0}]})
    assert series(spoiled)["x"] == [[1, 2], [None, 1.0]]
    assert "step 1: x was not finite" in rendered([spoiled])


def test_seeds_share_a_curve_and_what_differs_is_listed(tmp_path):
    paths = [made_run(tmp_path / f"seed{seed}", seed=seed) for seed in range(3)]
    other = made_run(tmp_path / "other", training={"learning_rate": 1e-2})
    runs = [read_run(path) for path in [*paths, other]]
    data = embedded(rendered(runs))
    assert data["groups"] == ["seed0 and 2 more seeds", "other"]
    assert [row[0] for row in different_settings(runs)] == ["name", "seed", "training.learning_rate"]
    assert data["runs"][0]["series"]["reward"][0][:2] == [-19, -18]  # the last stage starts at step 21
    assert [stage["step"] for stage in data["runs"][0]["stages"]] == [-19, 1]
    assert [curve["name"] for curve in data["pass_at_k"]] == [
        f"{group}, {when}" for group in data["groups"] for when in ("before", "after")
    ]
    page = " ".join(rendered(runs).split())
    assert "Seeds are drawn as the mean of their smoothed curves" in page
    assert "Faint lines of single runs are the numbers of each step" in page
    assert "Step 1 is the first of the last stage" in page
    alone = " ".join(rendered(runs[:3]).split())
    assert "Faint lines" not in alone
    rows = {row["name"]: row for row in headlines(runs, ["a", "a", "a", "b"])[0][1]}
    assert rows["greedy"]["interval"] == [0.5, 0.5]


# ---- alarms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("constant_group_share", [0.1] * 90 + [1.0] * 10, "step 100: all rewards of each prompt have been equal"),
        ("truncated_share", [0.6] * 100, "step 10: 60% of the completions are truncated"),
        ("entropy_per_token", [1.0] * 50 + [0.01] * 50, "step 60: the entropy has collapsed from 1.000 to 0.010"),
        ("gradient_norm", [1.0] * 80 + [50.0] + [1.0] * 19, "step 81: the gradient norm jumped to 50"),
        ("reward", [0.8] * 50 + [0.2] * 50, "the reward fell from 0.8 to"),
        ("kl_reference_per_token", [0.1] * 50 + [3.0] * 50, "far from its reference"),
        ("sampler_gap_mean", [0.2] * 100, "step 10: sampler and trainer disagree by 0.2"),
        ("loss", [1.0, math.inf], "step 2: loss was not finite"),
    ],
)
def test_an_alarm_says_what_was_seen(name, values, said):
    (found,) = alarms([{"step": step, name: value} for step, value in enumerate(values, start=1)])
    assert said in found


def test_a_run_that_goes_well_raises_no_alarm():
    assert alarms([{"step": step, **metrics(step)} for step in range(1, 100)]) == []
    assert alarms([]) == []


# ---- the command ----------------------------------------------------------------------------------------------------


def said(capsys, *arguments):
    status = cli.main([str(each) for each in arguments])
    return status, *capsys.readouterr()


def test_a_trained_run_is_reported_with_what_was_set(capsys, finished_run, tmp_path):
    assert (finished_run.directory / "report.html").stat().st_size > 5e5  # written at the end of training
    status, out, err = said(capsys, "report", finished_run.directory, "--out", tmp_path / "page.html")
    assert (status, err) == (0, "")
    assert str(tmp_path / "page.html") in out
    page = (tmp_path / "page.html").read_text()
    assert "training.learning_rate" in page
    tokens = [each["tokens"] for each in embedded(page)["samples"] if each["from"] == "training"]
    assert all(len(one["text"]) == len(one["logprob"]) == len(one["advantage"]) for one in tokens)


def test_what_cannot_be_reported_says_why(capsys, tmp_path, monkeypatch):
    assert "is not a run: it has no config.yaml" in said(capsys, "report", tmp_path)[2]
    run = made_run(tmp_path / "run")
    assert "cannot be written" in said(capsys, "report", run, "--out", tmp_path / "absent" / "page.html")[2]
    with RunDirectory(tmp_path / "empty", {"name": "empty"}):
        pass
    assert "has no metrics yet" in said(capsys, "report", run, tmp_path / "empty")[2]
    assert "no figures can be written" in said(capsys, "report", run, "--figures", run / "config.yaml" / "x")[2]
    for package, asked in (("jinja2", ()), ("matplotlib.figure", ("--figures", tmp_path / "figures"))):
        monkeypatch.setitem(sys.modules, package, None)
        status, _, err = said(capsys, "report", run, *asked)
        assert status == 2
        assert "install it with pip install 'jaxrl_llm[" in err
    assert not (tmp_path / "figures").exists()


# ---- figures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_every_chart_is_a_file_for_papers(capsys, tmp_path, form, start):
    paths = [made_run(tmp_path / f"seed{seed}", seed=seed) for seed in range(2 if form == "svg" else 1)]
    asked = [*paths, "--figures", tmp_path / "figures", "--format", form]
    others = {"sampler_gap_max": 1e-6, "reward/exact": 1.0, "reward/length": 0.5} if form == "svg" else {}
    for path in paths:
        written(path / "metrics.jsonl", [{"step": step, "loss": 0.5, **others} for step in range(1, 30)])
    status, out, err = said(capsys, "report", *asked)
    assert (status, err) == (0, "")
    files = [Path(line) for line in out.split()]
    assert sorted(files) == sorted((tmp_path / "figures").iterdir())
    assert all(file.read_bytes().startswith(start) for file in files)
    if form == "svg":
        named = ["individual_rewards", "loss", "sampler_and_trainer", "pass_k", "time_by_part"]
        assert [file.stem for file in files] == named
        assert ">reward/exact</text>" in files[0].read_text()


def test_a_smoothed_curve_starts_unbiased_and_keeps_gaps():
    values = smoothed([1, 2, 3, 4], [1.0, None, 3.0, 3.0], 0.5)
    assert values[0] == 1.0
    assert math.isnan(values[1])
    assert values[2] == pytest.approx((0.25 * 1.0 + 3.0) / 1.25)  # the gap counts as a step
    assert smoothed([0, 20], [1.0, 5.0])[1] == pytest.approx(5.0, abs=0.05)  # measured rarely
    assert smoothed([0, 20], [1.0, 5.0], 0.5, spacing=20)[1] == pytest.approx(11 / 3)
    assert list(smoothed([1, 2], [1.0, 5.0], 0.0)) == [1.0, 5.0]


def test_what_is_set_and_not_measured_is_not_smoothed():
    exact = ("learning_rate", "coefficient/kl", "parameter_norm", "device_memory_gib")
    assert [smoothing_of(name) for name in (*exact, "reward", "my_own_number")] == [0, 0, 0, 0, 0.8, 0.8]


STYLE = {"colour": "k", "dash": "-", "label": "loss"}


class Axes:
    """Records the curves drawn on it."""

    def __init__(self):
        self.lines, self.bands = [], 0

    def plot(self, x, y, *form, **style):
        self.lines.append((list(x), list(y), style.get("label")))

    def fill_between(self, *curve, **style):
        self.bands += 1


def test_a_curve_is_smoothed_and_drawn_within_each_stage():
    one = Drawn("one", {"loss": [[1, 2, 3, 4], [10.0, 10.0, 1.0, 1.0]]}, [1, 3], 1.0)
    axes = Axes()
    curve_of(axes, "loss", [one], **STYLE)
    smooth = [line for line in axes.lines if line[2] is not None]
    assert smooth == [([1, 2], [10.0, 10.0], "loss"), ([3, 4], [1.0, 1.0], "")]
    assert len(axes.lines) == 4  # and the raw numbers of both
    seeds = Axes()
    curve_of(seeds, "loss", [one, one], **STYLE)
    assert (len(seeds.lines), seeds.bands) == (2, 2)
    settings = Axes()
    curve_of(settings, "learning_rate", [one._replace(series={"learning_rate": one.series["loss"]})], **STYLE)
    assert len(settings.lines) == 2  # no raw numbers beneath


def test_long_curves_are_not_averaged_over_the_border_of_stages():
    lines = [{"step": step, "stage": "a" if step <= 1001 else "b", "x": float(step > 1001)} for step in range(1, 5001)]
    run = ReportedRun("one", Path(), {}, lines, [], {})
    assert stages(run, from_last_stage=True) == [{"name": "a", "step": -1000}, {"name": "b", "step": 1}]
    assert set(series(run)["x"][1]) == {0.0, 1.0}


def test_shares_that_are_all_0_have_the_whole_axis():
    figure = pytest.importorskip("matplotlib.figure").Figure
    for mean, top in (([0.0, 0.0], 1.0), ([0.25, 0.5], None)):
        axes = figure().add_subplot()
        draw_pass_at_k(axes, [{"name": "a", "k": [1, 2], "mean": mean, "low": mean, "high": mean}])
        assert axes.get_ylim()[0] >= 0
        assert top is None or axes.get_ylim() == (0, top)


def test_the_pass_curves_of_seeds_are_averaged(run):
    worse = type(run)(
        **{**vars(run), "evaluations": {"before": run.evaluations["before"], "after": run.evaluations["before"]}}
    )
    alone, together = pass_curves([run], ["a"])[1], pass_curves([run, worse], ["a", "a"])
    assert [curve["name"] for curve in together] == ["a, before", "a, after"]
    assert together[1]["mean"] == pytest.approx([(0.375 + 0.125) / 2, (0.75 + 0.25) / 2])
    assert together[1]["high"] == alone["mean"] == pytest.approx([0.375, 0.75])
    assert together[1]["low"] == pytest.approx([0.125, 0.25])
    assert alone["low"][0] < 0.375 < alone["high"][0]


def test_each_reward_is_shown_with_what_it_adds():
    def line(step, right):
        own = {"reward/right": right, "reward/right_applies": 0.5, "reward/right_weight": 2.0}
        other = {"reward/short_applies": 0.0, "reward/short_weight": -1.0}  # its mean is not defined
        unrated = 0.5 * (step == 20)
        own["reward/right_applies"] *= 1 - unrated
        return {"step": step, "stage": "rl", "reward": right, "unrated_share": unrated} | own | other

    lines = [{"step": 0, "stage": "warm start", "loss": 1.0}, *(line(step, step / 20) for step in range(1, 21))]
    first, last = 0.075, 0.975
    shared = {"first": pytest.approx(first), "last": pytest.approx(last)}
    adds = {"adds_first": pytest.approx(first), "adds_last": pytest.approx(last)}
    rows = reward_rows(lines)
    assert rows == [
        {"name": "right", "weight": 2.0} | shared | adds,
        {"name": "short", "weight": -1.0, "first": None, "last": None, "adds_first": 0, "adds_last": 0},
        {"name": None, "weight": None} | shared | adds,
    ]
    assert reward_rows(lines[:1]) == reward_rows([]) == []
    run = ReportedRun("one", Path(), {}, lines, [], {})
    assert reward_tables([run, run], ["a", "a"]) == [("a", 2, rows)]
    assert '<th scope="row">short</th><td>-1</td><td>–</td>' in rendered([run])
    assert not [name for panel in panels(list(series(run))) for name in panel.metrics if name.endswith("_weight")]
