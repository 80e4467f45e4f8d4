"""Loggers: every one gets the numbers, a resumed run goes on with its own, and a failing one ends alone."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import sys
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from jaxrl_llm.reporting import RunDirectory, samples_table
from jaxrl_llm.reporting.loggers import logger_openers

CONFIG = {"name": "mine", "seed": 3, "training": {"steps": 2}}


def opened(path, *entries, user_function=None, warn=print, resume_step=None):
    openers = logger_openers(entries, user_function)
    return RunDirectory(path, CONFIG, loggers=openers, warn=warn, resume_step=resume_step)


def test_csv_has_a_column_for_metrics_that_come_late_and_follows_a_resume(tmp_path):
    with opened(tmp_path / "run", ("csv", {})) as run:
        run.write_metrics(1, {"loss": 2.0, "stage": "a"})
        run.write_metrics(2, {"reward": 0.5, "stage": "b"})
    with opened(tmp_path / "run", ("csv", {}), resume_step=1) as run:
        run.write_metrics(2, {"reward": 0.25, "stage": "b"})
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert [(row["step"], row["loss"], row["reward"]) for row in rows] == [("1", "2.0", ""), ("2", "", "0.25")]
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_a_function_and_an_object_of_the_users(tmp_path):
    seen = []

    def each_step(step, numbers):
        seen.append((step, numbers))

    def with_samples(directory, config, resume_step, *, tag):
        log = lambda step, numbers: seen.append((tag, step))  # noqa: E731
        samples = lambda step, samples: seen.append((config["name"], samples))  # noqa: E731
        return SimpleNamespace(log=log, samples=samples)

    functions = {"m:f": each_step, "m:g": with_samples}
    named = (("m:f", {}), ("m:g", {"tag": "x"}))
    with opened(tmp_path / "run", *named, user_function=lambda path, where: functions[path]) as run:
        run.write_metrics(4, {"loss": 2.0, "stage": "a"})
        run.write_samples(4, [{"prompt": "p"}])
    assert seen == [(4, {"loss": 2.0}), ("x", 4), ("mine", [{"prompt": "p"}])]


def test_a_logger_that_fails_ends_alone_and_says_so_once(tmp_path):
    said = []

    def broken(step, numbers):
        raise OSError("no network")

    with opened(tmp_path / "run", ("m:f", {}), user_function=lambda *_: broken, warn=said.append) as run:
        for step in (1, 2):
            run.write_metrics(step, {"loss": 1.0})
    assert said == ["logger m:f failed, and is switched off: OSError: no network"]
    with opened(
        tmp_path / "other", ("m:g", {"tag": 1}), user_function=lambda *_: lambda: None, warn=said.append
    ) as run:
        run.write_metrics(1, {"loss": 1.0})
    assert said[1].startswith("logger m:g cannot be opened, and is switched off: TypeError")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


class Package(SimpleNamespace):
    """Stands for wandb, trackio or mlflow: it writes down how it is called."""

    def __init__(self, name):
        self.__name__, self.calls, self.__spec__ = name, [], importlib.util.spec_from_loader(name, None)

    def __getattr__(self, name):
        def called(*arguments, **named):
            self.calls.append((name, arguments, named))
            return SimpleNamespace(id="r1", info=SimpleNamespace(run_id="r1"))

        return called


@pytest.mark.parametrize(
    ("name", "first", "again"),
    [
        ("wandb", "init", {"id": "r1"}),
        ("trackio", "init", {"resume": "allow"}),
        ("mlflow", "start_run", {"run_id": "r1"}),
    ],
)
def test_trackers_get_the_numbers_and_a_resumed_run_goes_on(tmp_path, monkeypatch, name, first, again):
    for resume_step in (None, 1):
        package = Package(name)
        monkeypatch.setitem(sys.modules, name, package)
        with opened(tmp_path / "run", (name, {}), resume_step=resume_step) as run:
            run.write_metrics(2, {"pass@1": 0.5})
            run.write_samples(2, [{"prompt": "p", "tokens": {}}])
        assert package.calls[0][0] == first
    assert package.calls[0][2].items() >= again.items()
    logged = [call for call in package.calls if call[0] in ("log", "log_metrics")]
    assert logged[0][1:] == (({"pass_at_1" if name == "mlflow" else "pass@1": 0.5},), {"step": 2})
    assert package.calls[-1][0] in ("finish", "end_run")


def kept_by_wandb(place):
    runs = sorted((place / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    names = {file.name.removesuffix(".wandb").split("-")[-1] for file in runs}
    assert len(names) == 1  # both parts are of one run
    return b"".join(file.read_bytes() for file in runs)


def kept_by_mlflow(place):
    mlflow = importlib.import_module("mlflow")
    run = mlflow.MlflowClient().get_run((place / "run" / "mlflow_run").read_text())
    assert run.data.params["training.steps"] == "2"
    return repr(mlflow.MlflowClient().get_metric_history(run.info.run_id, "pass_at_1")).encode() + b"pass@1"


def kept_by_trackio(place):
    return b"".join(file.read_bytes() for file in (place / "trackio").rglob("*") if file.is_file())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "kept"),
    [
        ("wandb", {"mode": "offline"}, kept_by_wandb),
        ("mlflow", {"tracking_uri": "file://{place}/mlruns"}, kept_by_mlflow),
        ("trackio", {}, kept_by_trackio),
    ],
)
def test_the_packages_themselves_work_offline(tmp_path, monkeypatch, name, options, kept):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip(name)
    given = {key: value.format(place=tmp_path) for key, value in options.items()}
    said = []
    for resume_step in (None, 1):
        with opened(tmp_path / "run", (name, given), warn=said.append, resume_step=resume_step) as run:
            run.write_metrics(1 if resume_step is None else 2, {"pass@1": 0.5 + 0.015625 * bool(resume_step)})
            run.write_samples(1, [{"prompt": "p", "reward": 1.0, "rewards": {"exact": 1.0}, "tokens": {"text": ["p"]}}])
    assert said == []
    until = time.monotonic() + 30  # a process of wandb's own may still be writing
    while not all(part in kept(tmp_path) for part in (b"pass@1", b"0.5", b"0.515625")):
        assert time.monotonic() < until, kept(tmp_path)
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("entry", "message"),
    [("tensorbord", "known are tensorboard, csv"), ("wandb", "whose package is missing; install it with pip install")],
)
def test_a_logger_that_cannot_be_is_refused_before_the_run(monkeypatch, entry, message):
    monkeypatch.setattr("jaxrl_llm.reporting.loggers.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        logger_openers([(entry, {})], None)


def test_completions_in_the_terminal_are_text():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(samples_table([{"prompt": "[bold]p", "completion": "c" * 100, "answer": "a", "reward": 0.5}], 7))
    shown = console.export_text()
    assert "[bold]p" in shown
    assert shown.replace("\n", "").count("c") >= 100
    assert json.dumps(0.5) in shown
