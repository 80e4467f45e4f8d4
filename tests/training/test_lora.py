"""Training with adapters: only they are trained, have optimiser state and are stored; the base does not change."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from rich.console import Console

from jaxrl_llm import advantages, cli, losses
from jaxrl_llm.config import ConfigError, parse_config
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.models import HeadConfig, LoraConfig, lora, parameter_count, without_adapters
from jaxrl_llm.models.adapters import split
from jaxrl_llm.reporting.metric_table import OF_MACHINE
from jaxrl_llm.reporting.run_directory import read_records
from jaxrl_llm.rows import Written
from jaxrl_llm.run import stored_states
from jaxrl_llm.run.checkpoints import CheckpointError
from jaxrl_llm.run.explain import abstract_inputs
from jaxrl_llm.run.setup import parts
from jaxrl_llm.run.train import train
from jaxrl_llm.training import Network, Resources, Rollout, Update, make_train_step
from jaxrl_llm.training.networks import current, trainable_part

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Sharding info not provided")]

ROLLOUT = Rollout(samples_per_prompt=2, max_completion_tokens=6, eos_ids=(2,), pad_id=0)
LORA = LoraConfig(rank=2, alpha=4.0)
PARTS = ("down", "up")


def fives(tokens, length):
    """Number of tokens 5, as a share of the length limit."""
    return ((tokens == 5) & (jnp.arange(tokens.shape[1]) < length[:, None])).sum(1) / tokens.shape[1]


def composed(model, **changes):
    given = {
        "source": ROLLOUT,
        "rewards": [fives],
        "credit": [("advantages", advantages.group_normalized)],
        "losses": [losses.clipped_surrogate, (losses.kl_estimate, 0.01)],
    }
    return make_train_step(model, optax.adam(0.05), **(given | changes))


def with_reference(**moved):
    return Resources(networks={"reference": Network(**moved)})


def optimizer_state(state):
    return state.networks["policy"].optimizer_state


def reference_of(step, state):
    return current(step.composition.model, step.composition.networks, state, "reference")


def host(tree):
    return jax.tree.map(np.array, tree)


def same(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def sizes(tree):
    return sorted(leaf.shape for leaf in jax.tree.leaves(tree) if leaf.ndim)


@pytest.fixture(scope="module", params=[0, 8, pytest.param(4, marks=pytest.mark.slow)])
def trained(request, model, make_prompts):
    """Three steps of a policy with adapters: states on the host, metrics, shardings of the arrays of a state."""
    adapted = lora(model, LORA, bits=request.param)
    step = composed(adapted, update=Update(sequences_per_microbatch=4))
    state = step.init(jax.random.key(0))
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(replace(state, key=None))]
    states, metrics = [host(replace(state, key=None))], []
    for _ in range(3):
        state, shown = step(state, make_prompts(4))
        states.append(host(replace(state, key=None)))
        metrics.append(jax.device_get(shown))
    return SimpleNamespace(model=adapted, step=step, states=states, metrics=metrics, places=places)


class TestStep:
    def test_the_adapters_learn_and_no_bit_of_the_base_changes(self, trained):
        (adapters, base), *later = (split(state.params) for state in trained.states)
        for more, frozen in later:
            assert same(frozen, base)
            assert not same(more, adapters)
        moved = later[-1][0]["blocks"]
        assert all(np.any(pair["up"]) for pair in moved.values())
        assert all(np.isfinite(value) for shown in trained.metrics for value in shown.values())

    def test_the_optimiser_knows_the_adapters_alone(self, trained):
        adapters, frozen = split(trained.states[0].params)
        for state in trained.states:
            assert sizes(optimizer_state(state)) == sorted(sizes(adapters) * 2)
        assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) < 0.3 * parameter_count(trained.model.specs)
        assert len(jax.tree.leaves(frozen)) > 0

    def test_norms_are_those_of_the_adapters(self, trained):
        for state, shown in zip(trained.states[1:], trained.metrics, strict=True):
            adapters, _ = split(state.params)
            norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(adapters)))
            assert shown["parameter_norm"] == pytest.approx(norm, rel=1e-5)
            assert shown["gradient_norm"] > 0

    def test_the_reference_is_the_base_and_costs_nothing(self, trained, model):
        for state in trained.states:
            assert "reference" not in state.networks
            reference = reference_of(trained.step, state)
            assert same(reference, without_adapters(trained.states[0].params))
            ours = {id(leaf) for leaf in jax.tree.leaves(state.params)}
            assert all(id(leaf) in ours for leaf in jax.tree.leaves(reference))
        # The first step starts at the reference, and the later ones do not.
        divergence = [shown["loss/kl_estimate"] for shown in trained.metrics]
        assert divergence[0] == pytest.approx(0, abs=1e-6)
        assert divergence[-1] > 1e-4

    def test_no_array_is_in_the_state_twice(self, trained):
        assert len(set(trained.places)) == len(trained.places)

    def test_sampler_and_trainer_agree(self, trained):
        assert all(shown["sampler_gap_max"] < 1e-5 for shown in trained.metrics)

    def test_a_reference_that_is_refreshed_is_a_copy_of_adapters(self, model, make_prompts):
        update = Update(minibatches_per_epoch=2, epochs_per_batch=2)
        step = composed(lora(model, LORA), update=update, resources=with_reference(copy_every=2))
        state = step.init(jax.random.key(0))
        first, seen = host(split(state.params)[0]), []
        for _ in range(2):
            state, _ = step(state, make_prompts(4))
            seen.append((host(split(state.params)[0]), host(state.networks["reference"].params)))
        (after_one, held), (after_two, refreshed) = seen
        assert sizes(held) == sizes(first)
        assert same(held, first)
        assert not same(held, after_one)
        assert same(refreshed, after_two)

    def test_an_average_of_adapters_is_refused(self, model):
        with pytest.raises(ValueError, match=r"networks.reference.decay is 0.9, but the policy has adapters"):
            composed(lora(model, LORA), resources=with_reference(decay=0.9))

    @pytest.mark.parametrize("name", ["copy_every", "snapshot"])
    def test_a_reference_is_copied_where_it_has_to_be(self, model, name):
        for changes, copied in (({}, False), ({name: 1}, True)):
            step = composed(lora(model, LORA), resources=with_reference(**changes))
            state = jax.eval_shape(step.init, jax.random.key(0))
            assert ("reference" in state.networks) == copied
        # A step without a reference in its losses has none.
        step = composed(lora(model, LORA), resources=with_reference(**{name: 1}), losses=[losses.clipped_surrogate])
        assert "reference" not in jax.eval_shape(step.init, jax.random.key(0)).networks

    def test_critics_share_the_base(self, model, make_prompts):
        def with_critic(backbone):
            return composed(
                lora(model, LORA, bits=8),
                credit=[
                    ("returns", advantages.gae_returns),
                    ("advantages", advantages.gae),
                    (
                        "global_advantages",
                        lambda slow_values: slow_values,
                    ),  # creates the network
                ],
                losses=[losses.clipped_surrogate, (losses.clipped_value, 0.5)],
                resources=Resources(
                    networks={
                        "value": Network(head=HeadConfig(), backbone=backbone, optimizer=optax.adam(0.05)),
                        "slow": Network(origin="value", decay=0.5),
                    }
                ),
            )

        shared = with_critic("shared")
        state = jax.eval_shape(shared.init, jax.random.key(0))
        after, _ = jax.eval_shape(shared, state, make_prompts(4))
        assert sizes(after.networks["value"].params) == [(16, 1)]

        step = with_critic("own")
        state = step.init(jax.random.key(0))
        before, frozen = host(state.networks["value"].params), host(split(state.params)[1])
        adapters = sizes(split(state.params)[0])
        assert sizes(before) == sorted([(16, 1), *adapters])
        for _ in range(2):
            state, metrics = step(state, make_prompts(4))
        after = host(state.networks["value"].params)
        assert not np.array_equal(after["head"]["weight"], before["head"]["weight"])
        assert np.any(after["backbone"]["blocks"]["down"]["up"])
        assert sizes(state.networks["slow"].params) == sizes(after)
        assert same(host(split(state.params)[1]), frozen)
        assert metrics["gradient_norm/value"] > 0

    def test_supervised_steps_lower_the_loss_through_the_adapters(self, model, rows):
        written = Written(rows=8)
        step = make_train_step(
            lora(model, LORA, bits=8),
            optax.adam(0.03),
            source=written,
            losses=[losses.negative_log_likelihood],
        )
        state = step.init(jax.random.key(0))
        frozen, seen = host(split(state.params)[1]), []
        for _ in range(30):
            state, metrics = step(state, written=rows.filled(written_mask=rows.mask))
            seen.append(float(metrics["loss"]))
        assert seen[-1] < seen[0] - 0.5
        assert same(host(split(state.params)[1]), frozen)


# ---- runs -----------------------------------------------------------------------------------------------------------

WARM, STEPS = 2, 3


@pytest.fixture(scope="module")
def lora_tree(micro_config, tmp_path_factory):
    tree = copy.deepcopy(micro_config)
    tree |= {"lora": {"rank": 2, "alpha": 4, "rank_stabilised": True, "int8": True}, "seed": 3}
    tree["run_dir"] = str(tmp_path_factory.mktemp("lora") / "run")
    tree["model"] |= {"width": 32}
    # No answer is right yet, so there would be no gradient.
    tree["losses"] = [*tree["losses"], {"entropy_bonus": {"coefficient": 0.01}}]
    tree["warm_start"] |= {"steps": WARM, "probe_every_steps": 0}
    tree["training"] |= {"steps": STEPS}
    tree["networks"] = {}
    tree["evaluation"] = {"problems": 4, "samples_per_problem": 2, "k": [1, 2], "sequences_per_batch": 8}
    tree["checkpoints"] = {"every_steps": 1, "keep": 9}
    return tree


def config_of(tree, **changes):
    return parse_config(tree | changes, vocabulary_size=CharacterTokenizer().vocabulary_size)


@pytest.fixture(scope="module")
def lora_run(lora_tree):
    config = config_of(lora_tree)
    train(config, console=Console(quiet=True))
    return config


def stored_shapes(config, step: int):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata((config.directory / "checkpoints" / str(step) / "state").resolve()).item_metadata.tree
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def test_a_checkpoint_holds_adapters_and_nothing_of_the_base(lora_run):
    model = parts(lora_run).model
    adapters, frozen = split(model.specs)
    for step in (1, WARM, WARM + STEPS):
        shapes = stored_shapes(lora_run, step)
        written = sorted(shape for path, shape in shapes.items() if path.startswith("networks/policy/params/"))
        assert written == sorted(spec.shape for spec in jax.tree.leaves(adapters, is_leaf=lambda x: hasattr(x, "axes")))
        assert {path.split("/")[-1] for path in shapes if path.startswith("networks/policy/params/")} == set(PARTS)
        # Adam's two moments, and the adapters after the warm start, as reference.
        copies = 3 if step == 1 else 4
        numbers = sum(int(np.prod(shape)) for shape in shapes.values() if len(shape) > 1)
        assert numbers <= copies * parameter_count(adapters)
    base = sum(4 * int(np.prod(spec.shape)) for spec in jax.tree.leaves(frozen, is_leaf=lambda x: hasattr(x, "axes")))
    folder = lora_run.directory / "checkpoints" / str(WARM + STEPS) / "state"
    arrays = sum(file.stat().st_size for file in folder.rglob("*") if file.parent.name == "d")
    assert arrays < base


def test_a_resumed_run_gives_the_same_numbers(lora_run, lora_tree, tmp_path):
    shutil.copytree(lora_run.directory, tmp_path / "run")
    for step in range(WARM + 2, WARM + STEPS + 1):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    (tmp_path / "run" / "summary.json").unlink()
    config = config_of(lora_tree, run_dir=str(tmp_path / "run"))
    after = train(config, resume=True, console=Console(quiet=True))["after"]
    assert after == json.loads((lora_run.directory / "summary.json").read_text())["after"]
    expected, found = (read_records(run.directory / "metrics.jsonl") for run in (lora_run, config))
    for line in (*expected, *found):
        for name in OF_MACHINE:
            line.pop(name, None)
    assert found == expected
    assert len(found) == WARM + STEPS
    assert found[WARM]["gradient_norm"] > 0


def test_every_way_to_begin_makes_the_same_base(lora_run):
    built = parts(lora_run)
    key = jax.random.key(lora_run.seed)
    warm = make_train_step(built.model, optax.sgd(0.1), source=Written(rows=4), losses=[losses.negative_log_likelihood])
    frozen = [host(split(step.init(key).params)[1]) for step in (warm, built.step)]
    assert same(*frozen)


def test_a_state_is_restored_on_the_base_that_it_is_given(lora_run):
    built = parts(lora_run)
    like, trained = built.step.init(jax.random.key(lora_run.seed)), built.model.trained
    folder = lora_run.directory / "checkpoints"
    state = stored_states.restore(folder, WARM + 1, like, trained=trained)
    params = stored_states.restore_params(folder, WARM + 1, like.params, trained=trained)
    assert same(host(state.params), host(params))
    for tree in (state.params, params):
        pairs = zip(jax.tree.leaves(split(tree)[1]), jax.tree.leaves(split(like.params)[1]), strict=True)
        assert all(a is b for a, b in pairs)
    assert np.any(params["blocks"]["qkv"].up)
    other = parts(replace(lora_run, lora=replace(lora_run.lora, rank=3)))
    message = r"'networks/policy/params/blocks/\w+/(down|up)' as float32\[.*; use the config"
    with pytest.raises(CheckpointError, match=message):
        stored_states.restore_params(folder, WARM + 1, other.model.init(jax.random.key(0)), trained=trained)


def test_the_reference_after_a_warm_start_is_where_it_ended(lora_run):
    built = parts(lora_run)
    like = built.step.init(jax.random.key(lora_run.seed))
    folder, trained = lora_run.directory / "checkpoints", built.model.trained
    first, last = (stored_states.restore(folder, step, like, trained=trained) for step in (WARM, WARM + STEPS))
    assert same(last.networks["reference"].params, split(first.params)[0])
    assert same(reference_of(built.step, last), first.params)
    assert np.any(first.params["blocks"]["qkv"].up)


def test_a_run_is_evaluated_from_its_checkpoint(lora_run, capsys):
    assert cli.main(["eval", str(lora_run.directory), "--k", "1,2", "--seed", "0", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert 0 <= shown["pass@1"] <= 1


def test_int8_and_adapters_make_the_state_small(lora_run):
    built = parts(lora_run)
    state, _ = abstract_inputs(built)
    adapters = 2 * (32 + 16 * 4) + 2 * (32 + 32) + 2 * (32 + 192) + 2 * (96 + 32)
    assert parameter_count(trainable_part(built.model, built.model.specs)) == adapters
    numbers = [leaf for leaf in jax.tree.leaves(replace(state, key=None)) if leaf.ndim]
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in numbers if leaf.dtype == jnp.int8)
    assert held == 32 * 64 + 32 * 32 + 32 * 192 + 96 * 32
    wide = sum(leaf.size for leaf in numbers if leaf.dtype == jnp.float32)
    embedding_and_norms = built.model.vocabulary_size * 32 + 3 * 32 + 2 * 16
    scales = 64 + 32 + 192 + 32
    # The adapters themselves, two moments of Adam, and the reference.
    assert 0 <= wide - (embedding_and_norms + scales + 4 * adapters) <= 100


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"alpha": 4}, "config key lora.rank is missing"),
        ({"rank": 0, "alpha": 4}, "lora.rank is 0"),
        ({"rank": 2, "alpha": 4, "int9": True}, r"config key lora.int9 .* did you mean lora.int"),
        ({"rank": 2, "alpha": 4, "targets": ["up"]}, "lora.targets names 'up'"),
    ],
)
def test_a_section_that_cannot_work_is_refused(lora_tree, section, message):
    with pytest.raises(ConfigError, match=message):
        config_of(lora_tree, lora=section)
