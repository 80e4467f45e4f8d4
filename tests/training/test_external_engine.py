"""Training on completions of an engine: the update of the built-in sampler, weights handed over, differences told."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from jaxrl_llm import advantages, losses
from jaxrl_llm.config import ConfigError, numeric_tree, parse_config
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.experience import KeyUse, Prompts
from jaxrl_llm.losses import importance_weight
from jaxrl_llm.models import load_model
from jaxrl_llm.rollout import Endpoint, EndpointError, generate, plans
from jaxrl_llm.rollout.external import request_seeds
from jaxrl_llm.rollout.hand_over import External, disk_hand_over
from jaxrl_llm.run.explain import stages
from jaxrl_llm.run.setup import parts
from jaxrl_llm.run.train import train
from jaxrl_llm.training import Resources, Rollout, make_train_step

ROLLOUT = Rollout(samples_per_prompt=2, max_completion_tokens=5, eos_ids=(2,), pad_id=0, temperature=0.7)
VOCABULARY = 16


def total(tokens):
    return tokens.sum(1).astype(jnp.float32)


def composed(model, engine=None, plan=None, **changes):
    kept = {
        "source": replace(ROLLOUT, engine=engine, plan=plan),
        "rewards": [total],
        "credit": [("advantages", advantages.group_normalized)],
        "losses": [losses.clipped_surrogate],
    }
    return make_train_step(model, optax.sgd(3.0), **(kept | changes))


class TableEngine:
    """Serves a bigram model's own samples: the prompts and the key of the run are known to it."""

    def __init__(self, model, prompts, key):
        self.key, self.prompts, self.params, self.step, self.handed = key, prompts, None, 0, []
        sizes = dict(samples_per_prompt=2, max_completion_tokens=5, eos_ids=(2,), pad_id=0, temperature=0.7)
        self.rows = jax.jit(lambda params, step: generate(model, params, prompts, key, step, **sizes))

    def hand_over(self, params, step):
        self.params = jax.tree.map(np.asarray, params)
        self.handed.append(step)

    def __call__(self, body):
        # A request says its seed alone, so every step that it could be of is looked at.
        for step in range(4):
            number = np.arange(2, dtype=np.int32)
            ids, samples = np.repeat(self.prompts.prompt_id, 2), np.tile(number, len(self.prompts.prompt_id))
            seeds = np.asarray(request_seeds(self.key, np.int32(step), ids, samples)).tolist()
            if body["seed"] in seeds:
                rows, row = self.rows(self.params, step), seeds.index(body["seed"])
                length = int(rows.length[row])
                return rows.tokens[row, :length].tolist(), rows.behaviour_logprobs[row, :length].tolist()
        raise AssertionError("a seed of no known address")


@pytest.fixture
def served(serve, bigram, make_prompts):
    """State, prompts, and a step whose engine serves the policy by its own sampler."""
    prompts = make_prompts(4)
    key = jax.random.key(9)
    table = TableEngine(bigram, prompts, jax.random.fold_in(key, KeyUse.ROLLOUT))
    server = serve(table)
    external = External(
        Endpoint(server.url, "policy", timeout_s=30.0, retries=0), table.hand_over, probe_prompts=2, probe_bound=1e-4
    )
    return SimpleNamespace(prompts=prompts, key=key, table=table, server=server, external=external)


def test_a_step_is_that_of_the_built_in_sampler(served, bigram):
    inside, outside = composed(bigram), composed(bigram, engine=served.external)
    ours, theirs = inside.init(served.key), outside.init(served.key)
    for number in range(2):
        ours, expected, own_rows = inside.run(ours, served.prompts)
        theirs, metrics, rows = outside.run(theirs, served.prompts)
        np.testing.assert_array_equal(rows.tokens, own_rows.tokens)
        np.testing.assert_allclose(rows.behaviour_entropy, own_rows.behaviour_entropy, atol=1e-5)
        for name in expected:
            np.testing.assert_allclose(metrics[name], expected[name], atol=2e-5, err_msg=name)
        np.testing.assert_allclose(theirs.params["scores"], ours.params["scores"], atol=1e-5)
        assert metrics.keys() - expected.keys() == {"engine_gap_max", "engine_gap_mean", "staleness_steps"}
        assert float(metrics["engine_gap_max"]) < 1e-5
        assert float(metrics["staleness_steps"]) == 0
        assert served.table.handed == list(range(number + 1))


