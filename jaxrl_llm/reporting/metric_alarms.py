"""Alarms on the metrics of a run, each printed once while its condition holds.

Alarms do not end a run. They compare the mean of the last `WINDOW` steps with that of the first ones. A run prints
them, and its report computes the same alarms from its records.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WINDOW = 10
CONSTANT_STEPS = 20


@dataclass
class Alarms:
    """State of the alarms of one stage.

    Attributes:
      first: mean of each metric over its first `WINDOW` steps.
      last: each metric in its last `WINDOW` steps.
      probes: (mean reward, pass@1 on the validation split) at each evaluation.
      peak: the highest mean of `correct_share` over `WINDOW` steps, with the mean reward of the same steps.
      still: number of consecutive steps in which each reward was the same for all completions, or applied to none.
      ringing: names of printed alarms whose condition still holds.
    """

    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, deque[float]] = field(default_factory=dict)
    probes: list[tuple[float, float]] = field(default_factory=list)
    peak: tuple[float, float] | None = None
    still: dict[str, int] = field(default_factory=dict)
    ringing: set[str] = field(default_factory=set)

    def new(self, metrics: Mapping[str, float]) -> list[str]:
        """Messages of the alarms that start with this step's metrics."""
        for name, value in metrics.items():
            if not math.isfinite(value):
                continue
            window = self.last.setdefault(name, deque(maxlen=WINDOW))
            window.append(value)
            if len(window) == WINDOW and name not in self.first:
                self.first[name] = sum(window) / WINDOW
        for name in _rewards_in(metrics):
            gives_signal = metrics.get(f"reward/{name}_applies", 1) > 0 and metrics.get(f"reward/{name}_std", 1) > 0
            self.still[name] = 0 if gives_signal else self.still.get(name, 0) + 1
        held = self.now("correct_share")
        if held is not None and (self.peak is None or held > self.peak[0]):
            self.peak = held, self.now("reward") or 0.0
        if "validation/pass@1" in metrics and "reward" in self.last:
            window = self.last["reward"]
            self.probes.append((sum(window) / len(window), metrics["validation/pass@1"]))
        holding = {name: text for name, alarm in ALARMS.items() if (text := alarm(self)) is not None}
        fresh = [text for name, text in holding.items() if name not in self.ringing]
        self.ringing = set(holding)
        return fresh

    def now(self, name: str) -> float | None:
        """Mean of the last `WINDOW` steps; None if there are fewer."""
        window = self.last.get(name, ())
        return sum(window) / WINDOW if len(window) == WINDOW else None


def _rewards_in(metrics: Mapping[str, float]) -> dict[str, None]:
    """Names of the rewards whose spread or applicability is among the metrics."""
    own = (name.removeprefix("reward/") for name in metrics if name.startswith("reward/"))
    return dict.fromkeys(name.rpartition("_")[0] for name in own if name.endswith(("_std", "_applies")))


def _divergence(seen: Alarms) -> str | None:
    now = seen.now("kl_reference_per_token")
    if now is None or now < 0.5:
        return None
    return f"the policy is far from its reference: kl_reference_per_token is {now:.2f} nats; raise the KL coefficient"


def _entropy(seen: Alarms) -> str | None:
    now, then = seen.now("entropy_per_token"), seen.first.get("entropy_per_token", 0.0)
    if now is None or now > 0.1 * then or then < 0.05:
        return None
    return f"the entropy has collapsed from {then:.3f} to {now:.3f} nats per token: samples of a prompt will be alike"


def _length(seen: Alarms) -> str | None:
    now, then = seen.now("completion_tokens"), seen.first.get("completion_tokens")
    if now is None or not then or now < 3 * then:
        return None
    return f"completions have grown from {then:.0f} to {now:.0f} tokens"


