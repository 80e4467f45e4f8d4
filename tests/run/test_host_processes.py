"""Errors of environments in Python name the log of their processes, as those of functions do."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from jaxrl_llm.rollout.host_environments import EnvironmentFailure, HostEnvironment, host_step
from jaxrl_llm.run import host_processes
from jaxrl_llm.run.host_processes import opened_environment
from jaxrl_llm.run.setup import Parts
from jaxrl_llm.sandbox import Returned


@pytest.mark.parametrize(
    ("executor", "kept"),
    [("process", "traceback and output are"), ("sandbox", "traceback and output are"), ("thread", "traceback is")],
)
def test_an_error_of_an_environment_names_its_log(tmp_path, monkeypatch, executor, kept):
    environment = HostEnvironment(lambda item: 0, lambda state, text: state, 1, 1, 1, (0,), executor=executor)
    given, stops = {}, []

    @contextmanager
    def opened_parts(built, **options):
        given.update(options)
        yield Parts(*[None] * 8, call=lambda name, calls: [Returned(error="raised OSError: no")])

    monkeypatch.setattr(host_processes, "opened_parts", opened_parts)
    config: Any = SimpleNamespace(directory=tmp_path, place="s3://bucket/run")
    built: Any = SimpleNamespace(environment=environment)

    def stop():
        stops.append(1)

    with opened_environment(config, built, stop) as ready, pytest.raises(EnvironmentFailure) as caught:
        host_step(environment, [0], ["a"], ready.call)
    assert given == {"log": tmp_path / "logs" / "environment.log", "stop": stop}
    assert stops
    assert f"(its {kept} in s3://bucket/run/logs/environment.log)" in str(caught.value)