def test_an_older_policy_is_seen_and_its_tokens_weighted(served, bigram):
    external = replace(served.external, every_steps=2)
    credit = [("advantages", advantages.group_normalized), ("token_weight", importance_weight)]
    step = composed(bigram, engine=external, credit=credit)
    state = step.init(served.key)
    shown = []
    for _ in range(3):
        state, metrics, rows = step.run(state, served.prompts)
        shown.append({name: float(value) for name, value in metrics.items()} | {"rows": rows})
    assert served.table.handed == [0, 2]
    assert [one["staleness_steps"] for one in shown] == [0, 1, 0]
    assert 1e-3 < shown[1]["engine_gap_mean"] < shown[1]["engine_gap_max"]
    assert max(shown[0]["engine_gap_max"], shown[2]["engine_gap_max"]) < 1e-5
    late = shown[1]["rows"]
    expected = np.minimum(np.exp(late["old_logprobs"] - late.behaviour_logprobs), 2.0) * late.mask
    np.testing.assert_allclose(late["token_weight"], expected, rtol=1e-5)
    np.testing.assert_allclose(shown[0]["rows"]["token_weight"], shown[0]["rows"].mask, atol=1e-5)


def test_a_method_may_read_how_old_the_policy_is(served, bigram):
    def fresh(weight, staleness):
        return weight * (staleness < 1)

    credit = [("weight", fresh), ("advantages", advantages.group_normalized)]
    step = composed(bigram, engine=served.external, credit=credit)
    _, metrics, _ = step.run(step.init(served.key), served.prompts)
    assert float(metrics["kept_share"]) == 1
    with pytest.raises(ValueError, match=r"names 'staleness', which nothing in this step provides"):
        composed(bigram, credit=credit)


def test_rewards_on_the_host_come_after_the_engine(served, bigram):
    step = composed(
        bigram,
        engine=served.external,
        rewards=[lambda completions: [text.count(" 5 ") for text in completions]],
        resources=Resources(decode=lambda ids: "".join(f" {number} " for number in ids)),
    )
    items = [{"body": "", "answer": ""}] * 4
    _, metrics, rows = step.run(step.init(served.key), served.prompts, items)
    inside = np.arange(5) < np.asarray(rows.length)[:, None]
    np.testing.assert_array_equal(rows["rewards"], ((np.asarray(rows.tokens) == 5) & inside).sum(1))


def test_the_probe_speaks_before_the_first_update_and_again(served, bigram):
    scores = served.table.hand_over
    external = replace(served.external, hand_over=lambda params, step: scores({"scores": -params["scores"]}, step))
    step = composed(bigram, engine=external)
    state = step.init(served.key)
    for _ in range(2):
        with pytest.raises(EndpointError, match=r"weights were not loaded"):
            step.run(state, served.prompts)
    assert not state.params["scores"].is_deleted(), "no update was made"


PLAIN = plans.plain(samples_per_prompt=2)
WIDTHS = {"max_completion_tokens": 5, "pad_id": 0}


@pytest.mark.parametrize(
    "plan, capability",
    [
        (plans.prefixes(PLAIN, texts=("a",), encode=lambda text: (3,), **WIDTHS), "prefixes"),
        (plans.mixed_temperature(PLAIN, samples_per_prompt=2, prompt_share=0.5, temperature=1.0), "temperatures"),
        (plans.demonstration_in_group(PLAIN, **WIDTHS), "prefixes"),
    ],
)
def test_what_an_engine_does_not_do_is_refused(bigram, plan, capability):
    external = External(Endpoint("http://localhost:1", "policy"))
    with pytest.raises(ValueError, match=rf"rollout.plan needs .* \({capability}\), which rollout.engine does not"):
        composed(bigram, engine=external, plan=plan)


def test_a_greedy_baseline_is_refused(bigram):
    credit = [("advantages", lambda rewards, baseline_rewards: rewards - baseline_rewards)]
    message = r"the greedy baseline \('baseline_rewards'\) needs .* \(temperatures\), which rollout.engine does not"
    with pytest.raises(ValueError, match=message):
        composed(bigram, engine=External(Endpoint("http://localhost:1", "policy")), credit=credit)