def _cut(seen: Alarms) -> str | None:
    """Names the limits: of an episode there are two, of which `truncated_share` is the sum."""
    cut, turns = seen.now("truncated_share"), seen.now("episode/stopped_by_turn_limit")
    if cut is None or cut <= 0.5:
        return None
    if turns is None:
        return f"{cut:.0%} of the completions are truncated at max_completion_tokens"
    tokens = seen.now("episode/stopped_by_token_limit") or 0.0
    limits = {"the environment's limit on turns": turns, "max_completion_tokens": tokens}
    said = " and ".join(f"{share:.0%} at {limit}" for limit, share in limits.items() if round(share, 2))
    return f"most episodes are cut off before they are over: {said}"


def _gap(seen: Alarms) -> str | None:
    now = seen.now("sampler_gap_mean")
    if now is None or now < 0.05:
        return None
    return f"sampler and trainer disagree by {now:.2g} nats per token (sampler_gap_mean): the update is off-policy"


def _constant(seen: Alarms) -> str | None:
    now = seen.now("constant_group_share")
    if now is None or now < 0.999:
        return None
    return "all rewards of each prompt have been equal in the last steps: they give no gradient"


def _silent(seen: Alarms) -> str | None:
    names = [name for name, steps in seen.still.items() if steps >= CONSTANT_STEPS]
    if not names:
        return None
    return (
        f"a reward has been the same for every completion of {CONSTANT_STEPS} steps, or applied to none: "
        f"{', '.join(names)}; it gives no signal"
    )


def _verifier(seen: Alarms) -> str | None:
    reward, held = seen.now("reward"), seen.now("correct_share")
    if reward is None or held is None or seen.peak is None:
        return None
    peak, then = seen.peak
    if held > peak - 0.05 or reward <= then + 0.02 * max(abs(then), 0.05):
        return None
    return (
        f"the reward rises ({then:.3f} to {reward:.3f}) while correct_share (completions accepted by the first "
        "reward) has fallen "
        f"({peak:.1%} to {held:.1%}): the policy may be exploiting the other rewards"
    )


def _hacking(seen: Alarms) -> str | None:
    if len(seen.probes) < 3:
        return None
    (reward, held), *_, (later, held_later) = seen.probes[-3:]
    falls = all(after[1] < before[1] for before, after in zip(seen.probes[-3:], seen.probes[-2:], strict=False))
    if not falls or later <= reward + 0.02 * abs(reward):
        return None
    return (
        f"the reward rises ({reward:.3f} to {later:.3f}) while pass@1 on the validation split falls ({held:.1%} to "
        f"{held_later:.1%}): the policy may be exploiting the reward"
    )


def _fall(seen: Alarms) -> str | None:
    now, then = seen.now("reward"), seen.first.get("reward", 0.0)
    if now is None or now >= then - max(0.05, 0.1 * abs(then)):
        return None
    return f"the reward fell from {then:.3g} to {now:.3g}: lower the learning rate"


def _jump(seen: Alarms) -> str | None:
    *before, now = seen.last.get("gradient_norm", (0.0,))
    if len(before) < WINDOW - 1 or now <= 10 * max(typical := statistics.median(before), 1e-12):
        return None
    return f"the gradient norm jumped to {now:.3g}, from a median of {typical:.3g}: lower training.max_gradient_norm"


ALARMS: dict[str, Callable[[Alarms], str | None]] = {
    "divergence": _divergence,
    "entropy": _entropy,
    "length": _length,
    "cut completions": _cut,
    "log-probability gap": _gap,
    "constant reward": _constant,
    "silent reward": _silent,
    "verifier": _verifier,
    "reward hacking": _hacking,
    "reward": _fall,
    "gradient": _jump,
}


def alarms(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Alarms and non-finite numbers of the last stage, from the records of a metrics.jsonl."""
    seen, found, broken = Alarms(), [], set()
    stage = records[-1].get("stage") if records else None
    for record in records:
        if record.get("stage") != stage:
            continue
        numbers = {n: v for n, v in record.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        bad = [name for name, value in numbers.items() if not math.isfinite(value) and name not in broken]
        broken |= set(bad)
        found += [f"step {record['step']}: {name} was not finite" for name in bad]
        found += [f"step {record['step']}: {text}" for text in seen.new(numbers)]
    return found
