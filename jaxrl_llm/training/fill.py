"""Fill: the named arrays that rewards, credit and networks add to rows, in order, as parts of a step; coefficients."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxrl_llm.experience import Experience, Method, TrainState
from jaxrl_llm.fields import FIELDS, METRIC, check_shape, kind_of, provided_by
from jaxrl_llm.parallel.rules import constrain_rows
from jaxrl_llm.rewards import weighted_sum
from jaxrl_llm.signatures import call, required
from jaxrl_llm.terms import Fill, Reward
from jaxrl_llm.training.checks import available_before_rewards
from jaxrl_llm.training.composition import Composition
from jaxrl_llm.training.gradients import reward_influence
from jaxrl_llm.training.reading import reading_part, view_part
from jaxrl_llm.training.scores import over_vocabulary, viewed
from jaxrl_llm.training.segments import Traced, Work
from jaxrl_llm.training.written_views import write_part


def reward_parts(c: Composition, key: str) -> list[Any]:
    """Completions -> `reward_components`, their weighted sum `rewards`, and the verifier's verdict `correct`.

    Args:
      c: the composition of the step.
      key: entry of work with the rows: "drawn" within the rounds of a plan, "rows" after them.
    """
    parts: list[Any] = []
    if not c.rewards:
        return parts
    early = _scored_early(c, key)
    parts += _read_views(c, early, key)
    if early:
        parts.append(Traced("networks", partial(_viewed, c, early, key)))
    readings = [term for term in c.rewards if term.on_host]
    if readings:
        outputs = {term.name: (_column(term),) for term in readings}
        parts.append(reading_part("reading", readings, outputs, key, c.samples))
    parts.append(Traced("rewards", partial(_summed, c, key)))
    return parts


def _column(term: Reward) -> str:
    return f"reward/{term.name}"


def _columns(c: Composition, key: str, state: TrainState, work: Work) -> Work:
    """Rows with a column for each traceable reward."""
    rows: Experience = work[key]
    found = {}
    for term in c.rewards:
        if not term.on_host:
            found[_column(term)] = _in_graph(term, rows, state)
    return {key: constrain_rows(rows.filled(**found))}


def _in_graph(term: Reward, rows: Experience, state: TrainState) -> Array:
    reward = jnp.asarray(call(term.function, rows.known() | {"step": state.step}))
    count = rows.tokens.shape[0]
    if reward.shape != (count,):
        raise ValueError(
            f"reward {term.name!r} returned shape {reward.shape} for {count} completions; it must return one number "
            f"for each completion, shape ({count},)"
        )
    return jax.lax.stop_gradient(reward.astype(jnp.float32))


def _summed(c: Composition, key: str, state: TrainState, work: Work) -> Work:
    """Rows with their rewards. Components that do not apply (NaN) are left out of a row's sum; a row without any is
    absent. For conversations `correct` is the environment's verdict, independent of reward shaping."""
    rows: Experience = work[key]
    rows = _columns(c, key, state, work)[key]
    components = jnp.stack([rows[_column(term)] for term in c.rewards], axis=1)
    read = any(term.on_host for term in c.rewards)
    rewards = weighted_sum(components, weights=tuple(term.weight for term in c.rewards))
    rated = ~jnp.isnan(rewards)
    rewards = jnp.where(rated, rewards, 0.0) if read else rewards
    solved = rows.get("solved")
    correct = (components[:, 0] >= 1.0).astype(jnp.float32) if solved is None else solved
    kept = {name: value for name, value in rows.fields.items() if not name.startswith("reward/")}
    rows = replace(rows, fields=kept).filled(reward_components=components, rewards=rewards, correct=correct)
    if read:
        unrated = ((rows.weight > 0) & ~rated).astype(jnp.float32)
        rows = replace(rows, weight=jnp.where(rated, rows.weight, 0.0)).filled(unrated=unrated)
    return {key: rows}


def _scored_early(c: Composition, key: str) -> frozenset[str]:
    """Names of network outputs that rewards read; if the rows are final by then, all names that can be computed."""
    asked = frozenset(required([t.function for t in c.rewards]) & c.wanted)
    if not asked or key == "drawn":
        return asked
    return c.wanted & frozenset(name for name in c.wanted if _ready(c, name, available_before_rewards(c)))


