"""Optimisers by name, and their updates of bfloat16 parameters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jaxtyping import Array, PyTree
from optax.contrib import MuonDimensionNumbers, muon

from jaxrl_llm import schedules
from jaxrl_llm.bounds import shown, there_are
from jaxrl_llm.config import TrainingConfig
from jaxrl_llm.experience import Method
from jaxrl_llm.fields import nearest
from jaxrl_llm.models.transformer_config import STACKS
from jaxrl_llm.run import paired_updates
from jaxrl_llm.run.recipes import RecipeError, entry_of, method, user_function
from jaxrl_llm.signatures import signature

# Parameters that muon orthogonalises: name -> input and output axes of the stacked matrix, counted from the last.
# Other axes (layers, experts, gate and up) enumerate matrices. All other parameters (embeddings, norms, biases,
# adapters, routers) use AdamW.
_MATRICES = {
    "qkv": ((-4,), (-3, -2, -1)),
    "attention_out": ((-4, -3, -2), (-1,)),
    "gate_up": ((-3,), (-1,)),
    "down": ((-2,), (-1,)),
    "shared_gate_up": ((-3,), (-1,)),
    "shared_down": ((-2,), (-1,)),
    "query_down": ((-2,), (-1,)),
    "query_up": ((-3,), (-2, -1)),
    "latent_down": ((-2,), (-1,)),
    "latent_up": ((-3,), (-2, -1)),
    "delta_in": ((-3,), (-2, -1)),
    "delta_out": ((-4, -3, -2), (-1,)),
}
# Parameters that only affect a discrete choice, and so have no gradient.
_NOT_LEARNED = ("selection_bias",)
# With this factor a step of muon has the size of a step of AdamW (2502.16982), so learning rates can be reused.
_MUON_RMS = 0.2


def optimizer(training: TrainingConfig, *, seed: int = 0) -> optax.GradientTransformation:
    """The optimiser of the config, with global norm clipping and its schedule.

    Args:
      training: section training.
      seed: of stochastic rounding.
    """
    made = _kept(optax.chain(clipping(training.max_gradient_norm), _step(training)))
    if training.bfloat16_update == "master":
        return with_master(made)
    if training.bfloat16_update == "stochastic":
        return with_stochastic_rounding(made, seed=seed)
    return made


def _kept(made: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimiser without updates of parameters that have no gradient, which weight decay would change."""

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        changes, state = made.update(updates, state, params)
        still = lambda path: getattr(path[-1], "key", None) in _NOT_LEARNED if path else False  # noqa: E731
        return jax.tree_util.tree_map_with_path(lambda path, x: jnp.zeros_like(x) if still(path) else x, changes), state

    return optax.GradientTransformation(made.init, update)


def clipping(norm: float | None) -> optax.GradientTransformation:
    """Clipping by global norm; None: no clipping."""
    return optax.identity() if norm is None else optax.clip_by_global_norm(norm)


def learning_rate(training: TrainingConfig) -> optax.Schedule:
    """The learning-rate schedule of the config, in optimiser updates."""
    updates = training.steps * training.epochs_per_batch * training.minibatches_per_epoch
    peak, warmup = training.learning_rate, training.warmup_steps
    if training.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(updates - warmup, 1), alpha=0.1)
    elif training.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        name, hyper = entry_of(training.schedule, "training.schedule")
        factor = method(name, hyper, (schedules,), "training.schedule", {"total_updates": max(updates - warmup, 1)})
        if isinstance(factor, Method) or signature(factor).required != ("step",):
            raise RecipeError(f"training.schedule names {name}, which is not a function of step only; name one that is")
        after = lambda count: peak * factor(step=count)  # noqa: E731
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after


def long_warmup(training: TrainingConfig, section: str = "training") -> str:
    """A warning if the learning rate never reaches its peak; "" otherwise. `section` is the one that sets it."""
    updates = training.steps * training.epochs_per_batch * training.minibatches_per_epoch
    if training.warmup_steps < max(updates, 1):
        return ""
    return (
        f"{section}.warmup_steps is {training.warmup_steps}, but {there_are(updates, 'update')}, so the learning "
        f"rate never reaches {training.learning_rate:g}; lower it, or train for more steps"
    )


