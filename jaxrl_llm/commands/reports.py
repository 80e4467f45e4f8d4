"""`jaxrl report`: an HTML report of runs, or its charts as files."""

from __future__ import annotations

import argparse
import json
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from jaxrl_llm.config import load_config
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.reporting.figures import write_figures
from jaxrl_llm.reporting.mirror import local_copy
from jaxrl_llm.reporting.report import write_report
from jaxrl_llm.reporting.reported_run import read_run


def show_report_file(options: argparse.Namespace) -> None:
    """Write the report or its charts, and print the paths."""
    paths = [local_copy(path) for path in options.runs]
    names = [path.name or str(path) for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    runs = [read_run(path, name=name, changed=changed_settings(path)) for path, name in zip(paths, names, strict=True)]
    if options.figures:
        files = [str(file) for file in write_figures(runs, options.figures, options.format)]
        print(json.dumps({"figures": files}) if options.json else "\n".join(files))
        return
    out = options.out or (paths[0] / "report.html" if len(paths) == 1 else Path("report.html"))
    written = write_report(runs, out)
    size = written.stat().st_size
    print(json.dumps({"report": str(written), "bytes": size}) if options.json else f"{written} ({size / 1e6:.1f} MB)")


def changed_settings(path: Path) -> dict[str, Any]:
    """Settings of a run's config that differ from the defaults, by dotted name; empty if the config is unreadable."""
    try:
        config = load_config(path / "config.yaml", vocabulary_size=CharacterTokenizer().vocabulary_size)
    except ValueError:
        return {}
    return _changed(config, "")


def _changed(section: Any, prefix: str) -> dict[str, Any]:
    found = {}
    for each in fields(section):
        value, name = getattr(section, each.name), prefix + each.name
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        if is_dataclass(value) and not isinstance(value, type):
            found |= _changed(value, f"{name}.")
        elif value != default:
            found[name] = value
    return found