def _ready(c: Composition, name: str, available: Collection[str]) -> bool:
    """Whether the sequence that a name scores can be made from the available names."""
    view = c.view_of(name)
    return not view or c.made_of(view) <= set(available)


def rewarded(c: Composition) -> str:
    """The entry of work whose rows get rewards."""
    return "drawn" if c.rollout is not None and c.plan.reads_rewards else "rows"


def _read_views(c: Composition, names: Collection[str], key: str, read: Collection[str] = ()) -> list[Any]:
    """Parts that make the requested stored sequences (readings and written views) that do not exist yet."""
    parts: list[Any] = []
    for view in (c.views[name] for name in c.views_of(names) if name not in read):
        parts += [view_part(view, key, c.samples)] if view.on_host else []
        parts += [write_part(c, view, key)] if view.written_by else []
    return parts


def _viewed(c: Composition, wanted: Collection[str], key: str, state: TrainState, work: Work) -> Work:
    rows = viewed(
        c, state, work[key], wanted, own_samples=c.keeps_record, rows_are_groups=c.equal_groups and key == "rows"
    )
    return {key: rows}


def credit_parts(c: Composition) -> list[Any]:
    """Rewards -> advantages and all other fields of credit, with the outputs of networks that they need."""
    coming = [name for term in c.credit for name in term.names]
    known = {*available_before_rewards(c), *provided_by("rewards"), *(FIELDS.keys() - set(coming))}
    pending = set(c.wanted)
    parts: list[Any] = []
    read = set(c.views_of(_scored_early(c, rewarded(c)))) if c.rewards else set()

    def score(available: Collection[str]) -> None:
        ready = {name for name in pending if _ready(c, name, available)}
        if ready:
            parts.extend(_read_views(c, ready, "rows", read))
            read.update(c.views_of(ready))
            parts.append(Traced("networks", partial(_viewed, c, frozenset(ready), "rows")))
            pending.difference_update(ready)

    # A view that reads a field filled by an entry is scored after that entry, unless it is requested earlier.
    score(known - set(coming))
    if any(term.over_vocabulary for term in c.credit):
        parts.append(Traced("vocabulary", partial(_by_vocabulary, c)))
    if provided_by("gradients") & required([term.function for term in c.credit]):
        parts.append(Traced("gradients", partial(reward_influence, c)))
    for index, term in enumerate(c.credit):
        if required([term.function]) & pending:
            score(known)
        if term.on_host:
            parts.append(reading_part("reading", [term], {term.name: term.names}, "rows", c.samples))
            parts.append(Traced("credit", partial(_read, term)))
        else:
            parts.append(Traced("credit", partial(_filled, c, index, term)))
        known |= set(term.names)
    score(known)
    parts.append(Traced("credit", _absent_rows))
    return [
        Traced("credit", lambda state, work: {"sampled": _sampled(work["rows"]), "memory": dict(state.memory)}),
        *parts,
    ]


def _sampled(rows: Experience) -> Array:
    """Weight of each row as sampled; 0 for rows that a plan has written only for supervised losses."""
    if "written_mask" not in rows:
        return rows.weight
    return jnp.where((rows["written_mask"] > 0).any(1) & ~(rows.mask > 0).any(1), 0.0, rows.weight)


def _by_vocabulary(c: Composition, state: TrainState, work: Work) -> Work:
    values = over_vocabulary(c.model, state.params, work["rows"], c.credit, temperature=c.temperature)
    return {"vocabulary": values}


def _filled(c: Composition, index: int, term: Fill, state: TrainState, work: Work) -> Work:
    """Rows with the fields of one entry. No gradient flows through them."""
    rows: Experience = work["rows"]
    memory = dict(work["memory"])
    provided = rows.known() | {"step": state.step}
    provided |= {name: work[name] for name in provided_by("gradients") if name in work}
    if term.over_vocabulary:
        value = work["vocabulary"][index]
    elif isinstance(term.function, Method):
        value, memory[term.memory_name] = call(term.function, provided, memory[term.memory_name])
    else:
        value = call(term.function, provided)
    filled = dict(zip(term.names, _values(term, value), strict=True))
    return _kept(term, rows, filled, work) | {"memory": memory}