def named_optimizer(entry: Any, rate: float | optax.Schedule, decay: float, where: str) -> optax.GradientTransformation:
    """An optimiser of optax, or a user's one, from its entry: a name with hyper-parameters.

    Args:
      entry: as `training.optimizer`.
      rate: learning rate.
      decay: weight decay, for optimisers that support it.
      where: the key, for messages.

    Raises:
      RecipeError: for an unknown optimiser or hyper-parameter, or a value that it refuses.
    """
    name, hyper = entry_of(entry, where)
    if ":" in name:
        factory = user_function(name, where)
    else:
        homes = (optax, optax.contrib, paired_updates)
        known = {n: f for home in homes for n, f in vars(home).items() if inspect.isfunction(f) and _takes_a_rate(f)}
        if name not in known:
            raise RecipeError(f"{where} names {name!r}, which is not an optimiser of optax; {nearest(name, known)}")
        factory = known[name]
    declared = inspect.signature(factory).parameters
    for key in hyper:
        if key not in declared:
            raise RecipeError(f"{where}.{name}.{key} is not a hyper-parameter of {name}; {nearest(key, declared)}")
        if ":" not in name and not _may_hold(declared[key], hyper[key]):
            raise RecipeError(f"{where}.{name}.{key} is {shown(hyper[key])}; it must be a number")
    if decay and "weight_decay" not in hyper:
        if "weight_decay" not in declared:
            raise RecipeError(f"training.weight_decay is {decay}, but {name} takes none; leave it out")
        hyper = hyper | {"weight_decay": decay}
    try:
        made = factory(rate, **hyper)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}.{name}: {error}") from error
    if not isinstance(made, optax.GradientTransformation):
        raise RecipeError(f"{where}.{name} returned a {type(made).__name__}; it must be an optax optimiser")
    return made


def _may_hold(parameter: inspect.Parameter, value: Any) -> bool:
    """Whether a hyper-parameter of optax may be a text, a list or a mapping."""
    said = f"{parameter.name} {parameter.annotation}".lower()
    plain = not isinstance(value, str | list | Mapping)
    return (
        plain or isinstance(parameter.default, str) or any(word in said for word in ("dtype", "str", "any", "sequence"))
    )


def _takes_a_rate(function: Any) -> bool:
    return next(iter(inspect.signature(function).parameters), "") == "learning_rate"


def _step(training: TrainingConfig) -> optax.GradientTransformation:
    rate, decay = learning_rate(training), training.weight_decay
    if training.optimizer not in ("adamw", "lion", "sgd", "adafactor", "muon"):
        if training.moment_dtype is not None:
            raise RecipeError(
                f"training.moment_dtype is {training.moment_dtype!r}, but training.optimizer has hyper-parameters of "
                "its own; give mu_dtype there"
            )
        return named_optimizer(training.optimizer, rate, decay, "training.optimizer")
    b1, b2, moments = training.adam_b1, training.adam_b2, training.moment_dtype
    if training.optimizer == "adamw":
        return optax.adamw(rate, b1=b1, b2=b2, weight_decay=decay, mu_dtype=moments)
    if training.optimizer == "lion":
        return optax.lion(rate, b1=b1, b2=b2, weight_decay=decay, mu_dtype=moments)
    if training.optimizer == "sgd":
        return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, accumulator_dtype=moments))
    if training.optimizer == "adafactor":
        return optax.adafactor(rate, multiply_by_parameter_scale=False, weight_decay_rate=decay or None)
    return muon(
        rate,
        beta=b2,
        weight_decay=decay,
        mu_dtype=moments,
        adam_b1=b1,
        adam_b2=b2,
        adam_weight_decay=decay,
        consistent_rms=_MUON_RMS,
        muon_weight_dimension_numbers=muon_matrices,
    )


def muon_matrices(params: PyTree) -> PyTree:
    """The two matrix axes of each parameter; None for parameters that are not matrices."""

    def dimensions(path: Any, leaf: Any) -> MuonDimensionNumbers | None:
        name = str(getattr(path[-1], "key", getattr(path[-1], "name", "")))
        inside = len(path) > 1 and str(getattr(path[-2], "key", "")) in STACKS
        if not inside or name not in _MATRICES:
            return None
        inputs, outputs = (tuple(leaf.ndim + axis for axis in axes) for axes in _MATRICES[name])
        return MuonDimensionNumbers(inputs, outputs)

    return jax.tree_util.tree_map_with_path(dimensions, params)


class MasterState(NamedTuple):
    """Attributes:
    master: the parameters in float32.
    inner: state of the optimiser that changes them.
    """

    master: PyTree
    inner: Any


