"""The failed update of a step, repeated group by group to find the rows that give numbers that are not finite."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.config import ConfigError, load_config
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.run import checkpoints, integrity, stored_states
from jaxrl_llm.run.nonfinite import blamed_rows, not_finite, read_batch
from jaxrl_llm.run.staged import staged
from jaxrl_llm.training.learn import make_learn


def replayed(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(description of the step, one entry per group) of a batch that a run stored because a number was not finite.

    The losses and their gradient are computed separately for each group, with the policy of the last good checkpoint
    before the step, or with the initial policy if there was none. Scheduled coefficients are replaced by 1. An entry
    has the rows of the group, the metrics that are not finite (terms of the loss first), and the fields of these rows
    that are not finite.

    Raises:
      ValueError: if the file is not such a batch, or is not in the directory of its run.
    """
    path = Path(path)
    described, rows = read_batch(path)
    run = path.resolve().parent.parent
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}/config.yaml is missing: replay the batch in its run directory, RUN/failed/")
    config = load_config(run / "config.yaml", ["mesh=auto"], vocabulary_size=CharacterTokenizer().vocabulary_size)
    stage = next(stage for stage in staged(config) if stage["name"] == described["stage"])
    built, key = stage["parts"], jax.random.key(config.seed)
    params, step = built.initial_params(key), described["checkpoint"]
    folder = run / "checkpoints"
    if step is not None and step in checkpoints.steps(folder):
        if damage := integrity.verified(folder, step, within="networks/policy/params/").damage:
            raise checkpoints.Damaged(folder, step, damage)
        params = stored_states.restore_params(folder, step, params, trained=built.model.trained)
    else:
        step = None
    state = built.step.init(key, params, built.given())
    c = built.step.composition
    factors = [jnp.float32(1.0 if term.coefficient_changes else term.coefficient) for term in c.losses]
    learn = jax.jit(lambda rows: make_learn(c)(state, rows, factors)[1])
    held = {name: np.asarray(value) for name, value in rows.known().items()}
    blamed, entries = blamed_rows(held), []
    for group in np.unique(held["group"]):
        inside = held["group"] == group
        numbers = jax.device_get(learn(replace(rows, weight=jnp.asarray(held["weight"] * inside))))
        own = np.flatnonzero(inside).tolist()
        fields = [name for name, found in blamed.items() if set(found) & set(own)]
        bad = not_finite({name: float(value) for name, value in numbers.items()})
        entries.append({"group": int(group), "rows": own, "not finite": bad, "fields": fields})
    return described | {"policy of checkpoint": step}, entries
