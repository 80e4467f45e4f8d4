"""`jaxrl tasks` and `jaxrl doctor`: what there is to train on, and to train with."""

from __future__ import annotations

import argparse
import json

from jaxrl_llm.commands.tables import show
from jaxrl_llm.data import tasks
from jaxrl_llm.reporting.machine_report import machine_report


def show_tasks(options: argparse.Namespace) -> None:
    """The built-in tasks, or examples of one."""
    if options.name is None:
        rows = []
        for name in tasks.names():
            task = tasks.task(name)
            rows.append(
                {
                    "name": name,
                    "levels": f"{task.levels[0]} to {task.levels[-1]}",
                    "reward": task.reward,
                    "options": dict(task.options),
                    "description": task.description,
                }
            )
        show(options, rows, "tasks")
        return
    task = tasks.task(options.name)
    level = task.levels[0] if options.level is None else options.level
    rows = [
        {"prompt": item.body, "reference response": task.response(item)}
        for item in task.generate(level=level, count=options.count)
    ]
    show(options, rows, f"{task.name}, level {level}: {task.description}")


def show_machine(options: argparse.Namespace) -> None:
    """Devices, versions, memory and compiled programs of this machine."""
    report = machine_report()
    if options.json:
        print(json.dumps(report, indent=2))
        return
    for section, values in report.items():
        show(options, [{"what": key, "value": value} for key, value in values.items()], section)
