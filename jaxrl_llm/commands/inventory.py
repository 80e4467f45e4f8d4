"""`jaxrl tasks` and `jaxrl doctor`: the built-in tasks, and the machine."""

from __future__ import annotations

import argparse
import json
from typing import Any

from jaxrl_llm.commands.tables import show
from jaxrl_llm.shipped import kept, nearest


def show_tasks(options: argparse.Namespace) -> None:
    """The built-in tasks, or examples of one."""
    rows = kept("tasks", _tasks)
    if options.name is None:
        show(options, rows, "tasks; jaxrl tasks NAME shows examples", spare=("options", "reward"))
        return
    if options.name not in (known := [row["name"] for row in rows]):
        raise ValueError(f"there is no task {options.name!r}; {nearest(options.name, known)}")
    found = kept(f"task {options.name} {options.level} {options.count}", lambda: _examples(options))
    show(options, found["rows"], found["title"])


def _tasks() -> list[dict[str, Any]]:
    from jaxrl_llm.data import tasks  # slow import: the list is cached

    return [
        {
            "name": name,
            "levels": f"{task.levels[0]} to {task.levels[-1]}",
            "reward": task.reward,
            "options": dict(task.options),
            "description": task.description,
        }
        for name in tasks.names()
        for task in [tasks.task(name)]
    ]


def _examples(options: argparse.Namespace) -> dict[str, Any]:
    from jaxrl_llm.data import tasks

    task = tasks.task(options.name)
    level = task.levels[0] if options.level is None else options.level
    items = task.generate(level=level, count=options.count)
    rows = [{"prompt": item.body, "reference response": task.response(item)} for item in items]
    return {"rows": rows, "title": f"{task.name}, level {level}: {task.description}"}


def show_machine(options: argparse.Namespace) -> None:
    """Devices, versions, memory and compiled programs of this machine."""
    from jaxrl_llm.reporting.machine_report import machine_report

    report = machine_report()
    if options.json:
        print(json.dumps(report, indent=2))
        return
    for section, values in report.items():
        show(options, [{"what": key, "value": value} for key, value in values.items()], section)
