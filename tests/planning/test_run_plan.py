"""Plans from sizes: machines by name, what a run needs of them, and refusals."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
import yaml

from jaxrl_llm.cli import main
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.experience import Loss
from jaxrl_llm.models import TransformerConfig, save_model, transformer
from jaxrl_llm.models.cache import init_cache, keep_window
from jaxrl_llm.models.layer_kinds import DeltaConfig, GlobalConfig
from jaxrl_llm.parallel.mesh import placed_devices
from jaxrl_llm.parallel.rules import AXES, RULES
from jaxrl_llm.planning.topologies import topology
from jaxrl_llm.run.evaluation_batch import decoding_bytes, fitting_batch, remembered_bytes

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


@pytest.mark.parametrize(
    "name, count, sizes, message",
    [
        ("v6e-64", None, {"fsdp": 4, "expert": 4, "tensor": 4}, None),
        ("v5p-64", None, {"fsdp": 2, "tensor": 16}, None),
        ("v5p:4x4x6", None, {"fsdp": 3, "tensor": 32}, None),
        ("tpu7x:2x2x2", None, {"fsdp": 2, "tensor": 8}, None),
        ("2*v5e:4x4", None, {"slice": 2, "fsdp": 2, "tensor": 8}, None),
        ("2*v5e:4x4", None, {"fsdp": 8, "tensor": 4}, "mesh.slices is 1, but the devices lie on 2 slices"),
        ("v6e-64", 12, {"fsdp": 12}, "mesh.fsdp 12 cannot be placed on these 12 devices of a TPU v6 lite"),
    ],
)
def test_meshes_that_a_slice_can_place(name, count, sizes, message):
    devices = topology(name).described_devices()[:count]
    if message is None:
        placed = placed_devices(devices, sizes)
        assert sorted(device.id for device in placed.flat) == list(range(len(devices)))
        assert [placed.shape[AXES.index(axis)] for axis in sizes] == list(sizes.values())
    else:
        with pytest.raises(ValueError, match=message):
            placed_devices(devices, sizes)


def test_a_plan_refuses_a_mesh_that_the_slice_cannot_place(capsys):
    overrides = ("mesh.devices=12", "mesh.fsdp=12", "mesh.tensor=1", "training.sequences_per_microbatch=32")
    status, output = planned(capsys, "qwen3_8b.yaml", "v6e-64", *overrides)
    assert status == 2
    assert "mesh.fsdp 12 cannot be placed on these 12 devices" in output.err


@pytest.mark.parametrize("case", ["plain", "delta", "global", "reading"])
def test_what_a_cache_takes_is_what_it_is_made_of(case):
    """Of one row on one device, with room for a token and for two; and divided over `tensor`."""
    windows = {"window": 4, "window_pattern": (True, False)}
    shape = {
        "plain": {},
        "delta": {"delta": DeltaConfig(2, 4, 6, 5)},
        "global": {"global_heads": GlobalConfig(16, 2), **windows},
        "reading": {"global_heads": GlobalConfig(16, 2), "reading_layers": 2, **windows},
    }[case]
    config = TransformerConfig(vocabulary_size=9, width=32, layers=4, heads=4, kv_heads=2, **shape)

    def size(make) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(make).layers))

    held = [size(partial(init_cache, 1, slots, config=config)) for slots in (1, 2)]
    token, row = held[1] - held[0], 2 * held[0] - held[1]
    assert remembered_bytes(config, {}, RULES, 2) == (token, 0.0, row, token)
    halved = remembered_bytes(config, {"tensor": 2}, RULES, 2)
    assert halved.token + halved.row == held[0] / 2
    # Of a completion longer than the window, layers that see it alone keep it alone.
    kept = size(lambda: keep_window(init_cache(1, 10, config=config), 10, config=config))
    found = remembered_bytes(config, {}, RULES, 10)
    assert 10 * found.token + found.window + found.row == kept
    assert (found.window > 0) == (config.window is not None)


def planned(capsys, name, machine, *overrides):
    status = main(["plan", str(PLANS / name), *overrides, "--topology", machine, "--estimate", "--json"])
    return status, capsys.readouterr()


def test_an_8b_model_on_64_chips(capsys):
    status, output = planned(capsys, "qwen3_8b.yaml", "v5e:8x8", "warm_start={steps: 10, sequences_per_step: 8}")
    result = json.loads(output.out)
    assert status == 0, output.err
    assert result["devices"] == 64
    phases = {phase["phase"]: phase for phase in result["phases"]}
    assert {"prefill", "decode", "update"} <= set(phases)
    assert all(0 < phase["memory_bytes"] <= result["device_bytes"] for phase in result["phases"])
    # A prompt of 1,024 tokens costs two operations a weight and token, and attention on top.
    assert phases["prefill"]["flops"] > 0
    assert result["token_seconds"] == pytest.approx(phases["decode"]["seconds"] / 8191)
    # What a run does beside its steps. The batch of the evaluation is chosen to fit; 504 completions would
    # need 16.3 GiB, says the compiler.
    programs = {program["program"]: program for program in result["programs"]}
    assert 10 * 2**30 < programs["evaluation"]["memory_bytes"] <= result["device_bytes"]
    assert programs["warm start: update"]["memory_bytes"] > 0
    # Policy and reference in bfloat16, moments in float32 and bfloat16.
    assert result["checkpoint"]["bytes"] == pytest.approx((2 + 2 + 4 + 2) * 8.19e9, rel=0.01)
    assert result["checkpoint"]["host_bytes"] == pytest.approx(result["checkpoint"]["bytes"] / 16)
    assert result["host"]["memory_bytes"] >= result["checkpoint"]["host_bytes"]


def test_an_evaluation_that_does_not_fit_is_refused(capsys, tmp_path):
    status, output = planned(capsys, "../demo.yaml", "cpu:1", "evaluation.sequences_per_batch=90000000")
    assert status == 1
    assert "try evaluation.sequences_per_batch=null" in output.err
    programs = {program["program"]: program["fits"] for program in json.loads(output.out)["programs"]}
    assert not programs["evaluation"]


def test_the_batch_of_an_evaluation_follows_the_memory():
    shape = TransformerConfig(vocabulary_size=100, width=64, layers=2, heads=4, kv_heads=2)
    sizes = {"rows": 9, "prompt": 100, "completion": 1000}
    one = sum(decoding_bytes(transformer(shape), 1, 9, 100, 1000, {}, RULES).values())
    found = [fitting_batch(transformer(shape), device_bytes=factor * one, **sizes) for factor in (1, 4, 40, 1000)]
    assert found[0] == 9  # never less than one problem
    assert found[0] < found[1] < found[2] < found[3] == 1152
    # Over eight devices there is room for more, but only for what they share evenly.
    mesh = SimpleNamespace(shape={"data": 8})
    assert fitting_batch(transformer(shape), device_bytes=4 * one, mesh=mesh, **sizes) >= 4 * found[1]


def test_a_supervised_run_has_no_phases_of_sampling(capsys, tmp_path):
    path = tmp_path / "sft.yaml"
    tree = {
        "name": "sft",
        "task": {"name": "addition", "levels": [1]},
        "model": {"width": 16, "layers": 1, "heads": 2, "kv_heads": 2, "mlp_width": 32},
        "source": [{"demonstrations": {"sequences_per_step": 8}}],
        "losses": ["negative_log_likelihood"],
    }
    path.write_text(yaml.safe_dump(tree))
    assert main(["plan", str(path), "--topology", "cpu:1", "--estimate", "--json"]) == 0
    assert [phase["phase"] for phase in json.loads(capsys.readouterr().out)["phases"]] == ["update"]


def test_what_does_not_fit_is_refused_with_a_way_out(capsys):
    status, output = planned(capsys, "llama3_70b.yaml", "v5e:2x2", "mesh.fsdp=4", "mesh.tensor=1")
    assert status == 1
    assert "a host of v5e:2x2 needs" in output.err  # 70 billion parameters with their moments, written by one host


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
