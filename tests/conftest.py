"""Shared fixtures: the platform, one cache of compiled programs, and one small complete run."""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import io
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

# Set before jax is imported: tests check the results of programs on the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Without most optimisations, thousands of tiny programs compile in half of the time.
# Child processes inherit it. JAXRL_TESTS_OPTIMISED=1 compiles with the default optimisations.
if os.environ["JAX_PLATFORMS"] == "cpu" and os.environ.get("JAXRL_TESTS_OPTIMISED", "0") in ("", "0"):
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    flags = "--xla_cpu_parallel_codegen_split_count=1 --xla_llvm_disable_expensive_passes=true"
    # An unknown flag ends the process; jaxlib 0.12 no longer has this one.
    if tuple(int(part) for part in version("jaxlib").split(".")[:2]) < (0, 11):
        flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()

import jax
import numpy as np
import pytest
import yaml

from jaxrl_llm.compilation_cache import compilation_cache_directory
from jaxrl_llm.experience import Method
from jaxrl_llm.models.model import Model

# Until the tests are collected; see `pytest_collection_finish`.
gc.disable()

# The kernel allows 65,530 memory maps per process, and each program needs several.
MOST_MAPS = 4_000
# A cached program takes 5 kB; the least recently used are removed first.
MOST_BYTES_KEPT = 1 << 30
SECONDS = {"slow": 1800, "aot": 1800}


def pytest_collection_modifyitems(items):
    """Tests marked as long have more time than the timeout of pyproject.toml."""
    for item in items:
        seconds = [seconds for name, seconds in SECONDS.items() if item.get_closest_marker(name)]
        if seconds and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(max(seconds)))


def programs_of_tests() -> Path | None:
    """The cache of programs between runs of the tests, next to that of users, for this kind of machine and jax.

    As for users, JAX_COMPILATION_CACHE_DIR sets another directory, and JAXRL_COMPILATION_CACHE=0 disables it.
    """
    directory = compilation_cache_directory()
    if directory is None or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return directory
    return directory.parents[1] / "tests" / directory.name / f"jax-{jax.__version__}"


def pytest_collection_finish():
    """Imported modules are excluded from garbage collection, which would search them repeatedly for seconds.

    It is also less frequent: a search of everything takes a twentieth of the time of the tests otherwise, and
    `freed_programs` asks for one where programs are to be freed.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 1_000)
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    """A worker that dies ends the run, without waiting for the others, which may also hang."""
    if report.when == "???" and report.failed:
        pytest.exit(report.longrepr, returncode=1)


def pytest_sessionfinish(session):
    """Limit the size of the cache, once per run and not in each worker."""
    directory = programs_of_tests()
    if hasattr(session.config, "workerinput") or directory is None or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    found = []
    for path in directory.glob("*-cache"):
        with contextlib.suppress(OSError):  # another run may remove files, too
            found.append((path.stat().st_atime, path.stat().st_size, path))
    size = sum(size for _, size, _ in found)
    for _, one, path in sorted(found):
        if size <= MOST_BYTES_KEPT:
            break
        size -= one
        path.unlink(missing_ok=True)


def written_at_once(path: Path, value: bytes) -> None:
    """Write atomically, so that readers find a complete file or none, even after a kill."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    partial.write_bytes(value)
    partial.replace(path)


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory):
    """A compilation cache shared by tests, workers, child processes and later runs."""
    directory = programs_of_tests()
    try:
        directory = directory or tmp_path_factory.mktemp("jax")
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        directory = tmp_path_factory.mktemp("jax")
    settings = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    patch = pytest.MonkeyPatch()
    for name, value in settings.items():
        jax.config.update(name, value)
        patch.setenv(name.upper(), str(value))

    # jax writes in place and does not overwrite, so an incomplete program would stay in the cache.
    from jax._src import lru_cache

    def put(self, key, value):
        path = Path(self.path) / f"{key}-cache"
        if not path.exists():
            written_at_once(path, value)

    patch.setattr(lru_cache.LRUCache, "put", put)
    yield
    patch.undo()


