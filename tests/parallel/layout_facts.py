"""What a short training run leaves behind on each layout of eight virtual devices; test_layouts.py runs this script."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_llm.advantages import gae, gae_returns, group_normalized, whitened
from jaxrl_llm.experience import Prompts
from jaxrl_llm.losses import clipped_surrogate, clipped_value, divergence, kl_estimate
from jaxrl_llm.models import TransformerConfig, transformer
from jaxrl_llm.models.experts import ExpertsConfig
from jaxrl_llm.models.own_layout import in_own_layout
from jaxrl_llm.parallel import make_mesh
from jaxrl_llm.rows import Replay
from jaxrl_llm.signatures import renamed
from jaxrl_llm.training import Network, Placement, Resources, Rollout, Update, make_train_step

PROMPTS, SAMPLES, WIDTH, STEPS = 8, 4, 8, 10
DENSE = dict(vocabulary_size=16, width=32, layers=2, heads=4, kv_heads=2, mlp_width=64, layer_loop="scanned")
LAYOUTS = {
    "8 x 1": {"fsdp": 8},
    "2 x 4": {"fsdp": 4, "tensor": 2},
    "2 x 2 x 2": {"fsdp": 2, "sequence": 2, "tensor": 2},
}
# With the product that computes them.
EXPERT_LAYOUTS = {
    "4 experts x 2": ("ragged", {"fsdp": 2, "expert": 4}),
    "2 x 2 experts x 2": ("dense", {"data": 2, "expert": 2, "tensor": 2}),
    "2 x 2 experts x 2, ragged": ("ragged", {"fsdp": 2, "expert": 2, "tensor": 2}),
}
# With a value network, a reference that moves, and rows of earlier steps; and what is kept on the host.
OF_SEVERAL_NETWORKS = {
    "networks, 4 x 2": ({"fsdp": 4, "tensor": 2}, frozenset()),
    "networks, 2 x 2 x 2, offloaded": (
        {"data": 2, "fsdp": 2, "tensor": 2},
        frozenset({"optimizer", "reference"}),
    ),
}


# The policy is split over both axes; the teacher keeps its width whole and splits its inner width over both.
OF_TEACHER = {"embed": (), "mlp": ("tensor", "fsdp"), "vocabulary": ("fsdp",)}


def even_share(tokens, mask):
    """Share of even tokens: a reward that any policy can raise."""
    return ((tokens % 2 == 0) * mask).sum(-1) / mask.sum(-1)


def prompts_of(step: int) -> Prompts:
    rng = np.random.default_rng(step)
    return Prompts(
        tokens=jnp.asarray(rng.integers(0, 16, (PROMPTS, 8)), jnp.int32),
        length=jnp.asarray(rng.integers(1, 9, PROMPTS), jnp.int32),
        prompt_id=jnp.arange(PROMPTS, dtype=jnp.int32) + PROMPTS * step,
        answer_tokens=jnp.zeros((PROMPTS, 1), jnp.int32),
        answer_length=jnp.zeros(PROMPTS, jnp.int32),
    )


def composed(mesh, *, described=DENSE, networks=False, offload=frozenset(), teacher=None, **update):
    model = transformer(TransformerConfig(**described))
    if teacher is not None:
        return of_a_teacher(model, Placement(mesh), teacher)
    if networks:
        return of_several_networks(model, Placement(mesh, offload=offload))
    return make_train_step(
        model,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
        source=Rollout(SAMPLES, max_completion_tokens=WIDTH, eos_ids=(1,), pad_id=1, prompts_per_step=PROMPTS),
        rewards=[even_share],
        credit=[("advantages", group_normalized)],
        losses=[clipped_surrogate, (divergence(samples="vocabulary", generator="reverse_kl"), 0.05)],
        update=Update(minibatches_per_epoch=2, sequences_per_microbatch=8, **update),
        resources=Resources(placement=Placement(mesh)),
    )


def of_a_teacher(model, placement: Placement, rules: dict[str, tuple[str, ...]]):
    """The distribution of a larger model on what the policy writes; the model lies by a table of its own."""
    larger = transformer(TransformerConfig(**(DENSE | {"width": 64, "mlp_width": 128})))
    return make_train_step(
        model,
        optax.adamw(1e-3),
        source=Rollout(SAMPLES, max_completion_tokens=WIDTH, eos_ids=(1,), pad_id=1, prompts_per_step=PROMPTS),
        rewards=[even_share],
        losses=[renamed(divergence(samples="vocabulary"), over_vocabulary="teacher_over_vocabulary")],
        update=Update(minibatches_per_epoch=2, sequences_per_microbatch=8),
        resources=Resources(
            networks={"teacher": Network(origin="given", model=in_own_layout(larger, rules))}, placement=placement
        ),
    )


def of_several_networks(model, placement: Placement):
    """A critic, a reference that is copied every third step, and a third of each batch from earlier ones."""
    learner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return make_train_step(
        model,
        learner,
        source=[
            Rollout(SAMPLES, max_completion_tokens=WIDTH, eos_ids=(1,), pad_id=1, prompts_per_step=PROMPTS),
            Replay(1 / 3, batches=2, prompts_per_step=PROMPTS, max_prompt_tokens=8, max_answer_tokens=1),
        ],
        rewards=[even_share],
        credit=[("returns", gae_returns), ("advantages", gae), ("advantages", whitened)],
        losses=[clipped_surrogate, (kl_estimate, 0.05), clipped_value],
        update=Update(minibatches_per_epoch=2, sequences_per_microbatch=8),
        resources=Resources(critic=learner, networks={"reference": Network(copy_every=3)}, placement=placement),
    )


def facts(mesh, steps: int = STEPS, **options) -> dict[str, np.ndarray]:
    """Tokens and rewards of every step, and the state after the last."""
    step = composed(mesh, **options)
    given = {name: one.model.init(jax.random.key(6)) for name, one in step.composition.networks.items() if one.model}
    state, found = step.init(jax.random.key(5), None, given), {}
    found |= {f"before{jax.tree_util.keystr(p)}": x for p, x in jax.tree_util.tree_leaves_with_path(state.params)}
    found = {name: np.asarray(value) for name, value in found.items()}
    for number in range(steps):
        state, metrics, experience = step.run(state, prompts_of(number))
        found[f"loss {number}"] = np.asarray(metrics["loss"])
        for name in ("tokens", "length", "rewards"):
            found[f"{name} {number}"] = np.asarray(experience[name])
        found[f"gap {number}"] = np.asarray(metrics["sampler_gap_max"])
    held = [x for x in jax.tree.leaves(state.networks) if x.ndim]
    share = sum(x.addressable_shards[0].data.nbytes for x in held) / sum(x.nbytes for x in held)
    found["share"] = np.asarray(share)
    kinds = {name: jax.tree.leaves(one)[0].sharding.memory_kind for name, one in state.networks.items()}
    found["reference on the host"] = np.asarray(kinds.get("reference") == "pinned_host")
    if "teacher" in state.networks:  # how much of a matrix [inner width, width] a device holds
        held = state.networks["teacher"].params["blocks"]["down"].addressable_shards[0].data.shape[-2:]
        found["teacher"] = np.asarray(held)
    state = jax.device_get(state)
    for name in ("value", "reference"):
        held = state.networks[name].params if name in state.networks else {}
        found |= {f"{name}{jax.tree_util.keystr(p)}": x for p, x in jax.tree_util.tree_leaves_with_path(held)}
    if "replay" in state.store:
        found |= {f"replay {name}": x for name, x in state.store["replay"].known().items()}
    found |= {f"params{jax.tree_util.keystr(p)}": x for p, x in jax.tree_util.tree_leaves_with_path(state.params)}
    moments = jax.tree_util.tree_leaves_with_path(state.networks["policy"].optimizer_state)
    return found | {f"moments{jax.tree_util.keystr(p)}": np.asarray(x) for p, x in moments}


def main(path: str) -> None:
    everything: dict[str, np.ndarray] = {}

    def add(name: str, mesh, **options) -> None:
        everything.update({f"{name}|{key}": value for key, value in facts(mesh, **options).items()})

    add("one", None)
    for name, sizes in LAYOUTS.items():
        add(name, make_mesh(8, sizes))
    with_experts = {
        product: DENSE | {"experts": ExpertsConfig(4, 2, product=product)} for product in ("ragged", "dense")
    }
    for product, described in with_experts.items():
        add(f"one {product}", None, described=described)
    for name, (product, sizes) in EXPERT_LAYOUTS.items():
        add(name, make_mesh(8, sizes), described=with_experts[product])
    add("packed, 2 x 2 x 2", make_mesh(8, {"fsdp": 2, "sequence": 2, "tensor": 2}), packing=(0.5, 0.75))
    add("trimmed, 4 x 2", make_mesh(8, {"fsdp": 4, "tensor": 2}), completion_buckets=(2, 4, 6))
    add("one networks", None, networks=True)
    for name, (sizes, offload) in OF_SEVERAL_NETWORKS.items():
        add(name, make_mesh(8, sizes), networks=True, offload=offload)
    add("one teacher", None, teacher={})
    add("teacher, 4 x 2", make_mesh(8, {"fsdp": 4, "tensor": 2}), teacher=OF_TEACHER)
    np.savez(path, **everything)


if __name__ == "__main__":
    main(sys.argv[1])