def _read(term: Fill, state: TrainState, work: Work) -> Work:
    """Rows with the fields of a reading, in the shapes of the table."""
    rows: Experience = work["rows"]
    others = {name: value for name, value in rows.fields.items() if name not in term.names}
    done = _kept(term, replace(rows, fields=others), {name: rows[name] for name in term.names}, work)
    return done | {"rows": constrain_rows(done["rows"])}


def _kept(term: Fill, rows: Experience, filled: dict[str, Any], work: Work) -> Work:
    """Rows with the fields of an entry, and the report with its logged numbers."""
    report = dict(work.get("report", {}))
    for name, array in filled.items():
        if name.startswith(METRIC):
            report[name] = _logged(name, jnp.asarray(array, jnp.float32), term, rows)
        else:
            rows = _with(_rated(rows, array) if name == "rewards" else rows, name, array, term)
    return {"rows": rows, "report": report}


def _rated(rows: Experience, rewards: Array) -> Experience:
    """Rows in which those without any applicable reward (NaN) are absent."""
    return replace(rows, weight=jnp.where(jnp.isnan(rewards), 0.0, rows.weight))


def _logged(name: str, array: Array, term: Fill, rows: Experience) -> Array:
    """The logged number: the array itself, or the mean over rows of positive weight that have a value; NaN for none."""
    if array.shape not in ((), rows.weight.shape):
        raise ValueError(
            f"{name} {term.name!r} returned shape {array.shape}; what is logged is one number, or one of each of the "
            f"{rows.weight.shape[0]} rows"
        )
    if array.ndim == 0:
        return jax.lax.stop_gradient(array)
    known = (rows.weight > 0) & ~jnp.isnan(array)
    return jax.lax.stop_gradient(jnp.where(known, array, 0.0).sum() / known.sum())


def _with(rows: Experience, name: str, array: Any, term: Fill) -> Experience:
    """Rows with a field; for a field of kind "either" a number per row is broadcast to its tokens."""
    array = jax.lax.stop_gradient(jnp.asarray(array))
    check_shape(array, name, term.name, rows)
    if name == "rewards":
        array = jnp.where(jnp.isnan(array), 0.0, array)
    if kind_of(name) == "either" and name in FIELDS and array.ndim == 1:
        array = jnp.where(rows.mask > 0, array[:, None], 0.0)
    return rows.filled(**{name: array})


def _values(term: Fill, value: Any) -> Sequence[Any]:
    """The values of an entry's fields, in order."""
    if isinstance(value, dict):
        if lacking := [name for name in term.names if name not in value]:
            raise ValueError(f"{term.name!r} returned {sorted(value)}, but it must also return {lacking[0]!r}")
        return [value[name] for name in term.names]
    if len(term.names) == 1:
        return [value]
    if not isinstance(value, (tuple, list)) or len(value) != len(term.names):
        raise ValueError(
            f"{term.name!r} fills {', '.join(term.names)}, so it must return {len(term.names)} arrays in that order"
        )
    return value


def _absent_rows(state: TrainState, work: Work) -> Work:
    """Set the advantages of rows of weight 0 to 0."""
    rows: Experience = work["rows"]
    if "advantages" in rows:
        present = (rows.weight > 0)[:, None]
        rows = rows.filled(advantages=jnp.where(present, rows["advantages"], 0.0))
    return {"rows": rows}


# ---- coefficients ---------------------------------------------------------------------------------------------------


def coefficients(
    c: Composition, rows: Experience, metrics: dict[str, Array], memory: dict[str, Any], step: Array
) -> tuple[list[Array], dict[str, Any]]:
    """The coefficient of each loss in this step, and the memories of stateful coefficients."""
    provided = rows.known() | metrics | {"step": step}
    values, memory = [], dict(memory)
    for term in c.losses:
        value = term.coefficient
        if isinstance(value, Method):
            value, memory[term.memory_name] = call(value, provided, memory[term.memory_name])
        elif callable(value):
            value = call(value, provided)
        values.append(jnp.asarray(value, jnp.float32))
    return values, memory
