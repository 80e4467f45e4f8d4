"""Rotary positions: what each way of stretching them does to fast and slow waves, and what is left unrotated."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import RopeScaling
from jaxrl_llm.models.rotary import rotary_angles, rotary_frequencies, rotate

SIZE, BASE, CONTEXT = 32, 10_000.0, 1024
PLAIN = np.asarray(rotary_frequencies(SIZE, BASE))
SCALINGS = {
    "linear": RopeScaling("linear", 4.0),
    "llama3": RopeScaling("llama3", 4.0, CONTEXT),
    "yarn": RopeScaling("yarn", 4.0, CONTEXT),
}


def test_linear_scaling_divides_positions():
    positions = jnp.arange(8)[None]
    stretched = rotary_angles(4 * positions, SIZE, BASE, SCALINGS["linear"])
    np.testing.assert_allclose(stretched, rotary_angles(positions, SIZE, BASE), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_fast_waves_are_kept_and_slow_ones_divided(kind):
    scaling = SCALINGS[kind]
    turns = PLAIN * CONTEXT / (2 * math.pi)
    share = np.asarray(rotary_frequencies(SIZE, BASE, scaling)) / PLAIN
    slow, fast = (1.0, 4.0) if kind == "llama3" else (0.5, 64.0)
    np.testing.assert_allclose(share[turns > fast], 1.0, rtol=1e-6)
    np.testing.assert_allclose(share[turns < slow], 0.25, rtol=1e-6)
    assert (np.diff(share) <= 1e-6).all()
    assert ((share > 0.26) & (share < 0.99)).any()


def test_yarn_scales_what_is_rotated():
    cos, sin = rotary_angles(jnp.arange(8)[None], SIZE, BASE, SCALINGS["yarn"])
    np.testing.assert_allclose(np.hypot(cos, sin), 0.1 * math.log(4.0) + 1.0, rtol=1e-6)
    cos, sin = rotary_angles(jnp.arange(8)[None], SIZE, BASE, RopeScaling("yarn", 4.0, CONTEXT, magnitude=0.5))
    np.testing.assert_allclose(np.hypot(cos, sin), 0.5, rtol=1e-6)


def test_only_the_first_dimensions_are_rotated():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 1, 2, 10)), jnp.float32)
    angles = rotary_angles(jnp.arange(4)[None], 6, BASE)
    rotated = rotate(x, angles)
    np.testing.assert_array_equal(rotated[..., 6:], x[..., 6:])
    np.testing.assert_allclose(rotated[..., :6], rotate(x[..., :6], angles), rtol=1e-6)
    assert float(jnp.abs(rotated[:, 1:, ..., :6] - x[:, 1:, ..., :6]).max()) > 0.1


@pytest.mark.parametrize(
    "bad, message",
    [
        (
            dict(kind="3d", factor=2.0),
            "rope_scaling.kind is '3d'; it must be one of linear, dynamic, llama3, yarn, lon",
        ),
        (dict(kind="linear", factor=0.5), "factor is 0.5"),
        (dict(kind="yarn", factor=2.0), "original_positions is None, which yarn needs"),
        (dict(kind="llama3", factor=2.0, original_positions=8, low_frequency=4.0), "low_frequency 4.0"),
    ],
)
def test_bad_scalings_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**bad)