class RoundingState(NamedTuple):
    """Attributes:
    count: updates so far; it addresses the random bits.
    inner: state of the optimiser.
    """

    count: Array
    inner: Any


def _wide(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _towards(params: PyTree, wanted: PyTree) -> PyTree:
    """Updates with which `optax.apply_updates` gives exactly `wanted`, although the sum is rounded to the dtype of
    params."""
    return jax.tree.map(lambda p, w: w.astype(jnp.float32) - p.astype(jnp.float32), params, wanted)


def with_master(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimiser that works on a float32 copy; the parameters are its rounding to their own dtype.

    Small steps add up in the copy, where in bfloat16 they would be lost.
    """

    def init(params: PyTree) -> MasterState:
        master = _wide(params)
        # A copy even for float32: a donated buffer may occur only once in the state.
        return MasterState(jax.tree.map(jnp.copy, master), inner.init(master))

    def update(updates: PyTree, state: Any, params: PyTree = None):
        steps, after = inner.update(_wide(updates), state.inner, state.master)
        master = optax.apply_updates(state.master, steps)
        rounded = jax.tree.map(lambda m, p: m.astype(p.dtype), master, params)
        return _towards(params, rounded), MasterState(master, after)

    return optax.GradientTransformation(init, update)


def with_stochastic_rounding(inner: optax.GradientTransformation, *, seed: int = 0) -> optax.GradientTransformation:
    """An optimiser of bfloat16 parameters with stochastic rounding of updates, without bias.

    A step that is a hundredth of the distance between two bfloat16 numbers is taken once in a hundred times. The state
    of the inner optimiser is float32. Random bits are derived from (seed, update, parameter), independent of the mesh.
    Parameters of other dtypes are rounded to the nearest number.
    """

    def init(params: PyTree) -> RoundingState:
        return RoundingState(jnp.int32(0), inner.init(_wide(params)))

    def update(updates: PyTree, state: Any, params: PyTree = None):
        wide = _wide(params)
        steps, after = inner.update(_wide(updates), state.inner, wide)
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        leaves, structure = jax.tree.flatten(optax.apply_updates(wide, steps))
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(params)]
        rounded = [
            stochastically_rounded(leaf, jax.random.fold_in(key, number))
            if dtype == jnp.bfloat16
            else leaf.astype(dtype)
            for number, (leaf, dtype) in enumerate(zip(leaves, dtypes, strict=True))
        ]
        return _towards(params, structure.unflatten(rounded)), RoundingState(state.count + 1, after)

    return optax.GradientTransformation(init, update)


def stochastically_rounded(x: Array, key: Array) -> Array:
    """float32 -> bfloat16, up with probability (x - below) / (above - below), so that the mean is x."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # bfloat16 is the upper half of float32: a random number below 2^16 carries into it in proportion to the lower half.
    noisy = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    kept = jax.lax.bitcast_convert_type(noisy & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), kept, x).astype(jnp.bfloat16)


def skipping_non_finite(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The optimiser, except that a non-finite loss or gradient norm changes neither parameters nor state.

    The loss is the argument `value` of `update`. The state is that of the inner optimiser, whose updates are unchanged,
    bit for bit, for finite numbers.
    """
    informed = optax.with_extra_args_support(inner)

    def update(updates: PyTree, state: Any, params: PyTree = None, *, value: Any = 0.0, **extra: Any):
        finite = jnp.isfinite(optax.tree.norm(_wide(updates))) & jnp.isfinite(value)
        steps, after = informed.update(updates, state, params, value=value, **extra)
        steps = jax.tree.map(lambda step: jnp.where(finite, step, jnp.zeros_like(step)), steps)
        return steps, jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def learning_rates(training: TrainingConfig, steps: int, state: Any) -> np.ndarray:
    """The learning rate of the last update of each remaining step of `steps`, given the optimiser's count of
    updates."""
    counts = [int(leaf) for leaf in jax.tree.leaves(state.networks["policy"].optimizer_state) if leaf.shape == ()]
    updates = training.epochs_per_batch * training.minibatches_per_epoch
    left = np.arange(1, max(steps - int(state.step), 0) + 1)
    rates = jax.jit(learning_rate(training))(max(counts, default=0) + left * updates - 1)  # one program, not many
    return np.broadcast_to(np.asarray(rates), left.shape)