# ---- a whole run ----------------------------------------------------------------------------------------------------


class DiskEngine:
    """Serves whatever checkpoint it was told to load."""

    def __init__(self, width, steps):
        tokenizer = CharacterTokenizer()
        self.loaded, self.model, self.params = [], None, None
        self.sizes = dict(samples_per_prompt=1, max_completion_tokens=steps, pad_id=tokenizer.pad_id)
        self.sizes |= {"eos_ids": tuple(tokenizer.eos_ids)}
        self.width, self.run = width, None

    def load(self, body):
        directory = Path(body["model_path"])
        try:
            model, self.params = load_model(directory)
        except (ValueError, FileNotFoundError) as error:
            return {"success": False, "message": str(error)}
        self.loaded.append(directory.name)
        if self.run is None:

            def run(params, tokens, length, seed, temperature):
                zero = jnp.zeros(1, jnp.int32)
                prompts = Prompts(tokens, length, zero, zero[:, None], zero)
                return generate(model, params, prompts, jax.random.key(seed), 0, temperature=temperature, **self.sizes)

            self.run = jax.jit(run)
        return {"success": True, "message": "loaded"}

    def __call__(self, body):
        prompt = np.zeros((1, self.width), np.int32)
        prompt[0, self.width - len(body["prompt"]) :] = body["prompt"]
        length = np.array([len(body["prompt"])], np.int32)
        rows = self.run(self.params, prompt, length, np.uint32(body["seed"]), np.float32(body["temperature"]))
        count = int(rows.length[0])
        return rows.tokens[0, :count].tolist(), rows.behaviour_logprobs[0, :count].tolist()


@pytest.fixture
def run_config(micro_config, serve, tmp_path):
    engine = DiskEngine(9, 6)
    server = serve(engine)
    server.routes = {"/update_weights_from_disk": engine.load, "/flush": lambda body: None}
    tree = copy.deepcopy(micro_config) | {"run_dir": str(tmp_path / "run")}
    tree["model"]["vocabulary_size"] = CharacterTokenizer().vocabulary_size
    tree["warm_start"] = {"steps": 0}
    tree["rewards"] = ["exact_answer"]
    tree["credit"] = [{"advantages": "group_normalized"}]
    tree["losses"] = ["clipped_surrogate"]
    tree["networks"] = {}
    tree["training"] |= {"steps": 2, "minibatches_per_epoch": 1}
    tree["training"] |= {"sequences_per_microbatch": None}
    tree["evaluation"] |= {"problems": 2, "samples_per_problem": 1, "k": [1], "every_steps": 0}
    tree["rollout"] |= {
        "temperature": 0.8,
        "engine": {
            "url": server.url,
            "model": "policy",
            "retries": 0,
            "concurrency": 4,
            "weights_directory": str(tmp_path / "weights"),
            "reload_path": "/update_weights_from_disk",
            "reload_then": ["/flush"],
            "probe_bound": 1e-4,
            "probe_largest_bound": 1e-3,
        },
    }
    return SimpleNamespace(tree=tree, server=server, engine=engine, weights=tmp_path / "weights")


def test_weights_go_through_the_disk(serve, model, tmp_path):
    server, read = serve(None), []

    def load(body):
        read.append(load_model(body["args"][0]["path"])[1])

    server.routes = {"/load": load, "/flush": lambda body: {"success": True}}
    engine = Endpoint(server.url, "policy", retries=0)
    body = {"method": "reload", "args": [{"path": "{directory}"}]}
    hand_over = disk_hand_over(engine, model, tmp_path / "out", path="/load", body=body, then=("/flush",))
    (tmp_path / "out" / "policy-notes").mkdir(parents=True)
    for number in (3, 3, 4):  # a step that is tried again writes its directory again
        params = model.init(jax.random.key(number))
        hand_over(params, number)
        jax.tree.map(np.testing.assert_array_equal, read[-1], params)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["policy-00000004", "policy-notes"]
    assert [path for path, _, _ in server.seen] == ["/load", "/flush"] * 3
    server.routes["/flush"] = lambda body: {"success": False, "message": "busy"}
    with pytest.raises(EndpointError, match=r"/flush could not take .*policy-00000005: 'busy'"):
        hand_over(params, 5)


