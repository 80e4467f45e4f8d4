"""Networks: named parameters with a rule of where they come from, what moves them and what they say.

Of a policy with adapters (`Model.trained`), gradients, optimiser state, copies and checkpoints are of the adapters
alone. The rest is frozen, is in the state once, and is read by all copies of the policy.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jaxrl_llm.experience import KeyUse, NetworkState, TrainState
from jaxrl_llm.fields import nearest
from jaxrl_llm.models.heads import Backbone, HeadConfig, from_policy
from jaxrl_llm.models.model import Model
from jaxrl_llm.network_names import HEADS, compared_with, score_named
from jaxrl_llm.ranges import Count, Natural, Positive, Share, require_ranges

POLICY = "policy"
GIVEN = "given"
# Of a network that has no parameters: the rows hold what it says.
ROWS = "rows"
# The network that stands for the distributions of a file.
FILE = "file"


@dataclass(frozen=True)
class Network:
    """One network of a step beside the policy.

    Attributes:
      origin: "policy" copies the policy that the step starts from; the name of another network copies that one; "given"
        takes parameters that are handed to `TrainStep.init`; "rows" has none, and rows hold its distributions.
      model: its functions; None has those of its origin. Needed where it is given.
      head: numbers instead of log-probabilities over the vocabulary.
      says: of a head's values, one a token ("token"), or the one at the first token of a row that is trained on.
      backbone: of a head: "own" has a copy of the policy's parameters; "shared" reads the policy's hidden states, which
        then learn from its loss too.
      optimizer: it learns by it; None is not trained.
      decay: it follows its origin as a moving average that keeps this share at each step.
      copy_every: steps between copies of its origin; 0 never.
      copy_at: steps after which its origin is copied, beside those.
      snapshot: of a policy with adapters: it is the policy as the step finds it, kept as a copy of its adapters.
        Otherwise it is the base without them, unless it is moved.
      temperature: of its log-probabilities; None is that of the rollout.
      always_origin: it is its origin at every moment, for log-probabilities at another temperature.
    """

    origin: str = POLICY
    model: Model | None = None
    head: HeadConfig | None = None
    says: Literal["token", "first"] = "token"
    backbone: Backbone = "own"
    optimizer: optax.GradientTransformation | None = None
    decay: Share | None = None
    copy_every: Natural = 0
    copy_at: tuple[Count, ...] = ()
    snapshot: bool = False
    temperature: Positive | None = None
    always_origin: bool = False

    def __post_init__(self):
        if self.backbone not in ("own", "shared"):
            raise ValueError(f"networks: backbone is {self.backbone!r}; it must be 'own' or 'shared'")
        require_ranges(self, "networks")
        if self.optimizer is not None and self.moves:
            raise ValueError("networks: a network that learns cannot follow another one too; leave one of them out")
        if self.origin == GIVEN and self.model is None:
            raise ValueError("networks: a network whose parameters are given needs its model")

    @property
    def copied(self) -> bool:
        """Whether its origin is copied into it at some step."""
        return bool(self.copy_every or self.copy_at)

    @property
    def moves(self) -> bool:
        """Whether it follows its origin."""
        return self.copied or self.decay is not None


def default_network(name: str, critic: optax.GradientTransformation | None) -> Network | None:
    """The network that a name alone brings into a step; None for a name that has to be described.

    Args:
      name: of the network.
      critic: optimiser of networks with a head; without one they are not there.
    """
    if name == "reference":
        return Network()
    if name in HEADS and critic is not None:
        return Network(
            head=HeadConfig(outputs=HEADS[name]), says="first" if name == "twin" else "token", optimizer=critic
        )
    if name.removesuffix("_target") in HEADS and name.endswith("_target") and critic is not None:
        return Network(origin=name.removesuffix("_target"), always_origin=True)
    return None


def networks_named(
    wanted: Collection[str],
    given: Mapping[str, Network],
    views: Collection[str],
    critic: Any,
    writers: Collection[str] = (),
) -> dict[str, Network]:
    """The networks, beside the policy, that a collection of data names asks for, and those that write views.

    A network that is described and that nothing names is not there; what another one is made from, is.
    """
    known = dict(given)
    for name in ("reference", *HEADS, *(f"{head}_target" for head in HEADS)):
        if name not in known and (network := default_network(name, critic)) is not None:
            known[name] = network
    asked = {s.network for name in wanted if (s := score_named(name, [POLICY, *known], views)) is not None}
    asked |= {other for name in wanted if (other := compared_with(name)) is not None}
    asked |= {*writers, *(["reference"] if "kl_reference_per_token" in wanted else [])}
    made: dict[str, Network] = {}
    asked |= {one for name in asked & known.keys() for one in _made_from(name, known)}
    for name in sorted(asked & known.keys(), key=_order):
        for one in reversed(_made_from(name, known)):
            made.setdefault(one, known[one])
    return made


def _made_from(name: str, known: Mapping[str, Network]) -> list[str]:
    """A network and those that it is made from, one after the other.

    Raises:
      ValueError: where one of them is not there, or they are made from each other.
    """
    chain = [name]
    while (origin := known[chain[-1]].origin) not in (POLICY, GIVEN, ROWS):
        if origin not in known:
            raise ValueError(f"networks.{chain[-1]}.origin is {origin!r}; {nearest(origin, [POLICY, GIVEN, *known])}")
        if origin in chain:
            raise ValueError(f"networks {', '.join(chain)} are made from each other; make one of them from the policy")
        chain.append(origin)
    return chain


def _order(name: str) -> tuple[int, str]:
    order = ["reference", *HEADS]
    return (order.index(name) if name in order else len(order), name)


# ---- parts of a policy with adapters --------------------------------------------------------------------------------


def trainable_part(model: Model, params: PyTree) -> Any:
    """What learns of a policy's parameters."""
    return params if model.trained is None else model.trained.split(params)[0]


