"""What the sizes of a config imply, in units: the table that a run starts with."""

from __future__ import annotations

import jax

from jaxrl_llm.models import TransformerConfig, attention_path
from jaxrl_llm.parallel import described, layout
from jaxrl_llm.run.setup import Parts


def implied_units(built: Parts) -> list[tuple[str, int | float | str, str]]:
    """What the sizes of a config imply, in units."""
    config = built.config
    training, rollout, written = config.training, config.rollout, built.step.composition.written
    rows = training.prompts_per_step * rollout.samples_per_prompt
    sampled: list[tuple[str, int | float | str, str]] = [
        ("prompts_per_step", training.prompts_per_step, "prompts"),
        ("samples_per_prompt", rollout.samples_per_prompt, "completions"),
    ]
    if built.step.composition.rollout is None and written is not None:
        rows, sampled = written.rows, []
    place = built.step.composition.resources.placement
    mesh = place.mesh
    per_update = rows // training.minibatches_per_epoch
    micro = training.sequences_per_microbatch or per_update
    attention = []
    if isinstance(built.model.config, TransformerConfig):
        widths = rollout.max_prompt_tokens, rollout.max_prompt_tokens + rollout.max_completion_tokens
        with layout(mesh, place.rules):
            update = attention_path(built.model.config, queries=widths[1])
            decode = attention_path(built.model.config, queries=1, keys=widths[1])
        attention = [("attention", f"{update}, {decode}", "update, decoding")]
    return [
        *sampled,
        ("sequences per step", rows, "completions"),
        ("optimiser updates per step", training.epochs_per_batch * training.minibatches_per_epoch, "updates"),
        ("sequences per update", per_update, "completions"),
        ("sequences_per_microbatch", micro, "completions"),
        ("microbatches per update", per_update // micro, "microbatches"),
        ("tokens per step, at most", rows * (rollout.max_prompt_tokens + rollout.max_completion_tokens), "tokens"),
        ("steps", training.steps, "steps"),
        *attention,
        ("devices", 1 if mesh is None else mesh.size, jax.default_backend()),
        ("mesh", described(mesh), built.mesh_reason),
    ]