def test_a_model_of_ones_own_is_not_exported(bigram, tmp_path):
    with pytest.raises(ValueError, match=r"weights_directory is set, but a custom model cannot be exported"):
        disk_hand_over(Endpoint("http://localhost:1", "policy"), bigram, tmp_path, path="/load", body={})


@pytest.mark.slow
def test_a_run_hands_its_weights_over_and_is_resumed_after_the_engine_failed(run_config):
    config, server = parse_config(run_config.tree), run_config.server
    shown = Console(file=io.StringIO(), width=200)

    def broken(body):
        if body["model_path"].endswith("1"):
            return {"success": False, "message": "out of memory"}
        return run_config.engine.load(body)

    server.routes["/update_weights_from_disk"] = broken
    with pytest.raises(
        EndpointError, match=r"could not take .*'out of memory'.* the last good checkpoint is step 1; go on"
    ):
        train(config, console=shown)
    server.routes["/update_weights_from_disk"] = run_config.engine.load
    train(config, resume=True, console=shown)

    assert run_config.engine.loaded == ["policy-00000000", "policy-00000001"]
    assert [p.name for p in run_config.weights.iterdir()] == ["policy-00000001"], "older ones are deleted"
    assert [path for path, _, _ in server.seen].count("/flush") == 2
    lines = [json.loads(line) for line in (config.directory / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["stage"] == "reinforcement"]
    assert len(steps) == 2
    for line in steps:
        assert 0 <= line["engine_gap_mean"] <= line["engine_gap_max"] < 1e-4
        assert line["sampler_gap_max"] < 1e-4
        assert line["staleness_steps"] == 0
        assert line["entropy_per_token"] > 0


def test_a_run_does_not_start_without_the_engine(run_config):
    run_config.tree["rollout"]["engine"]["model"] = "another"
    with pytest.raises(EndpointError, match=r"rollout.engine.model is 'another', but .* serves 'policy'"):
        train(parse_config(run_config.tree), console=Console(file=io.StringIO()))
    assert not Path(run_config.tree["run_dir"]).exists()


def test_the_stages_say_who_samples(run_config):
    built = parts(parse_config(run_config.tree))
    first, *rest = stages(built.step.composition)
    assert (first["name"], first["where"]) == (run_config.server.url, "engine")
    assert next(row for row in rest if row["provides"] == "old_logprobs")["name"] == "policy forward pass"


def test_where_the_engine_is_decides_no_numbers(run_config):
    def numbers(**engine):
        tree = copy.deepcopy(run_config.tree)
        tree["rollout"]["engine"] |= engine
        return numeric_tree(parse_config(tree))

    assert numbers(url="http://elsewhere:1", timeout_s=1.0) == numbers()
    assert numbers(reload_every_steps=2) != numbers()
    without = copy.deepcopy(run_config.tree)
    del without["rollout"]["engine"]
    assert numeric_tree(parse_config(without))["rollout"]["engine"] is None


@pytest.mark.parametrize(
    "engine, message",
    [
        ({"url": None}, r"rollout.engine.url"),
        ({"reload_path": None}, r"rollout.engine.reload_path is missing, so the engine would keep sampling"),
        ({"weights_directory": None}, r"rollout.engine.weights_directory is missing"),
        ({"reload_every_steps": 0}, r"rollout.engine.weights_directory is .*reload_every_steps is 0"),
        ({"reload_every_steps": -1}, r"rollout.engine.reload_every_steps is -1; it must be at least 0"),
        ({"concurrency": 0}, r"rollout.engine.concurrency is 0; it must be at least 1"),
        ({"timeout": 3}, r"rollout.engine.timeout .*did you mean rollout.engine.timeout_s"),
    ],
)
def test_a_section_that_cannot_work(run_config, engine, message):
    run_config.tree["rollout"]["engine"] |= engine
    with pytest.raises(ConfigError, match=message):
        parse_config(run_config.tree)


def test_a_url_that_is_none_is_found_before_anything_runs(run_config):
    run_config.tree["rollout"]["engine"]["url"] = "localhost"
    with pytest.raises(ValueError, match=r"rollout.engine.url is 'localhost'; write its root"):
        parts(parse_config(run_config.tree))
