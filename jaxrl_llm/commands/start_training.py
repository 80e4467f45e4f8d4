"""`jaxrl train`: start a run or go on with one, in one process or several."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
from rich.console import Console

from jaxrl_llm.allocator import give_back_after_compiling
from jaxrl_llm.commands.arguments import loaded_config
from jaxrl_llm.compilation_cache import enable_compilation_cache
from jaxrl_llm.config import ConfigError, as_tree
from jaxrl_llm.parallel import hosts
from jaxrl_llm.parallel.start import initialise, place_of_this_process
from jaxrl_llm.run.train import train


def start_training(options: argparse.Namespace) -> None:
    """Train, and print the summary where JSON was asked for."""
    words = list(options.config)
    if options.resume:
        stored = Path(options.resume) / "config.yaml"
        if not stored.is_file():
            raise ConfigError(f"--resume {options.resume}: there is no config.yaml in it; give the directory of a run")
        if words and "=" not in words[0]:
            raise ConfigError(f"--resume takes the run's own config; leave out {words[0]!r} (overrides may follow)")
        words = [str(stored), *words, f"run_dir={json.dumps(options.resume)}"]
    config = loaded_config(words)

    def decide() -> dict[str, bool]:
        started = (config.directory / "config.yaml").is_file()
        return {"resume": bool(options.resume) or (options.resume_if_started and started)}

    place = place_of_this_process(
        options.coordinator, options.processes, options.process_id, seconds=options.start_timeout
    )
    peers = initialise(place, as_tree(config), seconds=options.start_timeout, decide=decide)
    hosts.join(peers)
    console = Console(stderr=options.json, quiet=peers is not None and not hosts.is_main())
    if peers is None:
        enable_compilation_cache()
    else:  # whose homes may differ: only process 0 writes, and processes that wait for each other must all compile
        console.print(f"{peers.place.processes} processes ({peers.place.how}) are there and agree")
    if jax.default_backend() == "cpu":
        give_back_after_compiling()
    decided = decide() if peers is None else peers.decided
    summary = train(config, resume=decided["resume"], exact=options.exact, grace=options.grace, console=console)
    if options.json and not console.quiet:
        print(json.dumps(summary, indent=2))
