"""What all tests share: the platform, one store of compiled programs, and one small run from start to final table."""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

# Before anything imports jax: the tests are about what programs compute, not about the machine that they run on.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
import yaml

from jaxrl_llm.models.model import Model


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory):
    """Programs compiled once are read back by later tests and by the processes that they start."""
    settings = {
        "jax_compilation_cache_dir": os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(tmp_path_factory.mktemp("jax")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    patch = pytest.MonkeyPatch()
    for name, value in settings.items():
        jax.config.update(name, value)
        patch.setenv(name.upper(), str(value))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def make_bigram():
    """A model whose next symbol depends on the last one alone, by a table of scores: it compiles in no time."""

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
    """Data sets of all runs: written once."""
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def micro_config(data_directory) -> dict:
    """A config whose run takes seconds: with a reference that is refreshed, a method with memory, minibatches."""
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
            "refresh_reference_every": 3,
        },
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
    """The same as a file."""
    path = tmp_path_factory.mktemp("configs") / "micro.yaml"
    path.write_text(yaml.safe_dump(micro_config))
    return path


@pytest.fixture(scope="session")
def finished_run(micro_yaml, tmp_path_factory) -> SimpleNamespace:
    """`jaxrl train --json` on the micro config: its directory, summary, seconds and what it showed. Read only."""
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
