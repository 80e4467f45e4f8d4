"""The number of completions that an evaluation decodes at once: as many as fit beside the state of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.config import Config
from jaxrl_llm.models.model import Model
from jaxrl_llm.models.parameters import ParameterSpec
from jaxrl_llm.models.transformer_config import TransformerConfig
from jaxrl_llm.parallel.auto import memory_of
from jaxrl_llm.parallel.rules import AXES, RULES, Rules, axes_of, decoding
from jaxrl_llm.rollout.decoding import cache_stages
from jaxrl_llm.run.machine import demand

MOST = 1152  # completions: more do not increase the throughput
ROOM = 0.9  # of a device's memory


def evaluation_batch(
    config: Config, model: Model, mesh: Any = None, rules: Rules = RULES, *, device_bytes: float | None = None
) -> int:
    """`evaluation.sequences_per_batch`, or if it is null as many completions as fit on a device beside the state.

    Args:
      config: of the run.
      model: the policy.
      mesh: mesh of rows and parameters; None for one device.
      rules: their sharding rules.
      device_bytes: memory of a device; None asks the first one of the mesh.
    """
    if config.evaluation.sequences_per_batch is not None:
        return config.evaluation.sequences_per_batch
    return fitting_batch(
        model,
        rows=1 + config.evaluation.samples_per_problem,
        prompt=config.rollout.max_prompt_tokens,
        completion=config.rollout.max_completion_tokens,
        mesh=mesh,
        rules=rules,
        gathered=config.mesh.gather_for_rollout,
        state_bytes=demand(config, model).state_bytes,
        device_bytes=device_bytes,
    )


def fitting_batch(
    model: Model,
    *,
    rows: int,
    prompt: int,
    completion: int,
    mesh: Any = None,
    rules: Rules = RULES,
    gathered: bool = True,
    state_bytes: float | None = None,
    device_bytes: float | None = None,
) -> int:
    """Number of completions that fit on a device: whole problems of `rows` each, at least one, at most 1152
    completions.

    Args:
      model: the model; without specs of its parameters or its cache the result is 1152.
      rows: completions per problem.
      prompt, completion: tokens, at most.
      mesh, rules, device_bytes: as for `evaluation_batch`.
      gathered: see `decoding_bytes`.
      state_bytes: size of the state in memory, over all devices; None: only the parameters.
    """
    most = max(1, MOST // rows)
    if model.specs is None or not hasattr(model.config, "cached_sizes"):
        return most * rows
    room = ROOM * (device_bytes or memory_of(jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]))
    shape = {} if mesh is None else mesh.shape
    stored = whole_bytes(model)
    room -= held_bytes(model, shape, rules) / stored * (state_bytes or stored)
    for problems in range(most, 1, -1):
        needs = decoding_bytes(model, problems, rows, prompt, completion, shape, rules, gathered=gathered)
        if sum(needs.values()) <= room:
            return problems * rows
    return rows


def decoding_bytes(
    model: Model,
    problems: int,
    rows: int,
    prompt: int,
    completion: int,
    shape: Mapping[str, int],
    rules: Rules,
    *,
    gathered: bool = True,
) -> dict[str, float]:
    """Memory of a device for decoding, beside the state, in bytes by name.

    Args:
      model: what decodes.
      problems: number of problems decoded together.
      rows: completions per problem.
      prompt, completion: tokens, at most.
      shape: of the mesh: axis -> size.
      rules: the table of the update.
      gathered: whether weights are gathered once (`mesh.gather_for_rollout`) instead of one layer at a time.
    """
    c, at = model.config, decoding(rules, gathered=gathered)
    decoded, prompts = (math.ceil(n / _parts("decoded_rows", n, shape, at)) for n in (problems * rows, problems))
    width = jnp.dtype(c.compute_dtype).itemsize
    held, stages = remembered_bytes(c, shape, at, completion), cache_stages(completion)
    if gathered:
        weights = held_bytes(model, shape, at, width)
    else:  # they are part of the state; only the current layer is gathered
        weights = held_bytes(model, shape, decoding(rules), width) / c.layers
    cache = (held.token * completion + held.window + held.row) * decoded + held.whole_token * prompts * prompt
    # The cache grows in stages: during the last growth the previous one still exists, and windows exist twice.
    before = (held.token * sum(stages[:-1]) + held.window * (len(stages) > 1)) * decoded
    return {
        "weights for sampling": weights,
        "cache": cache,
        "cache before it grows": before,
        "scores of a token": 3 * 4.0 * decoded * c.vocabulary_size / _parts("vocabulary", c.vocabulary_size, shape, at),
    }


class Remembered(NamedTuple):
    """Bytes of one row in a cache, in all layers of one device.

    Attributes:
      token: bytes per token of a completion.
      window: bytes of windowed layers, which cache only their window of a completion.
      row: bytes independent of the length.
      whole_token: bytes per token of a prompt, which all layers cache.
    """

    token: float
    window: float
    row: float
    whole_token: float


def remembered_bytes(config: TransformerConfig, shape: Mapping[str, int], rules: Rules, completion: int) -> Remembered:
    """Bytes of the cache for one row during sampling.

    Keys and values grow; layers that share those of another layer have none, and a gated delta-net layer has a state
    and the last inputs of its convolution. The latent vector of a token is replicated on every device.

    Args:
      config: of the model.
      shape: of the mesh: axis -> size.
      rules: of decoding.
      completion: tokens, at most.
    """
    width = jnp.dtype(config.compute_dtype).itemsize
    token = window = row = whole = 0.0
    for kind, layers in config.caches.items():
        if kind == "delta_blocks" and (delta := config.delta) is not None:
            state = delta.value_heads * delta.key_width * delta.value_width * 4
            inputs = (delta.kernel - 1) * delta.key_heads * delta.mixed_width * width
            row += len(layers) * (state + inputs) / _parts("kv_heads", delta.key_heads, shape, rules)
            continue
        heads, key, value = config.of_stack(kind).cached_sizes
        split = _parts("kv_heads", heads, shape, rules) if config.latent is None else 1
        size = len(layers) * heads * (key + value) / split * (1 if config.cache_dtype == "int8" else width)
        whole += size
        if config.window is not None and config.windowed[layers[0]] and completion > config.window:
            window += size * config.window
        else:
            token += size
    return Remembered(token, window, row, whole)


def held_bytes(model: Model, shape: Mapping[str, int], rules: Rules, width: int | None = None) -> float:
    """Bytes of the parameters on a device, in their own dtypes or `width` bytes each."""
    mesh = _mesh(shape)
    total = 0.0
    for leaf in _leaves(model):
        axes = axes_of(leaf.axes, leaf.shape, mesh, rules)
        parts = math.prod(mesh.shape[axis] for part in axes for axis in part)
        total += math.prod(leaf.shape) / parts * (width or jnp.dtype(leaf.dtype).itemsize)
    return total


def whole_bytes(model: Model) -> float:
    """Bytes of the parameters."""
    return held_bytes(model, {}, RULES)


def _leaves(model: Model) -> list[ParameterSpec]:
    return jax.tree.leaves(model.specs, is_leaf=lambda leaf: isinstance(leaf, ParameterSpec))


def _mesh(shape: Mapping[str, int]) -> Any:
    return SimpleNamespace(shape={axis: shape.get(axis, 1) for axis in AXES})


def _parts(name: str, size: int, shape: Mapping[str, int], rules: Rules) -> int:
    """Number of parts into which the mesh splits a dimension of this size."""
    mesh = _mesh(shape)
    (axes,) = axes_of((name,), (size,), mesh, rules)
    return math.prod(mesh.shape[axis] for axis in axes)
