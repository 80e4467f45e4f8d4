"""The same ten steps of GRPO on one device and on eight, however these are laid out (law 4)."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxrl_llm

pytestmark = pytest.mark.slow

STEPS = 10
# Layout, what it is compared with, and the share of the state that a device should hold.
CASES = [
    ("8 x 1", "one", 1 / 8),
    ("2 x 4", "one", 1 / 8),
    ("2 x 2 x 2", "one", 1 / 8),
    ("packed, 2 x 2 x 2", "one", 1 / 8),
    ("trimmed, 4 x 2", "one", 1 / 8),
    ("4 experts x 2", "one ragged", 1 / 8),
    ("2 x 2 experts x 2", "one dense", 1 / 4),
    ("2 x 2 experts x 2, ragged", "one ragged", 1 / 8),
    ("networks, 4 x 2", "one networks", 1 / 8),
    ("teacher, 4 x 2", "one teacher", None),
    ("networks, 2 x 2 x 2, offloaded", "one networks", 1 / 4),
]


def on_eight_devices(script: str, folder: Path) -> dict[str, np.ndarray]:
    """What a script beside this file saves, run in a process that sees eight virtual devices."""
    root, path = str(Path(jaxrl_llm.__file__).parent.parent), folder / "facts.npz"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, str(Path(__file__).with_name(script)), str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(path) as found:
        return dict(found)


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict[str, np.ndarray]:
    return on_eight_devices("layout_facts.py", tmp_path_factory.mktemp("layouts"))


def of(facts, name: str) -> dict[str, np.ndarray]:
    return {key.split("|")[1]: value for key, value in facts.items() if key.split("|")[0] == name}


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm((ours - theirs).ravel()) / np.linalg.norm(theirs.ravel()))


@pytest.mark.parametrize("name, alone, share", CASES)
def test_ten_steps_are_those_of_one_device(facts, name, alone, share):
    ours, theirs = of(facts, name), of(facts, alone)
    assert ours.keys() == theirs.keys()
    for number in range(STEPS):
        for exact in ("tokens", "length", "rewards"):
            np.testing.assert_array_equal(ours[f"{exact} {number}"], theirs[f"{exact} {number}"], err_msg=name)
        assert ours[f"gap {number}"] < 1e-5
    for key, value in theirs.items():
        if key.startswith("params"):
            assert relative(ours[key], value) < 1e-5, key
        elif key.startswith(("moments", "value", "reference[")) and value.ndim:
            assert relative(ours[key], value) < 1e-4, key
        elif key.startswith("loss"):
            assert ours[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
        elif key.startswith("replay"):
            np.testing.assert_allclose(ours[key].astype(float), value.astype(float), rtol=1e-3, atol=1e-4, err_msg=key)
    assert ours["reference on the host"] == ("offloaded" in name)
    # Norm gains and the like are whole on every device: a little more than the share.
    assert share is None or ours["share"] == pytest.approx(share, rel=0.15)


def test_a_teacher_lies_by_a_table_of_its_own(facts):
    assert of(facts, "teacher, 4 x 2")["teacher"].tolist() == [16, 64]


def test_the_steps_learned_something(facts):
    # Otherwise equal parameters would say nothing.
    for alone in ("one", "one ragged", "one dense", "one networks", "one teacher"):
        found = of(facts, alone)
        before = {key.removeprefix("before"): value for key, value in found.items() if key.startswith("before")}
        assert before
        assert all(relative(found[f"params{key}"], value) > 1e-3 for key, value in before.items())
        assert len({tuple(found[f"tokens {number}"].ravel()) for number in range(STEPS)}) == STEPS
