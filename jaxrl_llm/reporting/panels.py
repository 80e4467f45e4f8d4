"""The charts of a report: which metrics belong together, and how they are read."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import NamedTuple


class Panel(NamedTuple):
    """One chart: metrics that belong together.

    Attributes:
      title: heading.
      metrics: patterns of their names.
      text: how it is read.
      log: the axis of values is logarithmic.
    """

    title: str
    metrics: tuple[str, ...]
    text: str
    log: bool = False


PANELS = (
    Panel("Reward", ("reward",), "Mean reward of a completion, what training maximises."),
    Panel("Right answers", ("correct_share", "pass@1*"), "Share of sampled completions that the first reward accepts."),
    Panel("Rewards apart", ("reward/*", "rewards/*"), "Each reward function by itself, before weights."),
    Panel("Validation", ("validation/*@*", "validation/greedy"), "Accuracy on problems that are not trained on."),
    Panel("KL divergence", ("kl_reference*", "kl_*"), "From the reference, and of one update, in nats."),
    Panel("Entropy", ("entropy*",), "Nats a token; near 0 all samples of a prompt are the same."),
    Panel("Length", ("completion_tokens*",), "Tokens of a completion."),
    Panel("Cut off", ("truncated_share*",), "Share of completions that reached the length limit."),
    Panel("Groups without signal", ("constant_group_share*", "kept_share*"), "Groups of equal rewards teach nothing."),
    Panel("Clipped", ("clip_share*",), "Share of tokens whose gradient is clipped away."),
    Panel("Gradient norm", ("gradient_norm*",), "Before clipping."),
    Panel("Loss", ("loss", "loss/*"), "What is minimised, and its terms; of a policy loss the value says little."),
    Panel("Advantages and ratios", ("advantage*", "ratio*"), "Size of the advantages; largest importance ratio."),
    Panel("Sampler and trainer", ("sampler_gap*",), "Difference of their log-probabilities of the same token.", True),
    Panel("Learning rate", ("learning_rate*",), "Of the optimiser."),
    Panel("Seconds", ("seconds*", "*_seconds"), "Of a step, by part."),
    Panel("Throughput", ("tokens_per_second*", "*per_second"), "Tokens a second."),
    Panel("Memory", ("*memory*", "*bytes*"), "Of a device."),
)


def panels(names: Sequence[str]) -> list[Panel]:
    """The charts of metrics that there are: each in the first panel that names it, the rest in panels of their own."""
    left, found = list(names), []
    for panel in PANELS:
        own = [name for pattern in panel.metrics for name in left if fnmatch.fnmatchcase(name, pattern)]
        own = list(dict.fromkeys(own))
        if own:
            found.append(panel._replace(metrics=tuple(own)))
            left = [name for name in left if name not in own]
    return found + [Panel(name, (name,), "") for name in left]
