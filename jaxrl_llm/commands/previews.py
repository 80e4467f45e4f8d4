"""`jaxrl explain` and `jaxrl plan`: the structure and cost of a run before it starts."""

from __future__ import annotations

import argparse
import json
import sys

from rich.console import Console
from rich.text import Text

from jaxrl_llm.commands.arguments import loaded_config
from jaxrl_llm.commands.tables import show
from jaxrl_llm.compilation_cache import enable_compilation_cache
from jaxrl_llm.planning.plan_tables import tables
from jaxrl_llm.planning.run_plan import plan, refusal
from jaxrl_llm.run.explain import abstract_inputs, explanation, sizes, stages, trace
from jaxrl_llm.run.remarks import left_out_warm_start
from jaxrl_llm.run.setup import Parts, parts
from jaxrl_llm.run.staged import last_stage


def show_step(options: argparse.Namespace) -> None:
    """The composed step of a config; with several stages, that of the last one."""
    enable_compilation_cache()
    config = loaded_config(options.config)
    built = parts(last_stage(config))
    if not options.json and (note := left_out_warm_start(config)):
        print(note)
    if not options.json and not options.verbose:
        _show_outline(options, built)
        return
    result = explanation(built)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    title = "one step, in order ([x] is used when something provides it)"
    show(options, result["stages"], title, spare=("where", "needs"))
    show(options, result["hyper_parameters"], "hyper-parameters")
    show(options, [{"field": k, "shape": v} for k, v in result["shapes"].items()], "experience after a step")
    show(options, [{"size": k, "value": f"{v:,}"} for k, v in result["sizes"].items()], "sizes")
    widths = [
        row | {key: "?" if row[key] is None else f"{row[key]:.1%}" for key in ("prompts", "batches")}
        for row in result["widths"]
    ]
    used = [row["stage"] for row in result["widths"] if row["batches"] != 0]
    counts = ", ".join(f"{used.count(stage)} in {stage}" for stage in dict.fromkeys(used))
    show(options, widths, f"widths of prompts, in tokens; programs: {counts}")
    programs = [
        {key: f"{value:,.0f}" if isinstance(value, float | int) else value for key, value in program.items()}
        for program in result["programs"]
    ]
    show(options, programs, "compiled programs (XLA's cost model; a loop body is counted once)")


def _show_outline(options: argparse.Namespace, built: Parts) -> None:
    """A short outline: functions in order, and sizes. Nothing is compiled."""
    traced = trace(built)  # raises for a step that cannot work
    rows = [
        {key: "rows" if (key, row["stage"]) == ("provides", "collect") else row[key] for key in keys}
        for keys in [("stage", "name", "provides", "where")]
        for row in stages(built.step.composition)
    ]
    show(options, rows, "one step, in order", spare=("where",))
    numbers = sizes(built, abstract_inputs(built)[0], traced)
    found = [f"{name.replace('_', ' ')} {value:,}" for name, value in numbers.items()]
    console = Console()
    console.print(Text(f"\n{'; '.join(found)}"))
    console.print(Text("--verbose also shows needs, hyper-parameters, shapes, and the work of programs", style="dim"))


def show_plan(options: argparse.Namespace) -> int:
    """Memory and time of a run on a machine that need not be present; status 1 if it does not fit."""
    console = Console(stderr=True)
    with console.status("planning") as status:
        result = plan(
            loaded_config(options.config),
            options.topology,
            compile_programs=not options.estimate,
            search=options.search,
            report=lambda line: status.update(line),
        )
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        if result["note"]:
            print(f"note: {result['note']}\n")
        for title, rows in tables(result):
            show(
                options,
                rows,
                title,
                spare=("of it", "from", "kernels", "traffic GB", "sent GB", "temporaries", "state"),
            )
        print(f"about {result['step_seconds']:,.1f} s per step at the peak rates of the machine")
    if (problem := refusal(result)) is not None:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0