def frozen_part(model: Model, params: PyTree) -> PyTree:
    """What does not; None where all of them learn."""
    return None if model.trained is None else model.trained.split(params)[1]


def whole(model: Model, trainable: PyTree, frozen: PyTree) -> PyTree:
    """The parameters that a model is applied with, from both parts."""
    return trainable if model.trained is None else model.trained.join(trainable, frozen)


def backbone_of(model: Model, params: PyTree, policy: PyTree, frozen: PyTree = None) -> PyTree:
    """Parameters of the model whose hidden states a head reads: its own backbone, or the policy's that it shares.

    Args:
      model: the architecture of the backbone.
      params: "head", and "backbone" where it does not share the policy's.
      policy: the policy's parameters.
      frozen: those of them that a backbone of its own reads too.
    """
    return whole(model, params["backbone"], frozen) if "backbone" in params else policy


# ---- states ---------------------------------------------------------------------------------------------------------


def has_copy(model: Model, network: Network) -> bool:
    """Whether the state holds parameters for a network. A policy with adapters can have its base as a reference."""
    if network.always_origin or network.origin == ROWS:
        return False
    plain_copy = network.origin == POLICY and network.head is None and network.optimizer is None
    return not plain_copy or model.trained is None or network.snapshot or network.moves


def initial_networks(
    model: Model,
    optimizer: optax.GradientTransformation,
    networks: Mapping[str, Network],
    key: Array,
    params: PyTree | None,
    given: Mapping[str, PyTree],
) -> dict[str, NetworkState]:
    """States of the policy and of the networks beside it. Everything is copied, so the caller's arrays stay usable.

    Args:
      model: the policy.
      optimizer: of the policy.
      networks: beside it, each after the one that it is made from.
      key: of the run.
      params: of the policy; None draws them.
      given: parameters of networks by name: of those that are given, and of others in the place of their origin.

    Raises:
      ValueError: for a network whose parameters are missing.
    """
    copied = partial(jax.tree.map, jnp.copy)
    at_start = jax.random.fold_in(key, KeyUse.INITIALISE)
    params = model.init(at_start) if params is None else copied(params)
    states = {POLICY: NetworkState(params, optimizer.init(trainable_part(model, params)))}
    for name, network in networks.items():
        if not has_copy(model, network):
            continue
        if name in given:
            own = copied(given[name])
        elif network.origin == GIVEN:
            raise ValueError(
                f"network {name!r} has parameters of its own, which nothing made; hand them to init(key, params, "
                f"{{{name!r}: ...}}), or name the stage or path that they come from"
            )
        elif network.head is not None and network.origin == POLICY:
            number = list(HEADS).index(name) if name in HEADS else zlib.crc32(name.encode()) % 2**31
            learns = trainable_part(model, params)
            own = from_policy(
                model, learns, jax.random.fold_in(at_start, number), network.head, backbone=network.backbone
            )
        elif network.origin == POLICY:
            own = copied(trainable_part(model, params))
        else:
            own = copied(states[network.origin].params)
        learner = network.optimizer
        states[name] = NetworkState(own, None if learner is None else learner.init(own))
    return states