def maps_of_this_process() -> int | None:
    try:
        with open("/proc/self/maps", "rb") as maps:
            return sum(1 for _ in maps)
    except OSError:
        return None


@pytest.fixture(scope="module", autouse=True)
def freed_programs():
    """Clear compiled programs after each module, since a worker runs a hundred modules."""
    yield
    maps = maps_of_this_process()
    if maps is None or maps > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def make_bigram():
    """A bigram model with a table of scores, which compiles quickly."""

    def make(vocabulary_size: int) -> Model:
        return Model(
            init=lambda key: {"scores": jax.random.normal(key, (vocabulary_size, vocabulary_size))},
            apply=lambda params, tokens, positions, cache: (jax.nn.one_hot(tokens, vocabulary_size), cache),
            logits=lambda params, hidden: hidden @ params["scores"],
            init_cache=lambda rows, slots: (),
            expand_cache=lambda cache, samples, extra_slots: cache,
            specs=None,
            vocabulary_size=vocabulary_size,
            config=None,
        )

    return make


@pytest.fixture(scope="session")
def data_directory(tmp_path_factory) -> str:
    """The data directory of all runs, written once."""
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def micro_config(data_directory) -> dict:
    """A config of a run of a few seconds, with a refreshed reference, a method with memory, and minibatches."""
    return {
        "name": "micro",
        "task": {
            "name": "addition",
            "levels": [1, 2],
            "options": {"scratchpad": False},
            "train_items": 48,
            "validation_items": 4,
            "test_items": 12,
        },
        "data": {"directory": data_directory},
        "model": {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1},
        "warm_start": {
            "steps": 10,
            "sequences_per_step": 8,
            "learning_rate": 0.02,
            "warmup_steps": 2,
            "probe_every_steps": 5,
        },
        "rollout": {"samples_per_prompt": 4, "max_prompt_tokens": 9, "max_completion_tokens": 6},
        "rewards": [{"answer_format": {"require_think": False}}, {"exact_answer": {"weight": 2.0}}],
        "credit": [{"advantages": {"running_mean_baseline": {"decay": 0.5}}}],
        "losses": ["clipped_surrogate", {"kl_estimate": {"coefficient": 0.01}}],
        "training": {
            "steps": 8,
            "prompts_per_step": 4,
            "minibatches_per_epoch": 2,
            "sequences_per_microbatch": 4,
            "learning_rate": 0.003,
        },
        "networks": {"reference": {"copy_every": 3}},
        # Three batches of 5 problems for 12: the last one is not full.
        "evaluation": {
            "problems": 12,
            "samples_per_problem": 4,
            "k": [1, 2, 4],
            "sequences_per_batch": 25,
            "every_steps": 3,
        },
        "checkpoints": {"every_steps": 2, "keep": 3},
        "reporting": {"samples_every_steps": 3, "samples_per_report": 2},
    }


@pytest.fixture(scope="session")
def micro_yaml(micro_config, tmp_path_factory) -> Path:
    """The micro config as a file."""
    path = tmp_path_factory.mktemp("configs") / "micro.yaml"
    path.write_text(yaml.safe_dump(micro_config))
    return path


@pytest.fixture(scope="session")
def finished_run(micro_yaml, tmp_path_factory) -> SimpleNamespace:
    """`jaxrl train --json` on the micro config: its directory, summary, seconds and output. Read only."""
    from jaxrl_llm import cli

    directory = tmp_path_factory.mktemp("runs") / "micro"
    out, err, started = io.StringIO(), io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(["train", str(micro_yaml), f"run_dir={directory}", "--json"])
    assert status == 0, err.getvalue()
    seconds = time.monotonic() - started
    return SimpleNamespace(
        directory=directory, shown=err.getvalue(), summary=json.loads(out.getvalue()), seconds=seconds
    )


