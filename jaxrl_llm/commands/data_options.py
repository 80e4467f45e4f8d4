"""Options of `jaxrl init` and `jaxrl data`; imported with the command line, so it imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable

Command = Callable[..., argparse.ArgumentParser]


def add_data(command: Command) -> None:
    starter = command(
        "init", "starter:write_starter", "Write a commented config for a file of problems.", json_output=False
    )
    starter.add_argument("data", metavar="FILE", help="problems: JSONL, CSV, Parquet, a directory, tfds: or hf:")
    starter.add_argument("--model", metavar="DIR", help="the model's directory, or its name on the hub")
    starter.add_argument("--out", default="mine.yaml", metavar="YAML", help="output file (default mine.yaml)")

    data = command(
        "data",
        "data_preview:show_data",
        "Show the problems of a config: prompts as the policy reads them, lengths, duplicates; and what a run would "
        "refuse, with status 2.",
    )
    data.add_argument("config", nargs="+", metavar="CONFIG [section.key=value ...]", help="as for train")
    data.add_argument(
        "--split", choices=["train", "validation", "test"], default="train", help="split of the prompts to show"
    )
    data.add_argument("--count", type=int, default=2, metavar="N", help="number of prompts to show (default 2)")
