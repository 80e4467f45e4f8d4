"""Changes of a config that would make its plan fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from jaxrl_llm.config import Config
from jaxrl_llm.planning.planned import Planned, planned, require_place, written_mesh
from jaxrl_llm.run.machine import demand


def suggestions(plan: Planned, sizes: Mapping[str, int], needs: float) -> list[dict[str, Any]]:
    """Changes that would make a plan fit, the smallest first: single ones, or if none suffices, several together.

    Args:
      plan: a plan that does not fit.
      sizes: of its mesh.
      needs: bytes that a device needs; the effect of a change is estimated.
    """
    before, room = plan.estimated(sizes).peak, plan.machine.chip.bytes
    tried = []
    for text, config, changed in _changes(plan.config, plan, sizes):
        after = _needs_after(plan, config, changed, before, needs)
        if after is not None and after < needs:
            tried.append({"change": text, "memory_bytes": after, "fits": after <= room})
    alone = [each for each in tried if each["fits"]]
    if alone:
        return alone
    # Together, the cheapest first.
    config, chosen, texts, least = plan.config, dict(sizes), [], needs
    for _ in range(12):
        better = None
        for text, changed_config, changed in _changes(config, plan, chosen):
            after = _needs_after(plan, changed_config, changed, before, needs)
            if after is not None and after < 0.98 * least:
                better = (text, changed_config, changed, after)
                break
        if better is None:
            break
        text, config, chosen, least = better
        texts.append(text)
        if least <= room:
            return [{"change": " and ".join(texts), "memory_bytes": least, "fits": True}]
    return sorted(tried, key=lambda each: each["memory_bytes"])[:3]


def _needs_after(plan: Planned, config: Config, sizes: Mapping[str, int], before: float, needs: float) -> float | None:
    """Bytes that a device needs after a change, scaled by the estimates; None for an impossible change."""
    try:
        require_place(plan, sizes)
        known = plan if config is plan.config else planned(config, plan.machine)
        return max(0.0, needs + known.estimated(sizes).peak - before)
    except ValueError:
        return None


def _changes(config: Config, plan: Planned, sizes: Mapping[str, int]) -> Iterator[tuple[str, Config, dict[str, int]]]:
    """Single changes, the cheapest first: (text of the change, changed config, changed mesh)."""
    training, rollout = config.training, config.rollout
    now = dict(sizes)
    if config.evaluation.sequences_per_batch is not None:
        chosen = replace(config, evaluation=replace(config.evaluation, sequences_per_batch=None))
        yield "evaluation.sequences_per_batch=null", chosen, now

    def trained(**values: Any) -> Config:
        return replace(config, training=replace(training, **values))

    rows = training.sequences_per_microbatch or demand(config, plan.model).rows
    owners = math.prod(now.get(axis, 1) for axis in ("slice", "data", "fsdp", "expert"))
    if rows // 2 >= owners and rows % 2 == 0:
        yield (
            f"training.sequences_per_microbatch={rows // 2}",
            trained(sequences_per_microbatch=rows // 2),
            now,
        )
    if training.remat != "full":
        yield "training.remat=full", trained(remat="full"), now
    slots = rollout.slots or training.prompts_per_step * rollout.samples_per_prompt
    if slots // 2 >= owners and rollout.slots is None:
        yield f"rollout.slots={slots // 2}", replace(config, rollout=replace(rollout, slots=slots // 2)), now
    if now.get("data", 1) > 1:
        moved = {axis: size for axis, size in now.items() if axis != "data"}
        moved["fsdp"] = now.get("fsdp", 1) * now["data"]
        yield f"mesh: {written_mesh(moved)} (more fsdp)", config, moved
    heads = demand(config, plan.model).heads
    for axis in ("fsdp", "data"):
        tensor = 2 * now.get("tensor", 1)
        if now.get(axis, 1) % 2 == 0 and heads % tensor == 0:
            moved = now | {axis: now[axis] // 2, "tensor": tensor}
            moved = {name: size for name, size in moved.items() if size > 1}
            yield f"mesh: {written_mesh(moved)} (more tensor)", config, moved
            break
    if training.moment_dtype is None and training.optimizer in ("adamw", "lion", "muon", "sgd"):
        yield "training.moment_dtype=bfloat16", trained(moment_dtype="bfloat16"), now
    if config.model.parameter_dtype == "float32":
        narrow = replace(config.model, parameter_dtype="bfloat16", compute_dtype="bfloat16")
        rounding = "stochastic" if training.bfloat16_update == "nearest" else training.bfloat16_update
        yield (
            f"model.parameter_dtype=bfloat16 model.compute_dtype=bfloat16 training.bfloat16_update={rounding}",
            replace(config, model=narrow, training=replace(training, bfloat16_update=rounding)),
            now,
        )
    if plan.machine.chip.platform != "cpu" and "optimizer" not in training.offload:
        yield "training.offload=[optimizer]", trained(offload=(*training.offload, "optimizer")), now
    if plan.parts.step.composition.copies_reference and "reference" not in training.offload:
        yield "training.offload=[reference]", trained(offload=(*training.offload, "reference")), now
    if config.mesh.gather_for_rollout:
        yield "mesh.gather_for_rollout=false", replace(config, mesh=replace(config.mesh, gather_for_rollout=False)), now
    if training.optimizer != "adafactor":
        yield "training.optimizer=adafactor", trained(optimizer="adafactor", moment_dtype=None), now