class EngineServer:
    """An OpenAI-compatible engine of the standard library. Change its fields between requests to make it misbehave.

    Attributes:
      sample: request -> (tokens, log-probabilities).
      dialect: "vllm" has ids in both forms, "sglang" in a separate field, "tokens" only as token_id:123.
      routes: further addresses: path -> (request -> answer).
      spoil: answer -> answer.
      statuses: HTTP statuses of the next answers.
      seconds: duration of an answer, whose body is sent in pieces.
      seen: (path, request, headers) of every POST.
    """

    def __init__(self, sample):
        self.sample, self.dialect, self.routes = sample, "vllm", {}
        self.spoil = lambda answer: answer
        self.statuses, self.seconds, self.seen = [], 0.0, []
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                self.say(200, {"data": [{"id": "policy"}]} if self.path == "/v1/models" else None)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.seen.append((self.path, body, dict(self.headers)))
                    status = outer.statuses.pop(0) if outer.statuses else 200
                    if status != 200:
                        self.say(status, {"error": f"status {status}"})
                    elif self.path in outer.routes:
                        self.say(200, outer.routes[self.path](body))
                    elif self.path == "/v1/completions":
                        self.say(200, outer.spoil(outer.answer(body)))
                    else:
                        self.say(404, {"error": f"no {self.path}"})

            def say(self, status, answer):
                content = (
                    answer if isinstance(answer, bytes) else b"" if answer is None else json.dumps(answer).encode()
                )
                with contextlib.suppress(ConnectionError):  # the client may have disconnected
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    pieces = 6 if outer.seconds else 1
                    size = -(-len(content) // pieces)
                    for number in range(pieces):
                        time.sleep(outer.seconds / pieces)
                        self.wfile.write(content[number * size : (number + 1) * size])
                        self.wfile.flush()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def answer(self, body):
        tokens, logprobs = self.sample(body)
        named = [f"token_id:{token}" for token in tokens]
        choice = {
            "index": 0,
            "text": "",
            "finish_reason": "length" if len(tokens) == body["max_tokens"] else "stop",
            "logprobs": {"tokens": named, "token_logprobs": logprobs},
        }
        if self.dialect == "sglang":
            choice["logprobs"]["tokens"] = ["a piece of text"] * len(tokens)
        if self.dialect != "tokens":
            choice |= {"token_ids": tokens, "prompt_token_ids": body["prompt"]}
        return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice]}

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def serve():
    """sample -> a running `EngineServer`."""
    running = []

    def start(sample) -> EngineServer:
        running.append(EngineServer(sample))
        return running[-1]

    yield start
    for server in running:
        server.close()


def one_program(function):
    """The function compiled as one program per set of arguments, instead of one program per operation.

    Arrays are traced, other arguments are static. Functions that a factory returns (a configured loss, a method with
    memory) are compiled in the same way; a function that needs the values of its arrays is not compiled.
    """

    @functools.cache
    def compiled(structure, fixed):
        def call(arrays):
            given = iter(arrays)
            leaves = [next(given) if value is TRACED else value for _, value in fixed]
            args, kwargs = jax.tree.unflatten(structure, leaves)
            return function(*args, **kwargs)

        return jax.jit(call)

    @functools.wraps(function)
    def whole(*args, **kwargs):
        leaves, structure = jax.tree.flatten((args, kwargs))
        arrays = [leaf for leaf in leaves if isinstance(leaf, (jax.Array, np.ndarray))]
        if not arrays:
            return as_one_program(function(*args, **kwargs))
        # With the type, since 1, 1.0 and True are equal.
        fixed = [(None, TRACED) if isinstance(leaf, (jax.Array, np.ndarray)) else (type(leaf), leaf) for leaf in leaves]
        try:
            program = compiled(structure, tuple(fixed))
            return program(arrays)
        except TypeError:  # for unhashable arguments, and functions that need concrete values
            return function(*args, **kwargs)

    return whole


TRACED = object()


def as_one_program(value):
    if isinstance(value, Method):
        return value._replace(update=one_program(value.update))
    return one_program(value) if inspect.isfunction(value) else value


@pytest.fixture(scope="module")
def whole_functions(request):
    """Compile the pure functions of the package that a test module calls, as users do."""
    for name, value in list(vars(request.module).items()):
        if inspect.isfunction(value) and value.__module__.startswith(("jaxrl_llm.advantages", "jaxrl_llm.losses")):
            setattr(request.module, name, one_program(value))
