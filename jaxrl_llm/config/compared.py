"""What two configs of one run are compared by, when it is resumed: the keys that decide numbers, and placement."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

# Keys of an entry that say how its function is called. They decide only what becomes of a call that fails.
OF_CALLS = frozenset({"deadline_s", "value_on_failure", "executor", "memory_gib"})
# The same of a user's environment: keyword arguments named like these fields of `HostEnvironment`.
OF_ENVIRONMENTS = frozenset(
    {"executor", "workers", "deadline_seconds", "on_failure", "failure_observation", "failure_reward", "failure_ends"}
)
# Keys of a judge that say how its endpoint is reached and what it may cost.
OF_JUDGES = frozenset(
    {
        *("url", "api_key_variable", "timeout_s", "concurrency", "retries", "retry_wait_s"),
        *("cache", "budget", "price_prompt", "price_completion"),
    }
)


def numeric_tree(config: Any) -> dict[str, Any]:
    """The part of a config that decides the numbers, which a checkpoint's config hash covers; see `FREE`.

    How functions, judges and environments are called (`OF_CALLS`, ...) is no part of it.
    """
    tree = _without_calls(_deciding(config))
    tree["stages"] = [_without_calls(stage) if isinstance(stage, Mapping) else stage for stage in tree["stages"]]
    # More steps may be added to a run, unless a schedule depends on their number.
    if config.training.schedule == "constant":
        del tree["training"]["steps"]
    return tree


def placement_tree(value: Any) -> dict[str, Any]:
    """The part of a config that only decides where, and in which parts, numbers are computed; see `PLACEMENT`."""
    found = {}
    for f in fields(value):
        held = getattr(value, f.name)
        if f.metadata.get("placement"):
            found[f.name] = _deciding(asdict(held) if is_dataclass(held) and not isinstance(held, type) else held)
        elif is_dataclass(held) and not isinstance(held, type) and (inner := placement_tree(held)):
            found[f.name] = inner
    return found


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Differences of two trees as `key (old value, now new value)`; a list of another length is one difference."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = [(name, old.get(name), new.get(name)) for name in dict.fromkeys([*old, *new])]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        names = [(str(place), *pair) for place, pair in enumerate(zip(old, new, strict=True))]
    else:
        return [] if old == new else [f"{key} ({old!r}, now {new!r})"]
    return [found for name, a, b in names for found in differences(a, b, f"{key}.{name}" if key else str(name))]


def _deciding(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        kept = [f for f in fields(value) if f.metadata.get("decides_numbers", True)]
        return {f.name: _deciding(getattr(value, f.name)) for f in kept}
    if isinstance(value, Mapping):
        return {str(key): _deciding(one) for key, one in value.items()}
    return [_deciding(one) for one in value] if isinstance(value, list | tuple) else value


def _without_calls(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config or of a stage without those that only say how functions are called."""
    found = dict(tree)
    if isinstance(listed := tree.get("rewards"), list):
        found["rewards"] = [_bare(entry) for entry in listed]
    if isinstance(listed := tree.get("credit"), list):
        found["credit"] = [_bare_values(entry) for entry in listed]
    if "views" in tree:
        found["views"] = _bare_values(tree["views"])
    environment = tree.get("environment")
    if isinstance(environment, Mapping) and "python" in environment:
        found["environment"] = _kept(environment, OF_ENVIRONMENTS)
    return found


def _bare_values(entries: Any) -> Any:
    return {key: _bare(entry) for key, entry in entries.items()} if isinstance(entries, Mapping) else entries


def _bare(entry: Any) -> Any:
    """An entry without the keys of its calls; {name: {}} is the same as the name."""
    if not isinstance(entry, Mapping):
        return entry
    if "python" in entry:
        return _kept(entry, OF_CALLS)
    made = {name: _kept(hyper, OF_CALLS) if isinstance(hyper, Mapping) else hyper for name, hyper in entry.items()}
    return next(iter(made)) if len(made) == 1 and not next(iter(made.values())) else made


def _kept(hyper: Mapping[str, Any], calls: Collection[str]) -> dict[str, Any]:
    kept = {key: value for key, value in hyper.items() if key not in calls}
    judge = kept.get("judge")
    return kept | {"judge": _kept(judge, OF_JUDGES)} if isinstance(judge, Mapping) else kept
