"""Estimates from sizes of the cost of a step on one device: memory, operations, traffic, communication.

Nothing is compiled, so hundreds of layouts can be compared, also for machines without a compiler. docs/plans.md derives
the formulas and compares them with compiled programs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.config import Config
from jaxrl_llm.models.experts import PAIRS_AT_A_TIME
from jaxrl_llm.models.logprobs import SCORES_PER_CHUNK
from jaxrl_llm.models.parameters import ParameterSpec
from jaxrl_llm.parallel.rules import AXES, Rules, axes_of, changed_rules, decoding
from jaxrl_llm.planning.ahead import PHASES
from jaxrl_llm.planning.hlo import Cost
from jaxrl_llm.planning.topologies import Topology
from jaxrl_llm.rollout.decoding import cache_stages
from jaxrl_llm.run.evaluation_batch import decoding_bytes, evaluation_batch, remembered_bytes
from jaxrl_llm.training.networks import POLICY
from jaxrl_llm.training.segments import is_offloaded, placed_state


@dataclass
class Estimate:
    """The estimate for one device.

    Attributes:
      memory: phase of a step, or "evaluation" -> item -> bytes, of everything in memory at once.
      costs: phase -> cost of the phase.
      state: permanent item -> bytes.
      offloaded: bytes of the state in host memory.
    """

    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    state: dict[str, float] = field(default_factory=dict)
    offloaded: float = 0.0

    @property
    def peak(self) -> float:
        """Bytes of the phase with the largest demand."""
        return max(sum(parts.values()) for parts in self.memory.values())


def estimate(
    config: Config, model: Any, composition: Any, state: Any, sizes: Mapping[str, int], topology: Topology
) -> Estimate:
    """Memory and work of one step on a mesh.

    Args:
      config: of the run.
      model: the policy, with its specs and its config.
      composition: of the step.
      state: the training state as shapes.
      sizes: of the mesh axes; 1 where one is missing.
      topology: the machine.

    Raises:
      ValueError: if the mesh does not divide an axis that it must divide.
    """
    at = _Sizes(config, model, sizes, topology)
    others = {name: one.model for name, one in composition.networks.items() if one.model is not None}
    held, away = _state_bytes(config, {POLICY: model} | others, state, at)
    result = Estimate(state=held, offloaded=away)
    weights = _weights(model, at, decoding(at.rules, gathered=config.mesh.gather_for_rollout))
    cache = at.cache_bytes
    loose = at.one_layer * at.compute if not config.mesh.gather_for_rollout else 0.0
    chunk = 2.0 * min(SCORES_PER_CHUNK, at.rows * at.completion / at.sequence * at.vocabulary / at.vocabulary_parts) * 4
    tables = at.table * at.compute
    width = at.tokens / at.sequence * at.rows
    block = width * at.compute * (4 * at.width + (3 * at.mlp + 3 * at.heads) / at.tensor * (at.served + at.beside))
    block += at.scores + at.routed(width)
    if config.has_problems:
        rows = 1 + config.evaluation.samples_per_problem
        together = evaluation_batch(config, model, at.mesh, at.rules, device_bytes=topology.chip.bytes)
        sampled = (model, max(1, together // rows), rows, at.prompt, at.completion, at.mesh.shape, at.rules)
        result.memory["evaluation"] = held | decoding_bytes(*sampled, gathered=config.mesh.gather_for_rollout)
    if composition.rollout is not None:
        sampling = held | {"weights for sampling": weights + loose, "cache": cache}
        result.memory["prefill"] = sampling | {"experts": at.routed(at.prompts * at.prompt)}
        result.memory["decode"] = sampling | {
            "cache before it grows": (at.held.token * at.grown + (at.held.window if at.grown else 0.0)) * at.decoded,
            "scores of a token": 3 * 4.0 * at.decoded * at.vocabulary / at.vocabulary_parts,
        }
    if composition.with_reference:
        result.memory["reference"] = held | {
            "one block": block + 2 * at.one_layer * at.compute,
            "tables": 2 * tables,
            "chunk of scores": chunk,
        }
    kept = {"none": 1.0, "full": 0.0, "attention": 0.0, "dots": 0.6, "offload_dots": 0.0}[config.training.remat]
    inputs = at.layers * width * at.compute * at.width
    more = {"attention": at.layers * width * at.compute * at.heads / at.tensor}.get(config.training.remat, 0.0)
    copies = 1 if at.microbatches == 1 else 2
    result.memory["update"] = held | {
        "brought from the host": away,
        "gradients": copies * at.learned_bytes,
        "inputs of blocks": inputs,
        "kept of blocks": kept * at.layers * block + more,
        "one block": 2 * block + 2 * at.one_layer * at.compute,
        "tables": 3 * tables,
        "chunk of scores": 1.5 * chunk,
    }
    result.costs = _costs(config, composition, at, weights)
    return result


class _Sizes:
    """Sizes of one device's part, by the names in the formulas. Numbers of parameters are counts, not bytes."""

    def __init__(self, config: Config, model: Any, sizes: Mapping[str, int], topology: Topology):
        c = model.config
        self.topology, self.config = topology, config
        self.mesh = SimpleNamespace(shape={axis: sizes.get(axis, 1) for axis in AXES})
        self.rules: Rules = changed_rules(config.mesh.rules)
        self.compute = jnp.dtype(c.compute_dtype).itemsize
        self.stored = jnp.dtype(c.parameter_dtype).itemsize
        self.tensor, self.sequence = self.mesh.shape["tensor"], self.mesh.shape["sequence"]
        self.layers, self.width, self.vocabulary = c.layers, c.width, c.vocabulary_size
        self.mlp, self.heads = c.mlp_size, c.heads * (c.head_size if c.latent is None else c.cached_sizes[1])
        self.experts = c.experts
        self.served = 1 if c.experts is None else c.experts.per_token
        # In hidden widths of the MLP: experts of a token, and what serves it beside them.
        self.beside = 0.0 if c.experts is None else (c.experts.shared_width or 0) / self.mlp
        self.prompt, self.completion = config.rollout.max_prompt_tokens, config.rollout.max_completion_tokens
        self.tokens = self.prompt + self.completion
        # Without a kernel, attention scores are materialised before and after the softmax, in float32.
        self.tokens_squared = self.tokens * self.tokens / self.sequence
        training = config.training
        prompts = training.prompts_per_step
        self.sequences = prompts * config.rollout.samples_per_prompt
        size = training.sequences_per_microbatch or self.sequences // training.minibatches_per_epoch
        self.microbatches = self.sequences // size
        self.rows = self._part("rows", size)
        held = 2 * 4.0 if c.plain_attention else 0.0
        self.scores = held * self.rows * c.heads / self.tensor * self.tokens_squared
        self.decoded = self._part("decoded_rows", config.rollout.slots or self.sequences)
        self.prompts = self._part("decoded_rows", prompts)
        self.vocabulary_parts = self._split("vocabulary", self.vocabulary)
        self.held = held = remembered_bytes(c, self.mesh.shape, self.rules, self.completion)
        of_prompts = held.whole_token * self.prompts * self.prompt
        self.cache_bytes = (held.token * self.completion + held.window + held.row) * self.decoded + of_prompts
        self.recurrent = sum(c.recurrent)
        self.attending = c.layers - self.recurrent
        # Per token of a recurrent layer: decay of the state, two reads, and an outer product.
        self.state_flops = 0 if c.delta is None else 7 * c.delta.value_heads * c.delta.key_width * c.delta.value_width
        # A decoding step reads the current size of a growing cache.
        stages = (self.completion,) if config.rollout.slots else cache_stages(self.completion)
        self.grown = sum(stages[:-1])
        reads = sum(room * sum(stages[: place + 1]) for place, room in enumerate(stages)) / self.completion
        # The parts of a fixed size are also written.
        self.cache_bytes_read = (held.token * reads + held.window + 2 * held.row) * self.decoded + of_prompts
        leaves = jax.tree.leaves(model.specs, is_leaf=lambda leaf: isinstance(leaf, ParameterSpec))
        blocks = [leaf for leaf in leaves if "layer" in leaf.axes]
        whole = {name: () if name == "embed" else axes for name, axes in self.rules.items()}
        # Gathered parameters of a device, and its own part of them.
        self.one_layer = sum(self._held(leaf, whole) for leaf in blocks) / c.layers
        self.one_layer_kept = sum(self._held(leaf, self.rules) for leaf in blocks) / c.layers
        tables = [leaf for leaf in leaves if "vocabulary" in leaf.axes]
        self.table = max((self._held(leaf, whole) for leaf in tables), default=0.0)
        self.table_kept = max((self._held(leaf, self.rules) for leaf in tables), default=0.0)
        trained = (
            leaves
            if model.trained is None
            else jax.tree.leaves(
                model.trained.split(model.specs)[0], is_leaf=lambda leaf: isinstance(leaf, ParameterSpec)
            )
        )
        self.adapted = model.trained is not None
        self.learned_bytes = sum(self._held(leaf, self.rules) * jnp.dtype(leaf.dtype).itemsize for leaf in trained)
        # Parameters that a token is multiplied with.
        matrices = sum(
            math.prod(leaf.shape)
            * (self.served / leaf.shape[leaf.axes.index("expert")] if "expert" in leaf.axes else 1)
            for leaf in blocks
            if len(leaf.shape) > 2
        )
        self.active = float(matrices)

    def _part(self, name: str, size: int) -> int:
        (axes,) = axes_of((name,), (size,), self.mesh, self.rules)
        return math.ceil(size / math.prod(self.mesh.shape[axis] for axis in axes))

    def _split(self, name: str, size: int) -> int:
        (axes,) = axes_of((name,), (size,), self.mesh, self.rules)
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def _held(self, leaf: ParameterSpec, rules: Rules) -> float:
        axes = axes_of(leaf.axes, leaf.shape, self.mesh, rules)
        return math.prod(leaf.shape) / math.prod(self.mesh.shape[axis] for part in axes for axis in part)

    def routed(self, tokens: float) -> float:
        """Bytes of the inputs, hidden values and answers of (token, expert) pairs that a device serves at a time."""
        if (experts := self.experts) is None or not experts.ragged:
            return 0.0
        seen = tokens * self._split("expert", experts.count)
        pairs = min(seen * self.served, PAIRS_AT_A_TIME / self.width)
        return self.compute * (2 * seen * self.width + pairs * 3 * (self.width + self.mlp / self.tensor))

    def devices(self, *axes: str) -> int:
        """Devices along these axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)


def _state_bytes(config: Config, models: Mapping[str, Any], state: Any, at: _Sizes) -> tuple[dict[str, float], float]:
    """Bytes of each part of the state on a device, and bytes in host memory.

    Args:
      config, state, at: of the run.
      models: of the networks by name; a network that is not named has the policy's.
    """
    mesh = jax.sharding.AbstractMesh(
        tuple(at.mesh.shape[axis] for axis in AXES), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES)
    )
    lies = placed_state(models, state, mesh, at.rules)  # pyright: ignore[reportArgumentType]
    offload = config.training.offload
    held: dict[str, float] = {}
    away = 0.0
    for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(lies), strict=True):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        size = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        if is_offloaded(path, offload):
            away += size
            continue
        name = _part(path)
        held[name] = held.get(name, 0.0) + size
    return held, away


def _part(path: Any) -> str:
    """The readable name of the part of the state that an array belongs to."""
    names = [str(getattr(part, "key", getattr(part, "name", part))) for part in path[:3]]
    if names[0] != "networks":
        return names[0]
    if names[1] == "policy":
        return "optimiser" if names[2] == "optimizer_state" else "parameters"
    return names[1]


def _weights(model: Any, at: _Sizes, rules: Rules) -> float:
    """Bytes of the parameters in the sharding and dtype of sampling."""
    leaves = jax.tree.leaves(model.specs, is_leaf=lambda leaf: isinstance(leaf, ParameterSpec))
    return sum(at._held(leaf, rules) for leaf in leaves) * at.compute


def _costs(config: Config, composition: Any, at: _Sizes, weights: float) -> dict[str, Cost]:
    devices = at.topology.devices
    passes = config.training.epochs_per_batch
    scored = at.sequences * at.tokens
    table = at.vocabulary * at.width
    # Two operations per parameter and token; causal attention reads half of the tokens on average.
    states = at.recurrent * at.state_flops
    per_token = 2 * at.active + states + 2 * at.attending * at.tokens * at.heads
    forward = (scored * per_token + 2 * at.sequences * at.completion * table) / devices
    recomputed = 0 if config.training.remat in ("none", "dots", "offload_dots") else 1
    computing = at.devices("slice", "data", "fsdp", "expert", "sequence", "tensor")
    prompts = config.training.prompts_per_step
    of_prompt = 2 * at.active + states + 2 * at.attending * at.prompt * at.heads
    prefill = Cost(flops=prompts * at.prompt * of_prompt / computing)
    prefill.bytes = weights + at.prompts * at.prompt * at.layers * at.compute * 12 * at.width
    steps = at.completion - 1
    decoded = 2 * (at.active + table) + states + 4 * at.attending * at.heads * (at.prompt + at.completion)
    runs = math.ceil(at.sequences / (config.rollout.slots or at.sequences))
    decode = Cost(flops=runs * steps * (config.rollout.slots or at.sequences) * decoded / computing)
    decode.bytes = runs * steps * (weights + at.cache_bytes_read)
    update = Cost(flops=passes * (forward * (3 + recomputed) + 2 * at.sequences * at.completion * table / devices))
    pieces = at.microbatches * passes
    block = at.rows * at.tokens / at.sequence * at.compute
    layer_traffic = 3 * at.one_layer * at.compute + block * (16 * at.width + 6 * at.mlp * at.served / at.tensor)
    update.bytes = pieces * at.layers * layer_traffic * (2.5 + 0.5 * recomputed) + 8 * at.learned_bytes
    result = {"prefill": prefill, "decode": decode} if composition.rollout is not None else {}
    result["update"] = update
    reference = Cost(flops=forward, bytes=at.microbatches * at.layers * layer_traffic)
    if composition.with_reference:
        result["reference"] = reference
    _communication(config, at, result, weights)
    return {name: result[name] for name in PHASES if name in result}


def _communication(config: Config, at: _Sizes, costs: dict[str, Cost], weights: float) -> None:
    """Bytes sent by a device. A ring sends (n - 1) / n of a gathered or scattered array, twice as much for a sum."""
    sharers = at.devices("fsdp", "expert", "sequence")
    replicas = at.devices("slice", "data")
    tensor, sequence, expert = at.tensor, at.sequence, at.mesh.shape["expert"]
    layers, pieces = at.layers, at.microbatches
    passes = config.training.epochs_per_batch
    # Moved for a layer: the gathered size minus the local part.
    gathered = (at.one_layer - at.one_layer_kept) * at.compute
    tables = (at.table - at.table_kept) * at.compute
    slopes = (at.one_layer - at.one_layer_kept) * at.stored
    activations = at.rows * at.tokens / sequence * at.width * at.compute
    summed = 2 * activations * (tensor - 1) / tensor
    exchanged = activations * (expert - 1) if at.served > 1 else 0.0
    keys = at.held.whole_token / layers * at.rows * at.tokens * (sequence - 1) / sequence

    def add(phase: str, kind: str, size: float, group: int, *, crosses: bool = False) -> None:
        if size > 0 and phase in costs:
            costs[phase].collectives[kind] += size
            costs[phase].seconds_on_network += size / at.topology.network(group, crosses=crosses)

    recomputed = 0 if config.training.remat in ("none", "dots", "offload_dots") else 1
    for phase, forwards, count in (("reference", 1, pieces), ("update", 1 + recomputed, pieces * passes)):
        backward = phase == "update"
        # Every product gathers its matrix in the forward pass, the recomputation, and the gradient of its input.
        add(phase, "all-gather", count * layers * gathered * (forwards + backward), sharers)
        add(phase, "all-gather", count * 2 * tables, sharers)
        # Two sums per layer over `tensor` in the forward and in the backward pass; the recomputation needs one of them.
        times = 2 + (2 + recomputed if backward else 0)
        add(phase, "all-reduce", count * layers * times * summed, tensor)
        add(phase, "all-gather", count * layers * exchanged * forwards, expert)
        add(phase, "reduce-scatter", count * layers * exchanged * (forwards + 2 * backward), expert)
        add(phase, "all-gather", count * layers * keys * forwards, sequence)
        add(phase, "all-reduce", count * summed, tensor)
        if backward:
            add(phase, "reduce-scatter", count * layers * slopes, sharers)
            # The gradients of the tables are summed after the loop over chunks.
            add(phase, "all-reduce", count * 2 * 2 * (at.table - at.table_kept) * at.stored, sharers)
            add(phase, "reduce-scatter", count * layers * keys, sequence)
    if replicas > 1:
        size = 2 * at.learned_bytes * (replicas - 1) / replicas * pieces * passes
        add("update", "all-reduce", size, replicas, crosses=at.mesh.shape["slice"] > 1)
    steps = at.completion - 1
    token = at.decoded * at.width * at.compute
    if config.mesh.gather_for_rollout:
        kept = weights * at.one_layer_kept / max(at.one_layer, 1.0)
        add("prefill", "all-gather", weights - kept, sharers)
    else:
        add("decode", "all-gather", steps * (layers * gathered + tables), sharers)
    add("decode", "all-reduce", steps * (2 * layers + 1) * 2 * token * (tensor - 1) / tensor, tensor)
    add("decode", "all-to-all", steps * 4.0 * at.decoded * at.vocabulary / tensor * (tensor - 1) / tensor, tensor)
    if at.served > 1 and expert > 1:
        add("decode", "all-gather", steps * layers * token * (expert - 1), expert)
        add("decode", "reduce-scatter", steps * layers * token * (expert - 1), expert)
    prompts = at.prompts * at.prompt * at.width * at.compute
    add("prefill", "all-reduce", (2 * layers + 1) * 2 * prompts * (tensor - 1) / tensor, tensor)
