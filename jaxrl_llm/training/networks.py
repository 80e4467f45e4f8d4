"""Networks: named parameters with their origin, update rule and head.

For a policy with adapters (`Model.trained`), gradients, optimiser state, copies and checkpoints contain only the
adapters. The frozen rest is in the state once and shared by all copies of the policy.
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
# Origin of a network without parameters, whose outputs are stored in the rows.
ROWS = "rows"
# The network for the distributions of a file.
FILE = "file"


@dataclass(frozen=True)
class Network:
    """One network of a step beside the policy.

    Attributes:
      origin: "policy" copies the initial policy; the name of another network copies that network; "given" uses
        parameters passed to `TrainStep.init`; "rows" has no parameters: its distributions are stored in the rows.
      model: its functions; None: those of its origin. Required for "given".
      head: the network returns numbers instead of log-probabilities.
      says: which values of a head are used: one per token ("token"), or the one at the first trained token of a row.
      backbone: of a head: "own" has a copy of the policy's parameters; "shared" reads the policy's hidden states, so
        the policy also gets the gradient of its loss.
      optimizer: its optimiser; None: not trained.
      decay: the network is a moving average of its origin that keeps this share at each step.
      copy_every: steps between copies of its origin; 0: never.
      copy_at: further steps after which its origin is copied.
      snapshot: for a policy with adapters: the network is a copy of the initial policy, stored as its adapters.
        Otherwise it is the base without adapters, unless it is updated.
      temperature: of its log-probabilities; None: that of the rollout.
      always_origin: the network always equals its origin, for log-probabilities at another temperature.
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
            raise ValueError("networks: a network that learns cannot also follow another one; leave one of them out")
        if self.origin == GIVEN and self.model is None:
            raise ValueError("networks: a network whose parameters are given needs its model")

    @property
    def copied(self) -> bool:
        """Whether its origin is copied at some steps."""
        return bool(self.copy_every or self.copy_at)

    @property
    def moves(self) -> bool:
        """Whether it follows its origin."""
        return self.copied or self.decay is not None


def default_network(name: str, critic: optax.GradientTransformation | None) -> Network | None:
    """The network that is created without a description; None for a name that needs a description.

    Args:
      name: of the network.
      critic: optimiser of networks with a head; without it they are not created.
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
    """The networks beside the policy that a collection of data names refers to, and those that write views.

    A described network that no name refers to is left out; origins of other networks are included.
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
    """A network and its chain of origins, in order.

    Raises:
      ValueError: for an unknown origin, or a cycle.
    """
    chain = [name]
    while (origin := known[chain[-1]].origin) not in (POLICY, GIVEN, ROWS):
        if origin not in known:
            raise ValueError(f"networks.{chain[-1]}.origin is {origin!r}; {nearest(origin, [POLICY, GIVEN, *known])}")
        if origin in chain:
            raise ValueError(f"networks {', '.join(chain)} form a cycle of origins; make one of them from the policy")
        chain.append(origin)
    return chain


def _order(name: str) -> tuple[int, str]:
    order = ["reference", *HEADS]
    return (order.index(name) if name in order else len(order), name)


# ---- parts of a policy with adapters --------------------------------------------------------------------------------


def trainable_part(model: Model, params: PyTree) -> Any:
    """The trained part of a policy's parameters."""
    return params if model.trained is None else model.trained.split(params)[0]


def frozen_part(model: Model, params: PyTree) -> PyTree:
    """The frozen part; None if all parameters are trained."""
    return None if model.trained is None else model.trained.split(params)[1]


def whole(model: Model, trainable: PyTree, frozen: PyTree) -> PyTree:
    """The full parameters of a model from both parts."""
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
    """Whether the state holds parameters of a network. For a policy with adapters, the base can be the reference."""
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
      networks: networks beside it, each after its origin.
      key: of the run.
      params: parameters of the policy; None initialises them.
      given: parameters of networks by name: of those with origin "given", and of others instead of their origin.

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
                f"network {name!r} has no parameters; pass them to init(key, params, "
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
    """Shapes of the parameters that the caller must pass."""

    def params(network: Network) -> PyTree:
        assert network.model is not None  # ensured by `Network`
        key = jax.random.key(0)
        drawn = network.model.init(key)
        if network.head is None:
            return drawn
        return from_policy(network.model, drawn, key, network.head, backbone=network.backbone)

    return {
        name: jax.eval_shape(partial(params, network)) for name, network in networks.items() if network.origin == GIVEN
    }


def current(model: Model, networks: Mapping[str, Network], state: TrainState, name: str) -> PyTree:
    """Parameters of a network in the form that its model, or its head, takes."""
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
    """The state with every network that follows another one updated after a step."""
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

    As a reference policy it makes the divergence limit the speed of the policy instead of its distance from the start.
    Computed in float32 and returned in the anchor's dtype. Keep the anchor in float32 if decay is near 1: bfloat16 has
    a relative resolution of 1/256, so smaller updates would be lost.

    Args:
      params: the policy.
      anchor: pytree of the same structure, from earlier steps.
      decay: share of the anchor to keep.

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
