"""Tables of a run: its sizes before the start, and its results at the end."""

from __future__ import annotations

from typing import Any

import jax

from jaxrl_llm.models import TransformerConfig, attention_path
from jaxrl_llm.parallel import described, layout
from jaxrl_llm.reporting.machine_report import package_versions, peak_memory
from jaxrl_llm.run.across_stages import across_summary
from jaxrl_llm.run.goodput import goodput
from jaxrl_llm.run.setup import Parts
from jaxrl_llm.run.stages import Run


def units(built: Parts) -> list[tuple[str, int | float | str, str]]:
    """The sizes implied by a config, with units."""
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


def summary_of(run: Run, after: dict[str, float]) -> dict[str, Any]:
    """The content of summary.json."""
    run.charge()
    if run.lifetime is not None:
        run.lifetime.mark(now=True)
    seconds = dict(run.meta["seconds"])
    seconds["total"] = sum(seconds.values())
    return {
        "name": run.config.name,
        "before": run.meta["before"],
        "after": after,
        "seconds": seconds,
        "goodput": goodput(run.config.directory, run.meta["seconds"], run.meta.get("compilation_seconds", 0.0)),
        "peak_memory_bytes": peak_memory(),
        "completion_tokens_sampled": run.meta["tokens"],
        "warm_start_steps": run.meta["warm_start_steps"],
        "steps": run.meta["stage_step"],
        **across_summary(run.meta),
        "early_stopping": run.meta.get("early_stopping", {}),
        "skipped_updates": run.meta.get("skipped_updates", 0),
        "failures": run.meta.get("failures", {}),
        "compilations": run.watch.count,
        "compilation_seconds": run.watch.seconds,
        "programs_read": run.watch.read,
        "config_hash": run.meta["config_hash"],
        "data": run.meta["data"],
        "devices": [str(device) for device in jax.devices()],
        "versions": package_versions(),
    }
