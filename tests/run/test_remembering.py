"""What chooses prompts and completions by what it has seen: runs that are killed in the middle choose the same.

Each selection of the library with memory, each plan that remembers and each store of rows is a stage of a run.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml

from jaxrl_llm import cli
from jaxrl_llm.reporting import RunDirectory
from jaxrl_llm.reporting.metric_table import OF_MACHINE
from jaxrl_llm.reporting.run_directory import read_records

sys.path.insert(0, str(Path(__file__).parents[1] / "selection"))

from every_selection import FORMS, OPTIONS, of_library

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Sharding info not provided")]

WARM, STEPS = 40, 4
ADDITION = {
    "name": "addition",
    "levels": [1, 2],
    "options": {"scratchpad": False},
    **{"train_items": 24, "validation_items": 2, "test_items": 2},
}
# What stages need beside the selection, to be told apart by `level`.
BESIDE: dict[str, dict[str, Any]] = {
    "domain_aware": {"data": {"selection": {"domain_aware": {"domains": "level", "refresh_every_steps": 1}}}},
    "by_entropy": {
        "credit": [
            {"position_entropy": {"token_mean": {"reads": {"token_certainty": "old_entropy"}}}},
            {"advantages": "group_normalized"},
        ]
    },
    "hardest": {"losses": ["clipped_surrogate", {"stored_likelihood": {"coefficient": 1.0}}]},
    "topology_aware": {
        "credit": [{"turn": {"step_borders": {"pattern": "[0-9]"}}}, {"advantages": "group_normalized"}]
    },
}
PLANS: dict[str, dict[str, Any]] = {
    "budget": {"least": 1, "most": 6},
    "annealed_hint": {"pieces": 3},
    "demonstration_prefix": {"branches": 1},
    "early_abort": {"lost": {"mean_entropy_above": {"nats": 0.5}}, "after_tokens": 2},
    "mixed_temperature": {
        "prompt_share": 0.5,
        "temperature": {"temperature_controller": {"target": 0.5, "cold": 0.8, "hot": 1.2}},
    },
    "prioritized": {"first_samples": 2},
    "partial_rollouts": {"tokens_per_step": 4},
}
SOURCES: dict[str, Any] = {
    "replay": ["sampler", {"replay": {"share": 0.5, "batches": 2}}],
    "hardest": ["sampler", {"hardest": {"sequences_per_pass": 4, "capacity": 8}}],
}


def selected(name: str, function: str, options: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "data": {"selection": {function: options}}} | BESIDE.get(name, {})


STAGES: list[dict[str, Any]] = [
    *(selected(name, name, OPTIONS.get(name, {})) for name in of_library()),
    *(selected(name, *form) for name, form in FORMS.items() if "pass_rate" not in form[1]),
    *({"name": name, "rollout": {"plan": {name: options}}} for name, options in PLANS.items()),
    *({"name": name, "source": sources} | BESIDE.get(name, {}) for name, sources in SOURCES.items()),
]
RUNS = [STAGES[first : first + 3] for first in range(0, len(STAGES), 3)]


class Killed(BaseException):
    """The process ends here; nothing of the run is told."""


def train(*arguments: Any, killed_after: int | None = None) -> None:
    """`jaxrl train` in this process, which may end right after the metrics of a step were written."""
    write, out, err = RunDirectory.write_metrics, io.StringIO(), io.StringIO()

    def write_and_die(self: RunDirectory, step: int, metrics: Any) -> None:
        write(self, step, metrics)
        if step == killed_after:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(RunDirectory, "write_metrics", write_and_die)
        if killed_after is None:
            assert cli.main(["train", *map(str, arguments)]) == 0, err.getvalue()
        else:
            with pytest.raises(Killed):
                assert cli.main(["train", *map(str, arguments)]) == 0, err.getvalue()


def arrays(directory: Path, step: int, *parts: str) -> dict[str, np.ndarray]:
    """Arrays of a checkpoint by path: of these parts of the state."""
    with ocp.PyTreeCheckpointer() as reader:
        state = reader.restore(directory / "checkpoints" / str(step) / "state")
    leaves = jax.tree_util.tree_leaves_with_path({name: state[name] for name in parts if name in state})
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def metrics(directory: Path) -> list[dict[str, Any]]:
    """Without what a clock says."""
    lines = read_records(directory / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name.partition("/")[0] not in OF_MACHINE} for line in lines]


@pytest.mark.parametrize("stages", RUNS, ids=["+".join(stage["name"] for stage in stages) for stages in RUNS])
def test_a_run_that_is_killed_in_each_stage_chooses_the_same(stages, tmp_path, data_directory):
    tree = {
        "name": "remembering",
        "task": ADDITION,
        "data": {"directory": data_directory},
        "model": {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1},
        "warm_start": {"steps": WARM, "sequences_per_step": 16, "learning_rate": 0.02, "warmup_steps": 1},
        "rollout": {"samples_per_prompt": 4, "max_prompt_tokens": 9, "max_completion_tokens": 6},
        "rewards": ["exact_answer"],
        "credit": [{"advantages": "group_normalized"}],
        "losses": ["clipped_surrogate"],
        "training": {"steps": STEPS, "prompts_per_step": 4, "learning_rate": 0.003},
        "stages": stages,
        "evaluation": {"problems": 2, "samples_per_problem": 1, "k": [1], "sequences_per_batch": 4},
        "checkpoints": {"every_steps": 1, "keep": 99},
    }
    config, whole, killed = tmp_path / "config.yaml", tmp_path / "whole", tmp_path / "killed"
    config.write_text(yaml.safe_dump(tree))
    train(config, f"run_dir={whole}")
    words: list[Any] = [config, f"run_dir={killed}"]
    for number in range(len(stages)):
        train(*words, killed_after=WARM + number * STEPS + 2)
        words = ["--resume", killed]
    train(*words)
    lines = metrics(whole)
    assert [line["stage"] for line in lines[WARM:]] == [stage["name"] for stage in stages for _ in range(STEPS)]
    assert metrics(killed) == lines
    assert any(0 < line["correct_share"] < 1 for line in lines[WARM:]), "nothing was right or wrong to choose by"
    for number, stage in enumerate(stages):
        begin = WARM + number * STEPS  # where a stage ends, the first state of the next one is stored
        first, expected, found = (
            arrays(run, begin + after, "memory", "store", "networks")
            for run, after in ((whole, 1), (whole, STEPS - 1), (killed, STEPS - 1))
        )
        kept = [name for name in first if "networks" not in name]
        assert any((first[name] != expected[name]).any() for name in kept), f"{stage['name']} remembers nothing"
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=f"{stage['name']}: {name}")
