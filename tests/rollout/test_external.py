"""An engine over HTTP fills what the built-in sampler fills, is compared with the policy, and is refused by name."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.endpoints import answer, require_model
from jaxrl_llm.experience import Experience, Prompts, Source
from jaxrl_llm.rollout import Endpoint, EndpointError, engine_generate, generate, probe
from jaxrl_llm.rollout.completions_api import checked_completion
from jaxrl_llm.rollout.external import request_seeds

VOCABULARY, EOS, PAD, STEPS, SAMPLES, STEP = 8, (1, 2), 0, 6, 3, 5
KEY = jax.random.key(3)
SIZES = {"max_completion_tokens": STEPS, "eos_ids": EOS, "pad_id": PAD}
PROMPTS = Prompts(
    tokens=jnp.array([[0, 3, 4], [5, 6, 7]], jnp.int32),
    length=jnp.array([2, 3], jnp.int32),
    prompt_id=jnp.array([7, 40], jnp.int32),
    answer_tokens=jnp.array([[3], [4]], jnp.int32),
    answer_length=jnp.ones(2, jnp.int32),
)


@pytest.fixture(scope="module")
def model(make_bigram):
    return make_bigram(VOCABULARY)


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


def own_rows(model, params, temperature=1.0) -> Experience:
    def run(params):
        return generate(model, params, PROMPTS, KEY, STEP, samples_per_prompt=SAMPLES, temperature=temperature, **SIZES)

    return jax.jit(run)(params)


@pytest.fixture(scope="module")
def expected(model, params) -> Experience:
    return own_rows(model, params)


def served(rows: Experience):
    """Answers with these rows, found by the seed of their address."""
    seeds = np.asarray(request_seeds(KEY, np.int32(STEP), rows.prompt_id, rows.sample)).tolist()
    found = {}
    for row, seed in enumerate(seeds):
        length = int(rows.length[row])
        found[seed] = (rows.tokens[row, :length].tolist(), rows.behaviour_logprobs[row, :length].tolist())
    return lambda body: found[body["seed"]]


def engine_of(server, **changes) -> Endpoint:
    return Endpoint(**{"url": server.url, "model": "policy", "timeout_s": 20.0, "retry_wait_s": 0.0, **changes})


def sampled(engine, temperature=1.0, samples=SAMPLES) -> Experience:
    sizes = {"samples_per_prompt": samples, "vocabulary_size": VOCABULARY, "temperature": temperature, **SIZES}
    return engine_generate(engine, PROMPTS, KEY, STEP, **sizes)


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "tokens"])
def test_the_experience_is_that_of_the_built_in_sampler(serve, expected, dialect):
    server = serve(served(expected))
    server.dialect = dialect
    rows = sampled(engine_of(server))
    assert {int(n) for n in expected.length} > {1}, "completions of several lengths are wanted"
    for field in dataclasses.fields(Experience):
        ours, theirs = getattr(expected, field.name), getattr(rows, field.name)
        if field.name == "behaviour_entropy":
            assert not np.any(theirs)
        elif ours is None or field.name == "fields":
            assert theirs == ours
        else:
            assert theirs.dtype == ours.dtype, field.name
            np.testing.assert_array_equal(theirs, ours, err_msg=field.name)


def test_what_is_asked_for(serve, expected):
    server = serve(served(expected))
    sampled(engine_of(server, request={"no_stop_trim": True}))
    bodies = [body for _, body, _ in server.seen]
    assert sorted(body["prompt"] for body in bodies) == [[3, 4]] * SAMPLES + [[5, 6, 7]] * SAMPLES
    seeds = [body["seed"] for body in bodies]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    fixed = {"model": "policy", "temperature": 1.0, "top_p": 1.0, "top_k": -1, "stop_token_ids": list(EOS), "n": 1}
    fixed |= {"max_tokens": STEPS, "return_token_ids": True, "no_stop_trim": True}
    assert all(body.items() >= fixed.items() for body in bodies)


def test_a_seed_depends_on_the_address_alone():
    whole = request_seeds(KEY, np.int32(3), jnp.array([4, 9, 4]), jnp.array([0, 0, 1]))
    np.testing.assert_array_equal(request_seeds(KEY, np.int32(3), jnp.array([9]), jnp.array([0])), whole[1:2])
    assert len(set(whole.tolist())) == 3
    assert int(request_seeds(KEY, np.int32(2), jnp.array([9]), jnp.array([0]))[0]) != int(whole[1])


def test_the_key_of_an_account_is_sent(serve, expected, monkeypatch):
    server = serve(served(expected))
    monkeypatch.setenv("ENGINE_KEY", "secret")
    sampled(engine_of(server, api_key_variable="ENGINE_KEY", concurrency=1))
    assert all(headers["Authorization"] == "Bearer secret" for _, _, headers in server.seen)
    with pytest.raises(ValueError, match=r"api_key_variable is 'NO_SUCH_KEY', which is not set"):
        Endpoint("http://localhost", "policy", api_key_variable="NO_SUCH_KEY")


# ---- probe ----------------------------------------------------------------------------------------------------------


def sampler(model, params, *, temperature=None, reported=None):
    """Samples from a bigram table; may do so, or report, at another temperature than it is asked for."""
    scores = np.asarray(params["scores"], np.float64)

    def log_p(last, at):
        x = scores[last] / at
        return x - np.log(np.exp(x - x.max()).sum()) - x.max()

    def sample(body):
        rng, tokens, logprobs = np.random.default_rng(body["seed"]), [], []
        at = temperature or body["temperature"]
        while len(tokens) < body["max_tokens"] and not (tokens and tokens[-1] in body["stop_token_ids"]):
            last = tokens[-1] if tokens else body["prompt"][-1]
            tokens.append(int(rng.choice(VOCABULARY, p=np.exp(log_p(last, at)))))
            logprobs.append(float(log_p(last, reported or at)[tokens[-1]]))
        return tokens, logprobs

    return sample


def probed(server, model, params, **changes):
    many = jax.tree.map(lambda x: jnp.repeat(x, 8, axis=0), PROMPTS)
    prompts = dataclasses.replace(many, prompt_id=jnp.arange(16))
    return probe(engine_of(server), model, params, prompts, KEY, **{"temperature": 0.5, **SIZES, **changes})


def test_the_probe_passes_the_same_weights(serve, model, params):
    gap = probed(serve(sampler(model, params)), model, params)
    assert gap.largest < 1e-5
    assert 0 < gap.mean <= gap.largest
    assert gap.tokens >= 16


def test_the_probe_refuses_other_weights(serve, model, params):
    other = jax.tree.map(lambda x: x + 0.5 * jax.random.normal(jax.random.key(1), x.shape), params)
    server = serve(sampler(model, other))
    with pytest.raises(ValueError, match=r"differ from ours by .* on average and .* at most.*bounds are 0.05.*weights"):
        probed(server, model, params)
    assert probed(server, model, params, bound=9.0, largest_bound=99.0).mean > 0.05


def test_the_probe_names_log_probabilities_before_temperature(serve, model, params):
    with pytest.raises(
        EndpointError,
        match=r"processed_logprobs.*Ours before temperature differ by .* so the cause is the log-probabilities mode",
    ):
        probed(serve(sampler(model, params, reported=1.0)), model, params)
    with pytest.raises(EndpointError) as error:
        probed(serve(sampler(model, params, temperature=2.0)), model, params)
    assert "so the cause is the log-probabilities mode" not in str(error.value)


def test_one_token_alone_is_enough_to_refuse(serve, model, params):
    server = serve(sampler(model, params))

    def spoil(found):
        server.spoil = lambda answer: answer
        found["choices"][0]["logprobs"]["token_logprobs"][0] -= 1.0
        return found

    server.spoil = spoil
    with pytest.raises(EndpointError, match=r"and 1 at most.*and 0.9 \(rollout.engine.probe_largest_bound\)"):
        probed(server, model, params, bound=0.5, largest_bound=0.9)


# ---- bad input ------------------------------------------------------------------------------------------------------


def choice_with(**changes):
    def spoil(found):
        choice = found["choices"][0]
        for name, value in changes.items():
            holder = choice["logprobs"] if name in ("tokens", "token_logprobs") else choice
            holder[name] = value(holder[name]) if callable(value) else value
        return found

    return spoil


BAD_ANSWERS = {
    "no_logprobs": (choice_with(logprobs=None), r"has no log-probabilities.*--max-logprobs"),
    "no_numbers": (choice_with(token_logprobs=None), r"has no log-probabilities"),
    "one_less": (choice_with(token_logprobs=lambda x: x[:-1]), r"has \d log-probabilities for \d tokens.*its own"),
    "unknown": (choice_with(token_logprobs=lambda x: [None, *x[1:]]), r"log-probability None at position 0"),
    "nan": (choice_with(token_logprobs=lambda x: [float("nan"), *x[1:]]), r"log-probability nan at position 0"),
    "positive": (choice_with(token_logprobs=lambda x: [0.5, *x[1:]]), r"log-probability 0.5 at position 0"),
    "two_choices": (lambda a: a | {"choices": a["choices"] * 2}, r"has 2 choices, where one was asked for"),
    "no_choice": (lambda a: a | {"choices": []}, r"has 0 choices"),
    "no_object": (lambda a: [a], r"has no list of choices"),
    "text_alone": (choice_with(token_ids=None, tokens=["a"] * 6), r"has no token ids.*return_token_ids"),
    "outside": (choice_with(token_ids=lambda x: [8, *x[1:]]), r"token 8 at position 0.*ids are 0 to 7.*tokenizer"),
    "negative": (choice_with(token_ids=lambda x: [-1, *x[1:]]), r"token -1 at position 0"),
    "no_number": (
        choice_with(token_ids=None, tokens=lambda x: ["token_id:x", *x[1:]]),
        r"token 'token_id:x' at position 0",
    ),
    "other_prompt": (choice_with(prompt_token_ids=[1, 3, 4]), r"says that its prompt had 3 tokens.*special tokens"),
    "html": (lambda a: b"<html>hello</html>", r"other than JSON: '<html>hello</html>'; check that rollout.engine.url"),
    "nothing": (lambda a: None, r"has no list of choices"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_an_answer_that_cannot_be_learned_from(serve, expected, name):
    server = serve(served(expected))
    server.spoil, message = BAD_ANSWERS[name]
    with pytest.raises(EndpointError, match=message) as error:
        sampled(engine_of(server, concurrency=1))
    assert server.url in str(error.value)
    assert "the request for prompt 7, sample 0 of step 5" in str(error.value)
    assert len(server.seen) == 1, "requests go on after a failure"


def test_lengths_and_ends():
    def checked(tokens, limit=4, **fields):
        logprobs = {"token_logprobs": [-1.0] * len(tokens)}
        found = {"choices": [{"token_ids": tokens, "logprobs": logprobs, **fields}]}
        sizes = {"max_completion_tokens": limit, "eos_ids": (1, 2), "vocabulary_size": VOCABULARY}
        return checked_completion(found, [3], where="the answer", **sizes)

    assert checked([4, 5, 2]) == ([4, 5, 2], [-1.0] * 3, True)
    assert checked([4, 5, 6, 7]).ended is False
    assert checked([4, 5, 6, 1]).ended is True
    with pytest.raises(EndpointError, match=r"goes on for 2 tokens after end of sequence.*ignore_eos"):
        checked([4, 1, 5, 1])
    with pytest.raises(EndpointError, match=r"stops after 2 of at most 4 .*'length'.*context length"):
        checked([4, 5], finish_reason="length")
    with pytest.raises(EndpointError, match=r"has 5 tokens, more than the 4"):
        checked([4, 5, 6, 7, 1])
    with pytest.raises(EndpointError, match=r"has no token ids"):
        checked([])


def test_passing_errors_are_tried_again_and_others_are_not(serve, expected):
    server = serve(served(expected))
    server.statuses = [503, 500]
    rows = sampled(engine_of(server, retries=2, concurrency=1))
    np.testing.assert_array_equal(rows.tokens, expected.tokens)
    assert len(server.seen) == 2 + 2 * SAMPLES
    server.statuses = [503] * 99
    with pytest.raises(EndpointError, match=r"answered the request for prompt 7, .* with HTTP 503: .*status 503"):
        sampled(engine_of(server, retries=1, concurrency=1))
    for status, remedy in ((400, "compare the requested sizes"), (401, "api_key_variable"), (404, "engine.model")):
        server.statuses, before = [status], len(server.seen)
        with pytest.raises(EndpointError, match=rf"HTTP {status}: .*status {status}.*{remedy}"):
            answer(engine_of(server), "/v1/completions", {"seed": 0}, what="a request")
        assert len(server.seen) == before + 1


def test_an_engine_that_dribbles_meets_the_deadline_too(serve, expected):
    server = serve(served(expected))
    server.seconds = 0.6  # in pieces, each of which comes in time
    with pytest.raises(
        EndpointError, match=r"did not answer the request .* within 0.2 s; raise rollout.engine.timeout_s"
    ):
        sampled(engine_of(server, timeout_s=0.2, concurrency=1))


def test_an_engine_that_is_not_there(serve, expected):
    server = serve(served(expected))
    url = server.url
    server.server.server_close()
    with pytest.raises(EndpointError, match=rf"{url}/v1/models could not be reached for .* in 2 attempts.*start it"):
        require_model(Endpoint(url, "policy", retries=1, retry_wait_s=0.0))


def test_the_model_must_be_served(serve, expected):
    server = serve(served(expected))
    require_model(engine_of(server, url=server.url + "/v1/"))
    with pytest.raises(EndpointError, match=r"rollout.engine.model is 'another', but .* serves 'policy'"):
        require_model(engine_of(server, model="another"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"url": "localhost:8000"}, r"rollout.engine.url is 'localhost:8000'; write its root"),
        ({"concurrency": 0}, r"rollout.engine.concurrency is 0"),
        ({"retries": -1}, r"rollout.engine.retries is -1"),
        ({"timeout_s": 0.0}, r"rollout.engine.timeout_s is 0.0"),
    ],
)
def test_an_engine_that_cannot_be_asked(changes, message):
    with pytest.raises(ValueError, match=message):
        Endpoint(**{"url": "http://localhost:8000", "model": "policy", **changes})


def test_sizes_and_temperature_are_checked(serve, expected):
    engine = engine_of(serve(served(expected)))
    with pytest.raises(ValueError, match=r"rollout.temperature is 0.0; an engine needs a temperature"):
        sampled(engine, temperature=0.0)
    with pytest.raises(ValueError, match=r"rollout.samples_per_prompt is 0"):
        sampled(engine, samples=0)


def test_sources_and_padding(serve, expected):
    rows = sampled(engine_of(serve(served(expected))))
    inside = np.arange(STEPS) < rows.length[:, None]
    np.testing.assert_array_equal(rows.source, np.where(inside, Source.SAMPLED, Source.PAD))
    np.testing.assert_array_equal(rows.tokens[~inside], PAD)
