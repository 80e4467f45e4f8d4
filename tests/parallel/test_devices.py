"""One device and eight: the same tokens, rewards and parameters (laws 2 and 4).

`facts` computes everything that is compared. The test calls it on one device; this file, run as a script in a process
that sees eight virtual CPU devices, calls it on a mesh of eight and saves the result.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrl_llm
from jaxrl_llm.advantages import group_normalized
from jaxrl_llm.evaluation.evaluate import decoding_program
from jaxrl_llm.experience import Prompts
from jaxrl_llm.losses import clipped_surrogate
from jaxrl_llm.models import TransformerConfig, abstract, transformer
from jaxrl_llm.parallel import make_mesh, replicate, row_constraint
from jaxrl_llm.parallel.rules import RULES
from jaxrl_llm.rollout import generate
from jaxrl_llm.run.compilation import CompilationWatch
from jaxrl_llm.training import Placement, Resources, Rollout, Update, make_train_step
from jaxrl_llm.training.segments import parameter_shardings

PROMPTS, SAMPLES, STEPS, UPDATES = 8, 4, 7, 3
MODEL = transformer(TransformerConfig(vocabulary_size=9, width=16, layers=1, heads=2, kv_heads=1))


def even_share(tokens, mask):
    """Share of even tokens: a reward that any policy can raise."""
    return ((tokens % 2 == 0) * mask).sum(-1) / mask.sum(-1)


def initial_params():
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.4 * rng.standard_normal(leaf.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, abstract(MODEL.specs)) | {"final_norm": jnp.ones(16)}


def prompts_of(step: int) -> Prompts:
    rng = np.random.default_rng(step)
    return Prompts(
        tokens=jnp.asarray(rng.integers(0, 9, (PROMPTS, 5)), jnp.int32),
        length=jnp.asarray(rng.integers(1, 6, PROMPTS), jnp.int32),
        prompt_id=jnp.arange(PROMPTS, dtype=jnp.int32) + PROMPTS * step,
        answer_tokens=jnp.zeros((PROMPTS, 1), jnp.int32),
        answer_length=jnp.zeros(PROMPTS, jnp.int32),
    )


def facts(mesh) -> dict[str, np.ndarray]:
    """Three training steps, each one whole program, and what they left behind."""
    step = make_train_step(
        MODEL,
        optax.sgd(0.5, momentum=0.9),
        source=Rollout(SAMPLES, max_completion_tokens=STEPS, eos_ids=(1,), pad_id=1, prompts_per_step=PROMPTS),
        rewards=[even_share],
        credit=[("advantages", group_normalized)],
        losses=[clipped_surrogate],
        update=Update(minibatches_per_epoch=2, sequences_per_microbatch=8),
        resources=Resources(placement=Placement(mesh)),
    )
    state = step.init(jax.random.key(5), initial_params())
    found = {}
    for number in range(UPDATES):
        prompts = prompts_of(number)
        with CompilationWatch() as watch:
            state, metrics, experience = step.run(state, prompts)
        found[f"compilations {number}"] = watch.count + watch.read
        for name in ("tokens", "length", "truncated", "rewards", "advantages", "behaviour_logprobs"):
            found[f"{name} {number}"] = experience[name]
        found |= {f"metric {name} {number}": value for name, value in metrics.items()}
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.networks["policy"].optimizer_state)):
        found[f"state {jax.tree_util.keystr(path)}"] = leaf
    found["rows of a device"] = experience.tokens.addressable_shards[0].data.shape[0]
    found["state is replicated"] = all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
    return {name: np.asarray(value) for name, value in found.items()}


def placed_by_evaluation(mesh, gather: bool) -> int:
    """How many arrays a program of an evaluation asks the compiler to place."""
    tokenizer = SimpleNamespace(eos_ids=(1,), pad_id=1)
    program = decoding_program(MODEL, tokenizer, SAMPLES, STEPS, 1.0, mesh, RULES, gather, None, {})
    params = jax.device_put(initial_params(), parameter_shardings(MODEL, mesh, RULES))
    traced = jax.make_jaxpr(program)(params, prompts_of(0), jnp.ones(PROMPTS), jax.random.key(0))
    return str(traced).count("sharding_constraint[")


def facts_of_many_devices() -> dict[str, np.ndarray]:
    """What only a mesh of several devices can show."""
    mesh = make_mesh()
    constrain = row_constraint(mesh)
    rows = {"six": jnp.arange(6), "sixteen": jnp.arange(32).reshape(16, 2)}
    placed = jax.jit(constrain)(rows)
    # The key-value cache is made inside the program, and nothing constrains it by name: it must be spread all the same.
    compiled = (
        jax.jit(
            lambda params, prompts: generate(
                MODEL,
                params,
                prompts,
                jax.random.key(0),
                0,
                samples_per_prompt=SAMPLES,
                max_completion_tokens=STEPS,
                eos_ids=(1,),
                pad_id=1,
                constrain=constrain,
            )
        )
        .lower(replicate(initial_params(), mesh), prompts_of(0))
        .compile()
        .as_text()
    )
    cache = lambda rows: f"f32[{rows},1,{STEPS},8]"  # noqa: E731
    return {
        "devices": np.asarray(mesh.size),
        "placed in evaluation": np.asarray(
            [placed_by_evaluation(make_mesh(8, {"fsdp": 8}), gather) for gather in (True, False)]
        ),
        "two devices": np.asarray(make_mesh(2).size),
        "six": np.asarray(placed["six"]),
        "constraints": np.asarray(str(jax.make_jaxpr(constrain)(rows)).count("sharding_constraint[")),
        "rows of six on a device": np.asarray(placed["six"].addressable_shards[0].data.shape[0]),
        "sixteen": np.asarray(placed["sixteen"]),
        "rows of sixteen on a device": np.asarray(placed["sixteen"].addressable_shards[0].data.shape[0]),
        "whole caches": np.asarray(compiled.count(cache(PROMPTS * SAMPLES))),
        "split caches": np.asarray(compiled.count(cache(PROMPTS * SAMPLES // 8))),
    }


@pytest.fixture(scope="module")
def one_and_eight(tmp_path_factory):
    """`facts` of one device, and of eight in a process of their own that runs meanwhile."""
    path = tmp_path_factory.mktemp("devices") / "eight.npz"
    root = str(Path(jaxrl_llm.__file__).parent.parent)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, __file__, str(path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            one = facts(None)
            output, _ = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 0, output
    with np.load(path) as eight:
        return one, dict(eight)


def test_three_steps_on_eight_devices_equal_those_on_one(one_and_eight):
    one, eight = one_and_eight
    for name, value in one.items():
        if name.startswith(("tokens", "length", "truncated")):
            np.testing.assert_array_equal(eight[name], value, err_msg=name)
        elif name.startswith(("rewards", "behaviour", "state [", "state (")):
            np.testing.assert_allclose(eight[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
        elif name.startswith(("advantages", "metric")):
            np.testing.assert_allclose(eight[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_steps_learned_something_and_stayed_on_policy(one_and_eight):
    # Otherwise equal parameters would say nothing.
    one, _ = one_and_eight
    start = {f"state [0]{jax.tree_util.keystr(p)}": x for p, x in jax.tree_util.tree_leaves_with_path(initial_params())}
    assert start.keys() < one.keys()
    assert all(np.abs(one[name] - leaf).max() > 1e-3 for name, leaf in start.items())
    assert all(one[f"metric sampler_gap_max {number}"] < 1e-5 for number in range(UPDATES))
    assert len({tuple(one[f"tokens {number}"].ravel()) for number in range(UPDATES)}) == UPDATES


def test_rows_are_spread_the_state_is_not_and_nothing_compiles_twice(one_and_eight):
    one, eight = one_and_eight
    assert one["rows of a device"] == PROMPTS * SAMPLES
    assert eight["rows of a device"] == PROMPTS * SAMPLES // 8
    assert eight["state is replicated"]
    for found in one_and_eight:
        compilations = [int(found[f"compilations {number}"]) for number in range(UPDATES)]
        assert compilations[0] > 0
        assert compilations[1:] == [0] * (UPDATES - 1)


def test_the_cache_of_a_device_holds_its_own_rows_only(one_and_eight):
    _, eight = one_and_eight
    assert eight["whole caches"] == 0
    assert eight["split caches"] > 0


def test_an_evaluation_gathers_weights_at_once_only_where_it_may(one_and_eight):
    _, eight = one_and_eight
    at_once, as_they_lie = eight["placed in evaluation"]
    assert at_once - as_they_lie == len(jax.tree.leaves(MODEL.specs))


def test_rows_that_do_not_divide_are_left_where_they_are(one_and_eight):
    _, eight = one_and_eight
    assert (eight["devices"], eight["two devices"]) == (8, 2)
    np.testing.assert_array_equal(eight["six"], np.arange(6))
    np.testing.assert_array_equal(eight["sixteen"], np.arange(32).reshape(16, 2))
    assert eight["constraints"] == 1
    assert eight["rows of six on a device"] == 6
    assert eight["rows of sixteen on a device"] == 2


if __name__ == "__main__":
    np.savez(sys.argv[1], **facts(make_mesh()), **facts_of_many_devices())
