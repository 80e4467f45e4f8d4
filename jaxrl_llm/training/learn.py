"""Learn: experience -> new parameters, over epochs, minibatches and microbatches.

Losses are sums and counts. The counts do not depend on the parameters, so the counts of a whole minibatch are known
before the first microbatch is differentiated, and the gradient does not depend on the split of the minibatch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jaxrl_llm.experience import Experience, KeyUse, Loss, NetworkState, TrainState
from jaxrl_llm.fields import of_batch
from jaxrl_llm.models.stored_distributions import as_states
from jaxrl_llm.network_names import Score, compared_with
from jaxrl_llm.parallel.placement import constrained_like
from jaxrl_llm.parallel.rules import constrain_rows
from jaxrl_llm.rows import minibatch_rows
from jaxrl_llm.signatures import call, required
from jaxrl_llm.terms import LossTerm
from jaxrl_llm.training.composition import Composition
from jaxrl_llm.training.metrics import drift_of, learn_metrics
from jaxrl_llm.training.networks import (
    POLICY,
    ROWS,
    current,
    frozen_part,
    trainable_part,
    whole,
)
from jaxrl_llm.training.passes import Compared, Plain, Size, at_smallest_size, scored
from jaxrl_llm.training.scores import of_head, sequences

# Outputs of the routers of a mixture of experts, for each token of prompt and completion.
ROUTER = ("router_choices", "router_probabilities")


@dataclass(frozen=True)
class Objective:
    """The weighted sum of losses as a function of parameters and rows. Only the fields that the losses read are
    computed.

    `entropy` and `over_vocabulary` functionals are evaluated in the same chunked pass as the log-probabilities; another
    network is evaluated if a loss reads its outputs.

    Attributes:
      c: the composition of the step.
      losses: the terms.
      samples: number of consecutive rows of one prompt.
    """

    c: Composition
    losses: tuple[LossTerm, ...]
    samples: int = 1

    @property
    def wanted(self) -> frozenset[str]:
        """Every name that at least one loss requires."""
        return required([term.function for term in self.losses])

    def spoken(self) -> dict[str, Score]:
        """Names of outputs of networks that learn, except those of the policy on its own rows."""
        own = {"logprobs", "entropy"}
        found = {name: self.c.score(name) for name in sorted(self.wanted - own)}
        return {n: s for n, s in found.items() if s is not None and not s.as_found and s.network in self.c.learning}

    @property
    def compared(self) -> dict[str, dict[str, Any]]:
        """Functionals over the vocabulary of the losses, by network and loss."""
        found: dict[str, dict[str, Any]] = {}
        for term in self.losses:
            if term.compares is not None:
                network = str(compared_with(term.compares))
                found.setdefault(network, {})[term.name] = term.function.over_vocabulary  # type: ignore[attr-defined]
        return found

    @property
    def comparing(self) -> list[str]:
        """Names of the losses with such a functional, in the order of `TokenStatistics.over_vocabulary`."""
        return [name for functionals in self.compared.values() for name in functionals]

    def terms(self, rows: Experience, learner: dict[str, Any], functionals: dict[str, Any]) -> list[Loss]:
        """The losses of rows, given the arrays computed while learning by name."""
        provided = rows.known() | learner
        provided["mask"] = rows.mask * rows.weight[:, None]
        if "written_mask" in rows:
            provided["written_mask"] = rows["written_mask"] * rows.weight[:, None]
        given = [{} if t.compares is None else {t.compares: functionals.get(t.name)} for t in self.losses]
        return [_loss(term, call(term.function, provided | one)) for term, one in zip(self.losses, given, strict=True)]

    def denominators(self, rows: Experience) -> list[Array]:
        """One count per loss; they do not depend on parameters."""
        nothing = jnp.zeros(rows.tokens.shape, jnp.float32)
        placeholders: dict[str, Any] = {"logprobs": nothing}
        for name, found in self.spoken().items():
            source, _ = sequences(self.c, rows, found.view)
            placeholders[name] = jnp.zeros(self._shape(found, source), jnp.float32)
        if "entropy" in self.wanted:
            placeholders["entropy"] = nothing
        if self.wanted.intersection(ROUTER):
            shape = (rows.tokens.shape[0], rows.prompt_tokens.shape[1] + rows.tokens.shape[1], 1, 1)
            placeholders |= {"router_probabilities": jnp.zeros(shape), "router_choices": jnp.zeros(shape, jnp.int32)}
        counts = [loss.denominator for loss in self.terms(rows, placeholders, dict.fromkeys(self.comparing, nothing))]
        return [jnp.float32(1.0) if d is None else jnp.where(d == 0, 1.0, d) for d in counts]

    def _shape(self, found: Score, source: Plain) -> tuple[int, ...]:
        network = self.c.networks.get(found.network)
        if network is None or network.head is None:
            return source.tokens.shape
        outputs = () if network.head.outputs == 1 else (network.head.outputs,)
        per_row = found.quantity == "scores" or network.says == "first"
        return (*source.tokens.shape[: 1 if per_row else 2], *outputs)

    def value(
        self, trained: PyTree, state: TrainState, rows: Experience, counts: Any, factors: Any, size: Size = None
    ) -> Any:
        """(weighted sum, metrics); `trained` holds the trained parameters of each network by name."""
        c, wanted = self.c, self.wanted
        frozen = frozen_part(c.model, state.params)
        policy = whole(c.model, trained[POLICY], frozen) if POLICY in trained else state.params
        state = _with_policy(state, policy)
        learner: dict[str, Any] = {}
        hidden = statistics = None
        if POLICY in trained:
            hidden, statistics, observed = self._of_policy(policy, state, rows, size)
            learner["logprobs"] = statistics.logprobs
        learner |= self._of_networks(trained, state, rows, hidden, frozen, size)
        if statistics is not None:
            learner |= observed
            if "entropy" in wanted:
                learner["entropy"] = statistics.entropy
        functionals = {} if statistics is None else dict(zip(self.comparing, statistics.over_vocabulary, strict=True))
        parts = self.terms(rows, learner, functionals)
        values = [loss.numerator / count for loss, count in zip(parts, counts, strict=True)]
        total = sum((f * v for f, v in zip(factors, values, strict=True)), jnp.float32(0.0))
        sums = {f"loss/{term.name}": (value, 0.0) for term, value in zip(self.losses, values, strict=True)}
        sums["loss"] = (total, 0.0)
        for term, loss in zip(self.losses, parts, strict=True):
            sums |= {f"{name}/{term.name}": pair for name, pair in loss.metrics.items()}
        drift = ({}, {}) if statistics is None or c.rollout is None else drift_of(statistics.logprobs, rows)
        return jnp.asarray(total), (sums, drift)

    def _of_policy(self, policy: PyTree, state: TrainState, rows: Experience, size: Size) -> Any:
        """(hidden states, statistics of tokens, router outputs) of the policy that learns."""
        c = self.c
        with_router = bool(self.wanted.intersection(ROUTER))
        others = []
        for name, functionals in self.compared.items():
            network = c.networks[name]
            says = as_states(rows["top_tokens"], rows["top_logprobs"]) if network.origin == ROWS else None
            params = current(c.model, c.networks, state, name)
            others.append(Compared(network.model or c.model, params, tuple(functionals.values()), says))
        # The experts that sampled a token are trained on it.
        said = scored(
            c.model,
            policy,
            sequences(c, rows, "")[0],
            size,
            temperature=c.temperature,
            entropy="entropy" in self.wanted,
            others=tuple(others),
            router_choices=rows.router_choices,
            samples_per_prompt=self.samples,
            names=ROUTER if with_router else (),
        )
        return said.hidden, said.statistics, said.observed

    def _of_networks(
        self,
        trained: PyTree,
        state: TrainState,
        rows: Experience,
        hidden: Callable[[], Array] | None,
        frozen: PyTree,
        size: Size,
    ) -> dict[str, Array]:
        """Outputs of networks that learn: heads on rows and views, and the policy on views."""
        c, learner = self.c, {}
        spoken = self.spoken()
        for network_name, view in dict.fromkeys((s.network, s.view) for s in spoken.values()):
            together = {n: s for n, s in spoken.items() if (s.network, s.view) == (network_name, view)}
            source, mask = sequences(c, rows, view)
            network = c.networks.get(network_name)
            if network is not None and network.head is not None:
                said = of_head(
                    network,
                    network.model or c.model,
                    trained[network_name],
                    source,
                    mask,
                    {s.quantity for s in together.values()},
                    policy=state.params,
                    policy_hidden=None if view or hidden is None or network.backbone == "own" else hidden(),
                    frozen=frozen if network.model is None else None,
                    size=None if view else size,
                )
                learner |= {name: said[s.quantity] for name, s in together.items()}
                continue
            own = network_name == POLICY
            model = c.model if network is None or network.model is None else network.model
            params = state.params if own else trained[network_name]
            entropy = any(s.quantity == "entropy" for s in together.values())
            plain = source._replace(support=None)
            said = scored(model, params, plain, None if view else size, temperature=c.temperature, entropy=entropy)
            for name, s in together.items():
                learner[name] = said.statistics.logprobs if s.quantity == "logprobs" else said.statistics.entropy
        return learner


def _loss(term: LossTerm, value: Any) -> Loss:
    """The result of a loss as a `Loss`; a plain (sum, count) pair is accepted."""
    if isinstance(value, tuple) and 2 <= len(value) <= 3:
        numerator, denominator, *metrics = value
        if jnp.shape(numerator) == () and (denominator is None or jnp.shape(denominator) == ()):
            return Loss(numerator, denominator, *metrics)
    shape = getattr(value, "shape", None)
    said = f"a {type(value).__name__}" if shape is None else f"an array of shape {shape}"
    raise ValueError(
        f"loss {term.name!r} returned {said}; it must return a sum and a count, both scalars, so that any split of a "
        "batch gives the same gradient: Loss(sum, count) of jaxrl_llm, see also losses.aggregate"
    )


def _with_policy(state: TrainState, policy: PyTree) -> TrainState:
    """The state with these parameters of the policy."""
    one = replace(state.networks[POLICY], params=policy)
    return replace(state, networks={**state.networks, POLICY: one})


def parts_of(c: Composition, state: TrainState) -> dict[str, PyTree]:
    """The trained parameters of each network that the losses change."""
    return {
        name: trainable_part(c.model, state.params) if name == POLICY else state.networks[name].params
        for name in sorted(c.learning, key=lambda name: (name != POLICY, name))
    }


def specs_of(c: Composition) -> Any:
    """The specifications of the trained parameters of the policy; None for a model without them."""
    return None if c.model.specs is None else trainable_part(c.model, c.model.specs)


def make_learn(c: Composition) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Build learn(state, experience, coefficients, joined) -> (state, metrics); `joined` is the number of groups at the
    end of the experience that were not sampled in this step."""
    update, optimizers = c.update, _optimizers(c)
    specs = specs_of(c)

    @jax.named_scope("update")
    def learn(state: TrainState, experience: Experience, coefficients: Sequence[Array], joined: int = 0):
        # Written rows need not be grouped by prompt, and a microbatch may split a group.
        whole_groups = c.equal_groups and not joined and (update.sequences_per_microbatch or c.samples) % c.samples == 0
        objective = Objective(c, c.losses, c.samples if whole_groups else 1)
        groups = experience.tokens.shape[0] // c.samples
        key = jax.random.fold_in(jax.random.fold_in(state.key, KeyUse.MINIBATCHES), state.step)
        sizes = [groups - joined, joined]
        order = minibatch_rows(key, update.epochs_per_batch, update.minibatches_per_epoch, sizes, c.samples)
        waits = state.step < update.freeze_policy_steps if update.freeze_policy_steps else None

        def one_update(carry, rows):
            trained, states = carry
            batch = experience if order.shape[0] == 1 else _taken(experience, rows)
            grads, (sums, (peaks, drift)) = gradient(objective, specs, trained, state, batch, coefficients)
            after, states_after = {}, {}
            for name in trained:
                told = (grads[name], states[name], trained[name])
                deltas, states_after[name] = optimizers[name].update(*told, value=sums["loss"][0])
                after[name] = optax.apply_updates(trained[name], deltas)
                # The norm after the update: the parameters of a checkpoint are checked before it is written.
                label = "" if name == POLICY else f"/{name}"
                sums |= {f"gradient_norm{label}": (_norm(grads[name]), 0.0)}
                sums |= {f"parameter_norm{label}": (_norm(after[name]), 0.0)}
            if waits is not None and POLICY in trained:
                after[POLICY] = _chosen(waits, trained[POLICY], after[POLICY])
                states_after[POLICY] = _chosen(waits, states[POLICY], states_after[POLICY])
            return (after, states_after), (sums, peaks, drift)

        trained = parts_of(c, state)
        carry = (trained, {name: state.networks[name].optimizer_state for name in trained})
        if order.shape[0] == 1:
            carry, logged = one_update(carry, order[0])
            logged = jax.tree.map(lambda x: jnp.asarray(x)[None], logged)
        else:
            carry, logged = jax.lax.scan(one_update, carry, order)
        return _learned(c, state, *carry), learn_metrics(*logged)

    return learn


