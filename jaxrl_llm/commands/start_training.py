"""`jaxrl train`: start or resume a run, in one process or several."""

from __future__ import annotations

import argparse
import json

import jax
from rich.console import Console
from rich.table import Table

from jaxrl_llm.addresses import is_address
from jaxrl_llm.allocator import give_back_after_compiling
from jaxrl_llm.commands.arguments import loaded_config
from jaxrl_llm.compilation_cache import enable_compilation_cache
from jaxrl_llm.config import ConfigError, as_tree
from jaxrl_llm.parallel import hosts
from jaxrl_llm.parallel.start import initialise, place_of_this_process
from jaxrl_llm.reporting.mirror import Mirror, local_copy
from jaxrl_llm.reporting.shares import own_folder
from jaxrl_llm.run.step_trace import StepTrace
from jaxrl_llm.run.train import train


def start_training(options: argparse.Namespace) -> None:
    """Train, and print the summary with --json."""
    words = list(options.config)
    if options.resume:
        stored = local_copy(options.resume) / "config.yaml"
        if not stored.is_file():
            raise ConfigError(f"--resume {options.resume}: there is no config.yaml in it; give the directory of a run")
        if words and "=" not in words[0]:
            raise ConfigError(f"--resume takes the run's own config; leave out {words[0]!r} (overrides may follow)")
        words = [str(stored), *words, f"run_dir={json.dumps(options.resume)}"]
    config = loaded_config(words)

    def decide() -> dict[str, bool]:
        at_address = is_address(config.place)
        started = Mirror(config.place).started() if at_address else (config.directory / "config.yaml").is_file()
        return {"resume": bool(options.resume) or (options.resume_if_started and started)}

    place = place_of_this_process(
        options.coordinator, options.processes, options.process_id, seconds=options.start_timeout
    )
    peers = initialise(place, as_tree(config), seconds=options.start_timeout, decide=decide)
    hosts.join(peers)
    console = Console(stderr=options.json, quiet=peers is not None and not hosts.is_main())
    if peers is None:
        enable_compilation_cache()
    else:  # without a cache: homes may differ, and processes that wait for each other must all compile
        console.print(f"{peers.place.processes} processes ({peers.place.how}) are connected and agree")
    if jax.default_backend() == "cpu":
        give_back_after_compiling()
    decided = decide() if peers is None else peers.decided
    own = own_folder(config.directory, jax.process_index())
    tracing = None if options.profile is None else StepTrace(options.profile, own / "profile")
    summary = train(
        config,
        resume=decided["resume"],
        exact=options.exact,
        grace=options.grace,
        console=console,
        steps_traced=tracing,
    )
    if tracing is not None and hosts.is_main():
        _show_profile(tracing, console)
    if options.json and not console.quiet:
        print(json.dumps(summary, indent=2))


def _show_profile(tracing: StepTrace, console: Console) -> None:
    """Print the phases of the traced steps with the machine's measured maxima; the trace itself is for xprof."""
    from jaxrl_llm.planning.profiled import profile

    if not tracing.done:
        raise ValueError(
            f"--profile asked for steps {tracing.first} to {tracing.last}, but the run ended before; choose "
            "earlier steps (they count over all stages, as in metrics.jsonl)"
        )
    found = profile(tracing.parts, tracing.directory, tracing.last - tracing.first + 1)
    (tracing.directory / "phases.json").write_text(json.dumps(found, indent=2) + "\n")
    most = found["ceilings"]
    table = Table(
        title=f"one step, from the trace in {tracing.directory} (maximum of this machine: "
        f"{most['flops'] / 1e9:,.0f} GFLOP/s, {most['bytes'] / 1e9:,.0f} GB/s)"
    )
    for heading in ("phase", "seconds", "share", "GFLOP/s", "of the most", "GB/s", "of the most"):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    for row in found["phases"]:
        rates = [
            cell
            for kind in ("flops", "bytes")
            for cell in (f"{row[f'{kind}_per_second'] / 1e9:,.1f}", f"{row[f'{kind}_of_ceiling']:.0%}")
        ]
        table.add_row(row["phase"], f"{row['seconds']:.4f}", f"{row['share']:.0%}", *rates)
    console.print(table)
