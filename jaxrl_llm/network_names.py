"""Names of the outputs of networks: they follow rules, and need no entry in the table of fields.

Without the name of a network they refer to the policy, without the name of a view to the row itself:

    logprobs, entropy              the policy;  in a loss the one that learns
    old_<name>                     at the start of the step
    <network>_logprobs             another network (reference, teacher, proxy, ...)
    values, <network>_values       numbers of a head, one per token (or per row, depending on the head)
    <network>_scores               one number of a head per row
    <view>_logprobs, <view>_mask   another sequence made of the row
    <network>_<view>_logprobs      the same by another network
    <network>_over_vocabulary      the functional of a loss, of the distributions of the policy and of another network
                                   (default: the reference)
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple


class Score(NamedTuple):
    """The meaning of a name that follows the rules.

    Attributes:
      network: name of the network.
      quantity: logprobs, entropy, values (of a head, in its own shape) or scores (of a head, one per row).
      view: the sequence that is scored; "" is the row itself.
      as_found: computed before the update, also in a loss.
    """

    network: str
    quantity: str
    view: str = ""
    as_found: bool = False


_QUANTITIES = ("logprobs", "entropy", "values", "scores")
# Networks that are created without a description, with the numbers of outputs of their heads.
HEADS = {"value": 1, "twin": 2, "token_reward": 1}


def score_named(name: str, networks: Collection[str], views: Collection[str] = ()) -> Score | None:
    """The network and quantity that a name refers to; None for a name that does not follow the rules.

    Args:
      name: of an array.
      networks: names of networks; the defaults are "policy" and, for values, "value".
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
    """The network that an `over_vocabulary` name compares with the policy; None for another name.

    >>> compared_with("over_vocabulary"), compared_with("teacher_over_vocabulary"), compared_with("logprobs")
    ('reference', 'teacher', None)
    """
    network = name.removesuffix("over_vocabulary")
    return None if network == name else network.removesuffix("_") or "reference"
