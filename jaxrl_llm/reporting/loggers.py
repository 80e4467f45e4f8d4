"""Loggers: further outputs of a run's metrics beside metrics.jsonl, which is always written.

A logger is an object with `log(step, numbers)` and optionally `samples(step, samples)`, `sync()` and `close()`; a
function of (step, numbers) is a logger too. A function of (directory, config, resume_step) that returns a logger opens
it.

    reporting: {loggers: [tensorboard, csv, {wandb: {project: mine}}, {python: "my_module:my_logger"}]}
"""

from __future__ import annotations

import csv
import importlib.util
import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

Numbers = Mapping[str, float]


class Logger(Protocol):
    """A receiver of a run's metrics."""

    def log(self, step: int, numbers: Numbers) -> None:
        """Log the metrics of a step; steps ascend, but steps after a checkpoint are repeated in a resumed run."""
        ...


# (run directory, config, the step that the run resumes from or None) -> a logger
Opener = Callable[[Path, Mapping[str, Any], int | None], Logger]


class TensorBoard:
    """Event files in `tensorboard/` of the run."""

    def __init__(self, directory: Path, config: Mapping[str, Any], resume_step: int | None):
        # A local import, since it takes a third of a second.
        from tensorboardX import SummaryWriter

        events = directory / "tensorboard"
        # purge_step hides the events after the resumed step. Event files are named by the second and read in the order
        # of their names: the count separates and orders those of a run resumed within a second.
        self._events = SummaryWriter(
            logdir=str(events),
            purge_step=None if resume_step is None else resume_step + 1,
            filename_suffix=f".{len(list(events.glob('*'))):04d}",
        )

    def log(self, step: int, numbers: Numbers) -> None:
        for name, value in numbers.items():
            self._events.add_scalar(name, value, step)

    def sync(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class Csv:
    """metrics.csv of the run: one row per step, one column per metric, updated with every checkpoint."""

    def __init__(self, directory: Path, config: Mapping[str, Any], resume_step: int | None):
        self._directory = directory

    def log(self, step: int, numbers: Numbers) -> None:
        pass  # rewritten each time, since a new metric needs a column in all rows

    def sync(self) -> None:
        lines = (self._directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        names = list(dict.fromkeys(name for record in records for name in record))
        partial = self._directory / ".metrics.csv.partial"
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(records)
        partial.replace(self._directory / "metrics.csv")

    close = sync


class WeightsAndBiases:
    """A run of Weights & Biases, or of trackio, which has the same functions; a resumed run continues its own."""

    def __init__(
        self, package: str, directory: Path, config: Mapping[str, Any], resume_step: int | None, **options: Any
    ):
        self._package = importlib.import_module(package)
        name = config.get("name", directory.name)
        given = {"project": "jaxrl_llm", "name": name, "config": dict(config), "resume": "allow"} | options
        if package == "wandb":
            held = directory / "wandb_run"
            given = {"dir": str(directory), "id": held.read_text() if held.is_file() else None} | given
        run = self._package.init(**given)
        if package == "wandb":
            held.write_text(run.id)

    def log(self, step: int, numbers: Numbers) -> None:
        self._package.log(dict(numbers), step=step)

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        flat = [
            dict(sample) | {f"reward/{n}": value for n, value in sample.get("rewards", {}).items()}
            for sample in samples
        ]
        columns = [name for name in flat[0] if name not in ("tokens", "rewards")] if flat else []
        rows = [[sample.get(name) for name in columns] for sample in flat]
        if self._package.__name__ == "wandb" and rows:
            self._package.log({"samples": self._package.Table(columns=columns, data=rows)}, step=step)

    def close(self) -> None:
        self._package.finish()


class MLflow:
    """A run of MLflow; a resumed run continues its own."""

    def __init__(self, directory: Path, config: Mapping[str, Any], resume_step: int | None, **options: Any):
        self._mlflow = importlib.import_module("mlflow")
        held = directory / "mlflow_run"
        if "tracking_uri" in options:
            place = str(options.pop("tracking_uri"))
            if place.startswith("file:"):  # MLflow needs an explicit permission for file stores
                os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            self._mlflow.set_tracking_uri(place)
        if "experiment" in options:
            self._mlflow.set_experiment(options.pop("experiment"))
        known = {"run_id": held.read_text()} if held.is_file() else {"run_name": config.get("name", directory.name)}
        run = self._mlflow.start_run(**known, **options)
        held.write_text(run.info.run_id)
        if "run_id" not in known:
            flat = {name: str(value)[:500] for name, value in flattened(config).items()}
            self._mlflow.log_params(flat)

    def log(self, step: int, numbers: Numbers) -> None:
        # Names must not contain @.
        self._mlflow.log_metrics({name.replace("@", "_at_"): value for name, value in numbers.items()}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class Guarded:
    """A logger that is switched off when it fails, without ending the run."""

    def __init__(self, name: str, opener: Opener, place: tuple[Any, ...], warn: Callable[[str], Any]):
        self._name, self._warn, self._logger = name, warn, None
        try:
            self._logger = opener(*place)
        except Exception as error:
            warn(f"logger {name} cannot be opened, and is switched off: {type(error).__name__}: {error}")

    def call(self, what: str, *arguments: Any) -> None:
        """Call one of its functions, if it has it."""
        function = getattr(self._logger, what, self._logger if what == "log" and callable(self._logger) else None)
        if function is None:
            return
        try:
            function(*arguments)
        except Exception as error:
            self._logger = None
            self._warn(f"logger {self._name} failed, and is switched off: {type(error).__name__}: {error}")


_SHIPPED: dict[str, tuple[str | None, Callable[..., Any]]] = {
    "tensorboard": (None, TensorBoard),
    "csv": (None, Csv),
    "wandb": ("wandb", lambda *place, **options: WeightsAndBiases("wandb", *place, **options)),
    "trackio": ("trackio", lambda *place, **options: WeightsAndBiases("trackio", *place, **options)),
    "mlflow": ("mlflow", MLflow),
}


def logger_openers(
    entries: Iterable[tuple[str, Mapping[str, Any]]], user_function: Callable[[str, str], Callable[..., Any]]
) -> dict[str, Opener]:
    """Functions that open the loggers of (name or module:function, options), checked before a run starts.

    A user's function with the parameters (step, numbers) is a logger; any other is called with the run directory, the
    config, the step that the run resumes from, and the options.

    Raises:
      ValueError: for an unknown name, or one whose package is missing.
    """
    found: dict[str, Opener] = {}
    for name, options in entries:
        if ":" in name:
            made = user_function(name, "reporting.loggers")
            if list(inspect.signature(made).parameters)[:2] == ["step", "numbers"]:
                found[name] = lambda *place, function=made: function
                continue
        elif name not in _SHIPPED:
            raise ValueError(
                f"reporting.loggers names {name!r}; known are {', '.join(_SHIPPED)}, and python: module:function"
            )
        else:
            package, made = _SHIPPED[name]
            if package is not None and importlib.util.find_spec(package) is None:
                raise ValueError(
                    f"reporting.loggers names {name}, whose package is missing; install it with pip install "
                    f"'jaxrl_llm[{package}]', or leave it out"
                )
        found[name] = lambda *place, function=made, options=options: function(*place, **options)
    return found


def flattened(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping flattened to dotted names."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {
        n: v for key, value in tree.items() for n, v in flattened(value, f"{prefix}.{key}" if prefix else key).items()
    }
