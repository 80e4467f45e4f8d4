"""Rows whose positions are shared by devices: the same numbers in a share of the memory."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxrl_llm

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict[str, np.ndarray]:
    root, path = str(Path(jaxrl_llm.__file__).parent.parent), tmp_path_factory.mktemp("context") / "facts.npz"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, str(Path(__file__).with_name("context_facts.py")), str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(path) as found:
        return dict(found)


@pytest.mark.parametrize("layout", ["sequence 8", "sequence 4 x tensor 2"])
def test_loss_and_gradient_do_not_depend_on_who_holds_a_position(facts, layout):
    names = [key.split("|")[1] for key in facts if key.startswith("one|") and not key.endswith("bytes")]
    assert len(names) > 5
    for name in names:
        ours, theirs = facts[f"{layout}|{name}"], facts[f"one|{name}"]
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6 * np.abs(theirs).max(), err_msg=name)


@pytest.mark.parametrize("layout", ["sequence 8", "sequence 4 x tensor 2"])
def test_eight_devices_need_an_eighth_of_the_activations_each(facts, layout):
    # The gathered keys and values are beside them.
    assert facts[f"{layout}|bytes"] < 0.16 * facts["one|bytes"]


def test_the_splash_kernel_is_split_over_rows_heads_and_positions(facts):
    names = [key.split("|")[1] for key in facts if key.startswith("splash one|")]
    assert names
    for name in names:
        ours, theirs = facts[f"splash split|{name}"], facts[f"splash one|{name}"]
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_vocabulary_that_is_split_is_never_gathered(facts):
    assert facts["vocabulary|half"]
    assert facts["vocabulary|whole"] == 0
    # In the loop over chunks: normalisers, and gradients of hidden states; neither scores nor the table's gradient.
    assert facts["vocabulary|moved in a loop"].max() <= 128 * 64


@pytest.mark.parametrize("product", ["ragged", "dense"])
@pytest.mark.parametrize("layout", ["2 x 2 x 2", "1 x 8"])
def test_hidden_units_of_experts_may_be_split(facts, product, layout):
    names = [key.split("|")[1] for key in facts if key.startswith(f"experts {product}, one|")]
    assert len(names) == 7
    for name in names:
        ours, theirs = (facts[f"experts {product}, {which}|{name}"] for which in (layout, "one"))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6 * np.abs(theirs).max(), err_msg=name)


def test_the_scores_of_latent_attention_are_split_over_heads(facts):
    assert facts["latent 8|bytes"] < 0.2 * facts["latent 1|bytes"]