def _taken(experience: Experience, rows: Array) -> Experience:
    """Some rows of a batch, with the fields that belong to the whole batch."""
    return constrain_rows(jax.tree.map(lambda x: x[rows], experience)).filled(**of_batch(experience))


def _optimizers(c: Composition) -> dict[str, optax.GradientTransformationExtraArgs]:
    """The optimiser of each network that learns; optimisers that read it get the loss as `value`."""
    own = {name: network.optimizer for name, network in c.networks.items() if network.optimizer is not None}
    return {name: optax.with_extra_args_support(made) for name, made in ({POLICY: c.optimizer} | own).items()}


def gradient(
    objective: Objective, specs: Any, trained: PyTree, state: TrainState, rows: Experience, factors: Any
) -> Any:
    """(gradients by network, metrics) of the objective on rows, accumulated over microbatches."""
    counts = objective.denominators(rows)
    size = objective.c.update.sequences_per_microbatch or rows.tokens.shape[0]
    pieces = rows.tokens.shape[0] // size
    slope = jax.grad(objective.value, has_aux=True)

    def differentiate(trained, rows):
        def at(rows: Experience, size: Size) -> Any:
            grads, aux = slope(trained, state, rows, counts, factors, size)
            return _like_parameters(specs, grads), aux

        return at_smallest_size(objective.c.update, rows, at)

    if pieces == 1:
        return differentiate(trained, rows)
    whole_batch = of_batch(rows)
    apart = replace(rows, fields={name: x for name, x in rows.fields.items() if name not in whole_batch})
    split = constrain_rows(jax.tree.map(lambda x: x.reshape(pieces, size, *x.shape[1:]), apart), None)

    def accumulate(carry, piece):
        grads, (sums, (peaks, drift)) = differentiate(trained, piece.filled(**whole_batch))
        old_grads, (old_sums, (old_peaks, old_drift)) = carry
        add = lambda a, b: jax.tree.map(jnp.add, a, b)  # noqa: E731
        peaks = jax.tree.map(jnp.maximum, old_peaks, peaks)
        return (add(old_grads, grads), (add(old_sums, sums), (peaks, add(old_drift, drift)))), None

    one = jax.tree.map(lambda x: x[0], split).filled(**whole_batch)
    first = jax.eval_shape(differentiate, trained, one)
    grads, aux = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
    return jax.lax.scan(accumulate, (_like_parameters(specs, grads), aux), split)[0]


def _like_parameters(specs: Any, grads: PyTree) -> PyTree:
    """Gradients in the sharding of their parameters, so that each device accumulates only its own part."""

    def pinned(name: str, tree: PyTree) -> PyTree:
        if name == POLICY:
            return constrained_like(specs, tree)
        if not (isinstance(tree, dict) and "head" in tree and "backbone" in tree):
            return tree
        try:
            return tree | {"backbone": constrained_like(specs, tree["backbone"])}
        except ValueError:  # a backbone of another architecture
            return tree

    return {name: pinned(name, tree) for name, tree in grads.items()}


def _learned(c: Composition, state: TrainState, trained: PyTree, optimizer_states: PyTree) -> TrainState:
    """The state with the updated parameters, one step later."""
    after = dict(state.networks)
    for name, params in trained.items():
        if name == POLICY:
            params = whole(c.model, params, frozen_part(c.model, state.params))
        after[name] = NetworkState(params, optimizer_states[name])
    return replace(state, networks=after, step=state.step + 1)


def _chosen(condition: Array, yes: PyTree, no: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _norm(tree: PyTree) -> Array:
    return optax.tree.norm(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree))
