"""Names of what networks say about rows: they follow rules, and need no row in the table of fields.

The policy is meant where no network is named, and the row itself where no view is:

    logprobs, entropy              the policy;  in a loss the one that learns
    old_<name>                     as the step found it
    <network>_logprobs             another network (reference, teacher, proxy, ...)
    values, <network>_values       numbers of a head, one a token (or a row, as the head says)
    <network>_scores               one number of a head a row
    <view>_logprobs, <view>_mask   another sequence made of the row
    <network>_<view>_logprobs      the same by another network
    <network>_over_vocabulary      the functional that a loss carries, of the policy's whole distribution and that of
                                   another network, the reference where none is named
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple


class Score(NamedTuple):
    """What a rule-made name asks for.

    Attributes:
      network: whose numbers.
      quantity: logprobs, entropy, values (of a head, in its own shape) or scores (of a head, one a row).
      view: the sequence that is scored; "" is the row itself.
      as_found: before the update, in a loss too.
    """

    network: str
    quantity: str
    view: str = ""
    as_found: bool = False


_QUANTITIES = ("logprobs", "entropy", "values", "scores")
# Networks that a name alone brings into a step, and how many numbers the heads of three of them have.
HEADS = {"value": 1, "twin": 2, "token_reward": 1}


def score_named(name: str, networks: Collection[str], views: Collection[str] = ()) -> Score | None:
    """What a name asks of which network, by the rules; None for a name that follows none.

    Args:
      name: of an array.
      networks: names of networks; "policy" and "value" are meant where a name has none.
      views: names of views.

    >>> score_named("old_entropy", ["policy"])
    Score(network='policy', quantity='entropy', view='', as_found=True)
    >>> score_named("reference_answer_logprobs", ["policy", "reference"], ["answer"])
    Score(network='reference', quantity='logprobs', view='answer', as_found=False)
    """
    if name == "token_reward_logits":
        return Score("token_reward", "values") if "token_reward" in networks else None
    rest = name.removeprefix("old_")
    as_found = rest != name
    quantity = next((q for q in _QUANTITIES if rest == q or rest.endswith(f"_{q}")), None)
    if quantity is None:
        return None
    rest = rest.removesuffix(quantity).removesuffix("_")
    default = "value" if quantity == "values" else "policy"
    for network in ("", *networks):
        for view in ("", *views):
            if rest == "_".join(part for part in (network, view) if part):
                chosen = network or default
                # The policy has no head, and heads have no log-probabilities.
                return Score(chosen, quantity, view, as_found) if chosen in networks else None
    return None


def compared_with(name: str) -> str | None:
    """The network whose whole distribution a name compares the policy's with; None for another name.

    >>> compared_with("over_vocabulary"), compared_with("teacher_over_vocabulary"), compared_with("logprobs")
    ('reference', 'teacher', None)
    """
    network = name.removesuffix("over_vocabulary")
    return None if network == name else network.removesuffix("_") or "reference"
