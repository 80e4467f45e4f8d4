"""Checks of a composed step before anything is compiled: names, capabilities, sizes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax

from jaxrl_llm.experience import FACTS, Method
from jaxrl_llm.fields import FACTS_READ_ONLY, FIELDS, METRIC, fillable, kind_of, nearest, provided_by, remedy
from jaxrl_llm.network_names import compared_with
from jaxrl_llm.rollout.capabilities import ROWS, SAMPLERS, require
from jaxrl_llm.rollout.host_environments import HostEnvironment
from jaxrl_llm.rollout.sampled import Rollout
from jaxrl_llm.signatures import missing, names, required
from jaxrl_llm.terms import View
from jaxrl_llm.training.composition import Composition
from jaxrl_llm.training.networks import POLICY
from jaxrl_llm.training.segments import OFFLOADABLE


def checked(c: Composition) -> Composition:
    """The composition itself, after checking that all names are provided and all needed capabilities offered.

    Raises:
      ValueError: naming the part, the missing name or capability, and the remedy.
    """
    if not c.losses:
        raise ValueError("losses is empty; a step needs at least one loss function")
    if c.rollout is not None and not c.rewards and (c.plan.reads_rewards or "baseline_rewards" in c.named):
        raise ValueError("rewards is empty, but the plan reads rewards; name a reward function")
    if not c.sources:
        raise ValueError("source is empty; a step needs rows: a Rollout, Written or Replay")
    if c.rollout is None and c.replay is not None:
        raise ValueError("source is only a replay store, which keeps rows sampled by a Rollout; name a Rollout too")
    if c.hardest is not None and (c.rollout is None or not c.rewards or not any(t.on_written for t in c.losses)):
        raise ValueError(
            "source.hardest keeps demonstrations of prompts that no sample solves, so it needs a sampler, rewards, and "
            "a loss on written completions, such as stored_likelihood; add the missing ones"
        )
    for kind, terms in (("reward", c.rewards), ("loss", c.losses)):
        seen = [term.name for term in terms]
        if twice := {name for name in seen if seen.count(name) > 1}:
            raise ValueError(f"{kind} {twice.pop()!r} is listed twice; give each a different name (name: ...)")
    _check_names(c)
    _check_capabilities(c)
    _check_rest(c)
    return c


def available_before_rewards(c: Composition) -> frozenset[str]:
    """Names that are available before rewards are computed."""
    given = set(FACTS) | {"step"}
    given -= {"support", "router_choices"}
    r = c.rollout
    if r is not None:
        given |= provided_by("data") | c.plan.provides - provided_by("greedy_baseline", "adaptive", "continued_steps")
        if r.environment is not None:
            given |= provided_by("environment")
        if r.engine is not None:
            given |= provided_by("engine")
        if r.replay_router:
            given |= {"router_choices"}
        if r.truncation is not None:
            given |= {"support"}
    if c.written is not None:
        given |= c.written.provides
    if c.written is not None or c.hardest is not None:
        given |= {"written_mask"}
    return frozenset(given)


def _check_names(c: Composition) -> None:
    by_network = {name for name in c.named if c.score(name) is not None}
    by_network |= provided_by("network") | c.view_masks | c.written_tokens
    learner = provided_by("learner") | {"router_choices"}
    learner |= {name for name in c.named if compared_with(name) in c.networks}
    text = provided_by("text") | {"items"} | c.resources.columns | c.written_texts
    available = available_before_rewards(c)
    # Further names that may be suggested for a misspelt one.
    scored = frozenset(by_network - learner)
    known = frozenset({"reference_logprobs", "old_logprobs", "old_entropy", *scored})
    heads = known | ({"old_values"} if c.resources.critic is not None else set())
    filled = frozenset(name for term in c.credit for name in term.names)
    later = filled | (provided_by("rewards") if c.rewards else frozenset())
    for name, view in c.views.items():
        read = available | later | c.written_tokens | (text if view.on_host else frozenset())
        _require_names(view.function, f"view {name!r}", read)
        c.made_of(name)
        if view.on_host and (c.resources.decode is None or c.resources.encode is None):
            raise ValueError(f"view {name!r} reads and writes text, so make_train_step needs decode= and encode=")
        if view.written_by is not None:
            _check_writer(c, view)
    for term in c.rewards:
        read = text if term.on_host else text - c.resources.columns
        if not term.on_host:
            _require_arrays(term.function, f"reward {term.name!r}", c.resources.columns, available | scored)
        _require_names(term.function, f"reward {term.name!r}", available | read, scored - {"logprobs", "entropy"})
        _require_views(c, term.function, f"reward {term.name!r}", available)
        if term.on_host and c.resources.decode is None and names(term.function) & text:
            raise ValueError(f"reward {term.name!r} reads text, so make_train_step needs decode= (token ids -> text)")
    for name, function in () if c.rollout is None else c.plan.readings:
        _require_names(function, f"{name!r} of rollout.plan", available | text)
        if c.resources.decode is None and names(function) & text:
            raise ValueError(
                f"{name!r} of rollout.plan reads text, so make_train_step needs decode= (token ids -> text)"
            )
    if c.rewards:
        available |= provided_by("rewards")
    if c.rollout is not None:
        available |= c.plan.provides
    gradients = provided_by("gradients") if c.rewards and POLICY in c.learning else frozenset()
    readers = [*(t.function for t in c.losses), *(t.coefficient for t in c.losses if t.coefficient_changes)]
    for index, term in enumerate(c.credit):
        later = [*(t.function for t in c.credit[index + 1 :]), *readers, *(view.function for view in c.views.values())]
        for name in term.names:
            if name in FACTS_READ_ONLY or c.score(name) is not None:
                raise ValueError(f"credit fills {name!r}, which credit may not fill; {nearest(name, fillable())}")
            if not name.startswith(METRIC) and name not in FIELDS and not any(name in names(one) for one in later):
                raise ValueError(f"credit fills {name!r}, which nothing after it reads; {nearest(name, fillable())}")
        what = f"{', '.join(term.names)} {term.name!r}"
        if term.on_host and c.resources.decode is None and names(term.function) & text:
            raise ValueError(f"{what} reads text, so make_train_step needs decode= (token ids -> text)")
        if term.over_vocabulary:
            _require_names(term.function, what, frozenset({"log_probabilities", "tokens"}))
        else:
            if not term.on_host:
                _require_arrays(term.function, what, c.resources.columns, available | heads)
            _require_names(term.function, what, available | (text if term.on_host else gradients), heads)
            _require_views(c, term.function, what, available)
        if c.samples == 1 and "advantages" in term.names and "group" in names(term.function):
            raise ValueError(
                f"rollout.samples_per_prompt is 1, but {term.name!r} compares the samples of a prompt, so every "
                "advantage would be 0; use at least 2 samples or a baseline that needs no group"
            )
        available |= set(term.names)
    remembering = [term.memory_name for term in c.credit if isinstance(term.function, Method)]
    if twice := {name for name in remembering if remembering.count(name) > 1}:
        raise ValueError(
            f"credit entry {twice.pop()!r} is listed twice and has a memory, so both would share it; "
            "leave one out, or give each Fill a different name"
        )
    for term in c.losses:
        _require_names(term.function, f"loss {term.name!r}", available | learner, heads)
        if not c.model.routed and (
            asked := sorted({"router_choices", "router_probabilities"} & required([term.function]))
        ):
            raise ValueError(
                f"loss {term.name!r} names {asked[0]!r}, but the model is not a mixture of experts; leave the loss out"
            )
        if term.coefficient_changes:
            metrics = provided_by("metrics") - ({"alignment"} if not c.update.alignment_every_steps else set())
            _require_names(term.coefficient, f"coefficient of {term.name!r}", available | metrics, heads)


def _check_writer(c: Composition, view: View) -> None:
    """Raise ValueError for a view whose networks cannot generate completions."""
    for key, name in (("written_by", view.written_by), ("mixed_with", view.mixed_with), ("guided_by", view.guided_by)):
        where = f"views.{view.name}.{key} is {name!r}"
        if name is not None and name not in (POLICY, *c.networks):
            raise ValueError(f"{where}; {nearest(str(name), [POLICY, *c.resources.networks])}")
        head = c.networks[name].head if name in c.networks else None
        if key == "guided_by":
            if name is not None and (head is None or head.outputs != 1):
                raise ValueError(f"{where}, which has no head with one output; name a value or reward network")
        elif head is not None:
            raise ValueError(f"{where}, which has a head instead of a vocabulary; name a network that generates tokens")
        if name is not None and c.rollout is None:
            raise ValueError(f"{where}, but nothing is sampled in this step; a written view needs a rollout")


def _require_names(function: Any, what: str, available: frozenset[str], scored: frozenset[str] = frozenset()) -> None:
    for name in missing(function, available | scored):
        raise ValueError(
            f"{what} names {name!r}, which nothing in this step provides; {remedy(name, available | scored)}"
        )


def _require_arrays(function: Any, what: str, columns: Collection[str], available: frozenset[str]) -> None:
    """Raise ValueError for a function inside the program that names a column of the data, which only readings get."""
    if found := [name for name in missing(function, available) if name in columns]:
        raise ValueError(
            f"{what} names {found[0]!r}, a column of the data, which only functions on the host get; add a parameter "
            "such as `completions`, or decorate the function with jaxrl_llm.signatures.reading"
        )


def _require_views(c: Composition, function: Any, what: str, available: frozenset[str]) -> None:
    """Raise ValueError if a view is requested before the fields that it is computed from are filled."""
    for name in sorted(required([function])):
        if view := c.view_of(name):
            for lacking in sorted(c.made_of(view) - available):
                raise ValueError(
                    f"{what} names {name!r}, but view {view!r} is made of {lacking!r}, which comes later; put what "
                    "fills it in front"
                )


def _check_capabilities(c: Composition) -> None:
    r = c.rollout
    if r is None:
        return
    sampler, offers = _sampler_of(r)
    plan = "rollout.plan" if r.plan is not None else "the greedy baseline ('baseline_rewards')"
    rows = ROWS - c.plan.lacks
    require(plan, c.plan.needs, sampler, offers)
    for name, wanted, capability in (
        ("rollout.replay_router", r.replay_router, "router_record"),
        ("rollout.slots", r.slots is not None, "slots"),
        ("rollout.truncation", r.truncation is not None, "truncation"),
        ("the environment", r.environment is not None, "conversations"),
        ("rollout.off_policy_steps", bool(r.off_policy_steps), "ahead"),
    ):
        if wanted:
            require(name, frozenset({capability}), sampler, offers)
    others = (("written rows", c.written), ("replay", c.replay), ("source.hardest", c.hardest))
    joined = [name for name, source in others if source is not None]
    if r.replay_router:
        require("rollout.replay_router", frozenset({"drawn_by_policy"}), "rollout.plan", rows)
        for name in joined:
            require("rollout.replay_router", frozenset({"recorded_router"}), name, frozenset())
    if r.truncation is not None:
        require("rollout.truncation", frozenset({"drawn_by_policy"}), "rollout.plan", rows)
        for name in joined:
            require("rollout.truncation", frozenset({"drawn_by_policy"}), name, frozenset())
        whole = [t.name for t in c.credit if t.over_vocabulary]
        whole += [t.name for t in c.losses if t.compares]
        for name in whole:
            require(repr(name), frozenset({"whole_vocabulary"}), "rollout.truncation", frozenset())
    for name in joined:
        require(name, frozenset({"equal_groups"}), "rollout.plan", rows)
    reading = [f"reading {term.name!r}" for term in (*c.rewards, *c.credit, *c.views.values()) if term.on_host]
    for name in [*reading, *(["data.selection"] if r.selection is not None else [])]:
        require(name, frozenset({"prompts_of_step"}), "rollout.plan", rows)
    whole = [term.name for term in c.losses if "group" in names(term.function)]
    if whole and (c.update.minibatches_per_epoch > 1 or c.update.sequences_per_microbatch is not None):
        require(
            f"loss {whole[0]!r} in minibatches or microbatches, which hold whole groups,",
            frozenset({"equal_groups"}),
            "rollout.plan",
            rows,
        )
    if r.engine is not None and jax.process_count() > 1:  # each process would request the same completions
        require("rollout.engine", {"one_process"}, f"a run of {jax.process_count()} processes", frozenset())
    if (
        isinstance(r.environment, HostEnvironment) and jax.process_count() > 1
    ):  # each process would run the same conversations
        require("the environment in Python", {"one_process"}, f"a run of {jax.process_count()} processes", frozenset())


def _sampler_of(r: Rollout) -> tuple[str, frozenset[str]]:
    if r.engine is not None:
        name = "rollout.engine"
    elif r.environment is None:
        name = "the sampler"
    else:
        name = f"the environment {'in Python' if isinstance(r.environment, HostEnvironment) else 'inside the program'}"
    return name, SAMPLERS[name]


def _check_rest(c: Composition) -> None:
    r, update, place = c.rollout, c.update, c.resources.placement
    if r is not None and r.selection is not None and r.prompts_per_step is None:
        raise ValueError("a rollout with a selection needs prompts_per_step: how many prompts it chooses")
    if r is not None:
        for name, token in (*(("eos_ids", each) for each in r.eos_ids), ("pad_id", r.pad_id)):
            if not 0 <= token < c.model.vocabulary_size:
                raise ValueError(
                    f"rollout.{name} is {getattr(r, name)}, but the model's token ids are 0 to "
                    f"{c.model.vocabulary_size - 1}; take the id from the tokenizer that made the prompts"
                )
        if r.replay_router and not c.model.routed:
            raise ValueError(
                "rollout.replay_router is true, but the model is not a mixture of experts; leave it out, or set "
                "model.experts"
            )
        if isinstance(r.environment, HostEnvironment) and (c.resources.decode is None or c.resources.encode is None):
            raise ValueError(
                "an environment in Python reads and writes text, so make_train_step needs decode= and encode="
            )
        if r.prompts_per_step is not None:
            groups = r.prompts_per_step + c.plan.extra_groups(r.prompts_per_step)
            checked_split(c, groups)
    others = {name: network.model for name, network in c.networks.items() if network.model is not None}
    for name, model in ({"the policy": c.model} | others).items():
        if update.packing and not model.packs:
            raise ValueError(
                f"training.packing is set, but the model of {name} does not support segments (Model.packs), so it "
                "could not separate packed rows; leave it out, or use training.completion_buckets"
            )
    if c.replay is not None:
        replayed_fields(c)
    if r is not None and c.written is not None and c.written.rows_per_group != c.samples:
        raise ValueError(
            f"written rows come in groups of {c.written.rows_per_group}, but samples in groups of "
            f"rollout.samples_per_prompt {c.samples}; make both equal"
        )
    held_out = c.written is not None and "validation" in c.written.provides
    if update.alignment_every_steps and not (held_out and any(t.on_written for t in c.losses)):
        raise ValueError(
            f"training.alignment_every_steps is {update.alignment_every_steps}, but alignment needs losses on written "
            "completions, other losses, and held-out rows; add source: {demonstrations: {validation: true}} "
            "and losses: stored_likelihood"
        )
    for name, network in c.networks.items():
        if network.decay is not None and c.model.trained is not None and network.origin == POLICY:
            raise ValueError(
                f"networks.{name}.decay is {network.decay}, but the policy has adapters, whose moving average is not "
                "the moving average of the merged matrices; leave it out, or use copy_every"
            )
        other = network.model
        if other is not None and other.vocabulary_size != c.model.vocabulary_size:
            text = (
                ""
                if network.head is None
                else "; a reward model with another tokenizer can be used through text (judge_rating)"
            )
            raise ValueError(
                f"networks.{name} has a vocabulary of {other.vocabulary_size}, but the policy of "
                f"{c.model.vocabulary_size}; a network that scores the policy's tokens needs the same vocabulary{text}"
            )
    if unknown := sorted(place.offload - set(OFFLOADABLE)):
        raise ValueError(f"training.offload names {unknown[0]!r}; it can name {', '.join(OFFLOADABLE)}")
    if place.offload and place.mesh is None:
        raise ValueError(
            f"offload is {sorted(place.offload)} without a mesh; pass mesh=make_mesh(), which may be of one device"
        )
    if "reference" in place.offload and not c.copies_reference:
        raise ValueError(
            "training.offload names reference, but the step keeps no copy of a reference policy; leave it out"
        )


def checked_split(c: Composition, prompts: int) -> int:
    """Microbatches in a minibatch.

    Args:
      c: the composition; losses that compare the rows of a group need whole groups.
      prompts: number of sampled groups, or of written groups if nothing is sampled.

    Raises:
      ValueError: if the batch cannot be divided as the update requires.
    """
    update, samples, joined = c.update, c.samples, c.joined_groups
    written = "the number of groups of written rows"
    first = written if c.rollout is None else "training.prompts_per_step"
    for count, name in ((prompts, first), (joined, written)):
        if count % update.minibatches_per_epoch:
            raise ValueError(
                f"training.minibatches_per_epoch is {update.minibatches_per_epoch}, which does not divide "
                f"{name} {count}; minibatches hold whole groups, so choose a divisor of {count}"
            )
    rows = (prompts + joined) * samples // update.minibatches_per_epoch
    size = update.sequences_per_microbatch or rows
    if rows % size:
        beside = f" and {joined * samples} written rows" if joined else ""
        raise ValueError(
            f"training.sequences_per_microbatch is {size}, which does not divide the {rows} sequences of a minibatch "
            f"({prompts} prompts x {samples} samples{beside} / {update.minibatches_per_epoch} minibatches); "
            "choose a divisor"
        )
    whole = [term.name for term in c.losses if "group" in names(term.function)]
    if whole and size % samples:
        raise ValueError(
            f"training.sequences_per_microbatch is {size}, but loss {whole[0]!r} compares the samples of a prompt, so "
            f"a microbatch must hold whole groups: choose a multiple of rollout.samples_per_prompt {samples}"
        )
    return rows // size


def replayed_fields(c: Composition) -> dict[str, str]:
    """Fields that replayed rows keep because a loss reads them, with their shapes.

    Raises:
      ValueError: for a name whose shape is not in the table, or that only rows of the current step have.
    """
    kept = {}
    for name in sorted(required([t.function for t in c.losses])):
        kind = kind_of(name)
        made = {n for term in c.credit for n in term.names} | provided_by("rewards")
        made |= provided_by("environment") if c.rollout is not None and c.rollout.environment is not None else set()
        view = c.views.get(c.view_of(name))
        gone = c.plan.provides | provided_by("network") | ({name} if view is not None and view.stored else set())
        if name in gone or (name in made and kind not in ("row", "token", "either")):
            loss = next(t.name for t in c.losses if name in required([t.function]))
            raise ValueError(
                f"loss {loss!r} names {name!r}, which replayed rows do not have; leave the loss or replay out"
            )
        if name in made:
            kept[name] = "row" if kind == "row" else "token"
    return kept
