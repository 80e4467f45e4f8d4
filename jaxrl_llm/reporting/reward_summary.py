"""What each reward was at the start and at the end of training, and what it adds to their sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_llm.reporting.reported_run import ReportedRun

_WEIGHT = "_weight"


def reward_rows(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each reward of the last stage with rewards, and one for their sum; none for one reward of weight 1.

    A row has `name` (None for the sum), `weight`, `first` and `last` (means over the first and the last tenth of the
    stage's steps; None if the reward applied to no completion), and `adds_first` and `adds_last`: the weight times the
    mean times the share of the rewarded completions that the reward applies to.

    Args:
      records: of a metrics.jsonl.

    >>> step = {"reward": 0.4, "reward/a": 0.5, "reward/a_applies": 1.0, "reward/a_weight": 0.8}
    >>> [(row["name"], row["last"], row["adds_last"]) for row in reward_rows([step])]
    [('a', 0.5, 0.4), (None, 0.4, 0.4)]
    """
    weighed = [record for record in records if any(_is_weight(name) for name in record)]
    own = [record for record in weighed if record.get("stage") == weighed[-1].get("stage")]
    tenth = max(1, len(own) // 10)
    parts = {"first": own[:tenth], "last": own[-tenth:]}
    weights = {n[len("reward/") : -len(_WEIGHT)]: w for n, w in (own[-1] if own else {}).items() if _is_weight(n)}
    rows = []
    for name, weight in weights.items():
        key, row = f"reward/{name}", {"name": name, "weight": weight}
        for when, part in parts.items():
            row[when] = _mean([record[key] for record in part if key in record])
            row[f"adds_{when}"] = _mean([weight * record.get(key, 0.0) * _applies(key, record) for record in part])
        rows.append(row)
    if not rows or (len(rows) == 1 and rows[0]["weight"] == 1):
        return []
    whole = {when: _mean([record["reward"] for record in part if "reward" in record]) for when, part in parts.items()}
    total = {"name": None, "weight": None} | whole | {f"adds_{when}": mean for when, mean in whole.items()}
    return [*rows, total]


def reward_tables(runs: Sequence[ReportedRun], groups: Sequence[str]) -> list[tuple[str, int, list[dict[str, Any]]]]:
    """(name, number of runs, `reward_rows`) of each group of seeds, averaged over the seeds."""
    found = []
    for group in dict.fromkeys(groups):
        members = [reward_rows(run.metrics) for run, own in zip(runs, groups, strict=True) if own == group]
        members = [rows for rows in members if rows]
        if members:
            found.append((group, len(members), [_averaged(same) for same in zip(*members, strict=False)]))
    return found


def _applies(reward: str, record: Mapping[str, Any]) -> float:
    """Share of the rewarded completions that a reward applies to."""
    rewarded = 1.0 - record.get("unrated_share", 0.0)
    return record.get(f"{reward}_applies", 1.0) / rewarded if rewarded > 0 else 0.0


def _averaged(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    numbers = {key: _mean([row[key] for row in rows if row[key] is not None]) for key in rows[0] if key != "name"}
    return {"name": rows[0]["name"]} | numbers


def _is_weight(name: str) -> bool:
    return name.startswith("reward/") and name.endswith(_WEIGHT)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
