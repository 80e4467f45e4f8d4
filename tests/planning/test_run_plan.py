"""Plans from sizes: machines by name, what a run needs of them, and refusals."""

import json
from pathlib import Path

import pytest

from jaxrl_llm.cli import main
from jaxrl_llm.planning.topologies import topology

PLANS = Path(__file__).parents[2] / "configs" / "plans"


@pytest.mark.parametrize(
    "name, devices",
    [("v5e:8x8", 64), ("v5p-64", 32), ("v6e:2x2", 4), ("2*v5e:4x4", 32), ("gpu:8xH100", 8), ("cpu:8", 8)],
)
def test_machines_by_name(name, devices):
    machine = topology(name)
    assert machine.devices == devices


@pytest.mark.parametrize("name, message", [("v9:2x2", "not known"), ("v5e", "v5e"), ("cpu:none", "cpu")])
def test_machines_that_nobody_knows(name, message):
    with pytest.raises(ValueError, match=message):
        topology(name)


def planned(capsys, name, machine, *overrides):
    status = main(["plan", str(PLANS / name), *overrides, "--topology", machine, "--estimate", "--json"])
    return status, capsys.readouterr()


def test_an_8b_model_on_64_chips(capsys):
    status, output = planned(capsys, "qwen3_8b.yaml", "v5e:8x8")
    result = json.loads(output.out)
    assert status == 0
    assert result["devices"] == 64
    assert {"prefill", "decode", "update"} <= {phase["phase"] for phase in result["phases"]}
    assert all(0 < phase["memory_bytes"] <= result["device_bytes"] for phase in result["phases"])
    # A prompt of 1,024 tokens costs two operations a weight and token, and attention on top.
    prefill = next(phase for phase in result["phases"] if phase["phase"] == "prefill")
    assert prefill["flops"] > 0


def test_what_does_not_fit_is_refused_with_a_way_out(capsys):
    status, output = planned(capsys, "llama3_70b.yaml", "v5e:2x2", "mesh.fsdp=4", "mesh.tensor=1")
    assert status != 0
    assert "GiB" in output.err