def given_shapes(networks: Mapping[str, Network]) -> dict[str, PyTree]:
    """Shapes of the parameters that the caller has to give."""

    def params(network: Network) -> PyTree:
        assert network.model is not None  # `Network` has seen to it
        key = jax.random.key(0)
        drawn = network.model.init(key)
        if network.head is None:
            return drawn
        return from_policy(network.model, drawn, key, network.head, backbone=network.backbone)

    return {
        name: jax.eval_shape(partial(params, network)) for name, network in networks.items() if network.origin == GIVEN
    }


def current(model: Model, networks: Mapping[str, Network], state: TrainState, name: str) -> PyTree:
    """Parameters of a network as its model takes them; of one with a head, as the head takes them."""
    if name == POLICY:
        return state.params
    network = networks[name]
    if network.origin == ROWS:
        return {}
    if network.always_origin:
        return current(model, networks, state, network.origin)
    if network.origin == POLICY and network.head is None and model.trained is not None and network.model is None:
        if name not in state.networks:
            return model.trained.reference(state.params)
        return whole(model, state.networks[name].params, frozen_part(model, state.params))
    return state.networks[name].params


def moved(model: Model, networks: Mapping[str, Network], state: TrainState) -> TrainState:
    """The state after a step, with every network that follows another moved."""
    after = dict(state.networks)
    for name, network in networks.items():
        if name not in after or not network.moves:
            continue
        ahead = trainable_part(model, state.params) if network.origin == POLICY else after[network.origin].params
        params = after[name].params
        if network.decay is not None:
            params = ema(ahead, params, decay=network.decay)
        due = jnp.bool_(False)
        if network.copy_every:
            due |= state.step % network.copy_every == 0
        if network.copy_at:
            due |= jnp.isin(state.step, jnp.asarray(network.copy_at))
        if network.copied:
            params = jax.tree.map(lambda new, old: jnp.where(due, new, old), ahead, params)  # noqa: B023
        after[name] = replace(after[name], params=params)
    return replace(state, networks=after)


def ema(params: PyTree, anchor: PyTree, *, decay: float = 0.99) -> PyTree:
    """The anchor after one step towards the parameters: decay * anchor + (1 - decay) * params.

    As a reference policy it lets the divergence limit how fast the policy changes instead of how far it gets. Computed
    in float32 and returned in the anchor's dtype. Keep the anchor in float32 where decay is near 1: bfloat16 resolves
    one part in 256 at best, and smaller steps would leave it standing still.

    Args:
      params: the policy.
      anchor: the same pytree, from earlier steps.
      decay: share of the anchor that is kept.

    Returns:
      The new anchor.

    Raises:
      ValueError: for a decay outside [0, 1].

    Reference: T1 (2501.11651).
    Certainty: recalled
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay is {decay}; it is the share of the anchor that is kept and must lie in [0, 1]")

    def follow(new, old):
        mixed = decay * old.astype(jnp.float32) + (1 - decay) * new.astype(jnp.float32)
        return mixed.astype(old.dtype)

    return jax.tree.map(follow, params, anchor)
