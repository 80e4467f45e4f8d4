"""What parts of a step offer and need: the words that a check compares, so that no part knows the name of another."""

from __future__ import annotations

CAPABILITIES = {
    # of rows, which a plan may lack
    "one_round": "rows that come in one round",
    "one_temperature": "rows of one temperature",
    "one_group_a_prompt": "one group of each prompt",
    "equal_groups": "groups of one size",
    "drawn_by_policy": "tokens that the policy drew",
    "own_prompt": "tokens that learn behind what they were drawn behind",
    "prompts_of_step": "rows of the prompts that the step was handed",
    "any_number": "completions of which any number of a prompt can be asked for",
    # of samplers
    "active_prompts": "sampling of some prompts alone",
    "numbered_samples": "samples numbered from where the last round ended",
    "uneven_groups": "groups of different sizes",
    "prefixes": "completions that start with given tokens",
    "pauses": "completions that are looked at, or wait, before they go on",
    "temperatures": "a temperature for each sample number",
    "demonstrations": "reference completions of the prompts",
    "router_record": "a record of the experts that served each token",
    "slots": "decoding in slots",
    "truncation": "truncated sampling",
    "conversations": "completions that are answered turn by turn",
    "ahead": "sampling of the next batch before this one is learned from",
    # of other parts
    "whole_vocabulary": "tokens drawn from the whole vocabulary",
    "recorded_router": "experts recorded for every row",
    "one_width": "prompts of one width",
    "one_process": "a run of one process",
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
    """Raises ValueError where a part needs what another does not offer, saying which and what would do."""
    for capability in sorted(needs - offers):
        raise ValueError(
            f"{part} needs {CAPABILITIES[capability]} ({capability}), which {by} does not offer; leave {part} out, or "
            f"replace {by}"
        )
