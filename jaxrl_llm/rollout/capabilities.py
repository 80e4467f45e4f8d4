"""Capabilities that the parts of a step offer and need; a check compares them, so no part refers to another by name."""

from __future__ import annotations

CAPABILITIES = {
    # of rows: a plan may lack them
    "one_round": "rows sampled in one round",
    "one_temperature": "rows of one temperature",
    "one_group_a_prompt": "one group of each prompt",
    "equal_groups": "groups of one size",
    "drawn_by_policy": "tokens that were all sampled by the policy",
    "own_prompt": "tokens trained after the same prompt that they were sampled after",
    "prompts_of_step": "rows of only the step's own prompts",
    "any_number": "any number of completions per prompt",
    # of samplers
    "active_prompts": "sampling of only some of the prompts",
    "numbered_samples": "sample numbers that continue those of the last round",
    "uneven_groups": "groups of different sizes",
    "prefixes": "completions that start with given tokens",
    "pauses": "completions that can be inspected or paused before they are continued",
    "temperatures": "one temperature per sample number",
    "demonstrations": "reference completions of the prompts",
    "router_record": "a record of the experts that served each token",
    "slots": "decoding in slots",
    "truncation": "truncated sampling",
    "conversations": "conversations with an environment",
    "ahead": "sampling of the next batch before the update with this one",
    # of other parts
    "whole_vocabulary": "tokens sampled from the whole vocabulary",
    "recorded_router": "experts recorded for every row",
    "one_width": "prompts of a single width",
    "one_process": "a run of a single process",
}
ROWS = frozenset(
    {"one_round", "one_temperature", "one_group_a_prompt", "equal_groups", "drawn_by_policy", "own_prompt"}
    | {"any_number", "prompts_of_step"}
)
SAMPLERS = {
    "the sampler": frozenset(
        {"active_prompts", "numbered_samples", "uneven_groups", "prefixes", "temperatures", "demonstrations"}
        | {"pauses", "router_record", "slots", "truncation", "ahead"}
    ),
    "the environment inside the program": frozenset(
        {"active_prompts", "numbered_samples", "temperatures", "demonstrations", "conversations", "ahead"}
    ),
    "the environment in Python": frozenset({"numbered_samples", "demonstrations", "conversations"}),
    "rollout.engine": frozenset({"numbered_samples", "demonstrations"}),
}


def require(part: str, needs: frozenset[str] | set[str], by: str, offers: frozenset[str]) -> None:
    """Raise ValueError, with the remedy, if `part` needs a capability that `by` does not offer."""
    for capability in sorted(needs - offers):
        raise ValueError(
            f"{part} needs {CAPABILITIES[capability]} ({capability}), which {by} does not offer; leave {part} out, or "
            f"replace {by}"
        )
