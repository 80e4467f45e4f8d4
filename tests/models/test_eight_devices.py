"""Every family on eight devices: parameters divided among them say what they say on one.

`on_eight_devices` is run as a script in a process that sees eight virtual CPU devices.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxrl_llm
from jaxrl_llm.models import load_model
from jaxrl_llm.parallel import layout, make_mesh, shardings

PROMPT, WIDTH = 6, 8


def inputs(vocabulary: int):
    """Four rows, one of them with padding in front."""
    tokens = np.random.default_rng(0).integers(3, vocabulary, (4, WIDTH)).astype(np.int32)
    positions = np.tile(np.arange(WIDTH), (4, 1))
    positions[1] = [-1, -1, 0, 1, 2, 3, 4, 5]
    return tokens, positions


def hidden_states(model, params) -> np.ndarray:
    """Of a prompt and of the tokens behind it, one by one through the cache."""
    tokens, positions = inputs(model.vocabulary_size)
    apply = jax.jit(model.apply)
    hidden, cache = apply(params, tokens[:, :PROMPT], positions[:, :PROMPT], model.init_cache(4, WIDTH))
    pieces = [hidden]
    for t in range(PROMPT, WIDTH):
        hidden, cache = apply(params, tokens[:, t : t + 1], positions[:, t : t + 1], cache)
        pieces.append(hidden)
    return np.concatenate([np.asarray(piece) for piece in pieces], axis=1)[positions >= 0]


def on_eight_devices(directories: str, out: str) -> None:
    mesh = make_mesh(sizes={"fsdp": 2, "expert": 2, "tensor": 2})
    found = {}
    for name, directory in json.loads(directories).items():
        for layer_loop in ("unrolled", "scanned"):
            model, _ = load_model(directory, context_tokens=46, layer_loop=layer_loop)
            _, params = load_model(directory, context_tokens=46, sharding=shardings(model.specs, mesh))
            assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(params))
            with layout(mesh):
                found[f"{name} {layer_loop}"] = hidden_states(model, params)
    np.savez(out, **found)


@pytest.mark.slow
def test_eight_devices_say_what_one_says(every_case, make_checkpoint, tmp_path):
    checkpoints = {case: make_checkpoint(case, even=True) for case in every_case}
    root = str(Path(jaxrl_llm.__file__).parent.parent)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    directories = json.dumps({case: str(checkpoint.directory) for case, checkpoint in checkpoints.items()})
    command = [sys.executable, __file__, directories, str(tmp_path / "out.npz")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as found:
        assert len(found) == 2 * len(checkpoints)
        errors = {}
        for case, checkpoint in checkpoints.items():
            expected = hidden_states(checkpoint.model, checkpoint.params)
            for name in (f"{case} unrolled", f"{case} scanned"):
                error = float(np.abs(found[name] - expected).max() / np.abs(expected).max())
                if error > checkpoint.rounding:
                    errors[name] = error
    assert not errors


if __name__ == "__main__":
    on_eight_devices(*sys.argv[1:])
