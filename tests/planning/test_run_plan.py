"""Plans from sizes: machines by name, what a run needs of them, and refusals."""

import json
from pathlib import Path

import jax
import pytest
import yaml

from jaxrl_llm.cli import main
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.experience import Loss
from jaxrl_llm.models import TransformerConfig, save_model, transformer
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


def test_networks_and_a_batch_that_waits_take_memory(capsys, tmp_path):
    """Beside the policy: a value network, a teacher of another shape that is read from a path, and rows kept."""
    shape = TransformerConfig(vocabulary_size=CharacterTokenizer().vocabulary_size, width=8, layers=2, heads=2)
    save_model(tmp_path / "teacher", transformer(shape).init(jax.random.key(0)), shape)
    path = tmp_path / "networks.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "networks",
                "task": {"name": "addition", "levels": [1]},
                "model": {"width": 16, "layers": 1, "heads": 2, "kv_heads": 2, "mlp_width": 32},
                "rollout": {
                    "samples_per_prompt": 4,
                    "max_prompt_tokens": 9,
                    "max_completion_tokens": 6,
                    "off_policy_steps": 1,
                },
                "rewards": ["exact_answer"],
                "credit": [{"returns": "gae_returns"}, {"advantages": "gae"}],
                "networks": {"teacher": {"path": str(tmp_path / "teacher")}},
                "losses": ["clipped_surrogate", "clipped_value", {"python": f"{__name__}:towards_teacher"}],
                "training": {"prompts_per_step": 8},
            }
        )
    )
    status = main(["plan", str(path), "mesh.fsdp=2", "mesh.data=4", "--topology", "cpu:8", "--estimate", "--json"])
    output = capsys.readouterr()
    assert status == 0, output.err
    update = next(phase for phase in json.loads(output.out)["phases"] if phase["phase"] == "update")
    largest = {each["value"]: each["bytes"] for each in update["largest"]}
    # Of the policy two moments; of the value network its parameters too.
    assert largest["value"] == pytest.approx(1.5 * largest["optimiser"], rel=0.1), largest


def towards_teacher(logprobs, teacher_logprobs, mask):
    """A loss that names another model."""
    return Loss(((logprobs - teacher_logprobs) ** 2 * mask).sum(), mask.sum())
