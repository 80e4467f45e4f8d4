"""Programs compiled for TPUs that are not there. They need libtpu: README.md says how to install it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrl_llm.config import load_config
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.planning.ahead import compiler_environment, libtpu_path
from jaxrl_llm.planning.run_plan import plan
from jaxrl_llm.planning.topologies import topology

CONFIGS = Path(__file__).parents[2] / "configs"
GIB = 2**30

pytestmark = [
    pytest.mark.aot,
    pytest.mark.slow,
    pytest.mark.skipif(libtpu_path() is None, reason="libtpu is not installed"),
]


@pytest.fixture(scope="module", autouse=True)
def optimised():
    """The compiler as users have it: what a program takes depends on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
        yield


@pytest.fixture(scope="module")
def compiled_plan():
    """Plans by config and machine, each made once."""
    made = {}

    def make(name, machine, *overrides):
        if (name, machine, overrides) not in made:
            config = load_config(CONFIGS / name, list(overrides), vocabulary_size=CharacterTokenizer().vocabulary_size)
            made[name, machine, overrides] = plan(config, machine)
        return made[name, machine, overrides]

    return make


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    path = tmp_path_factory.mktemp("ahead") / "facts.json"
    command = [sys.executable, str(Path(__file__).with_name("ahead_facts.py")), str(path)]
    environment = compiler_environment(topology("v5e:2x2"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.read_text())


def test_a_small_step_for_four_chips(compiled_plan):
    found = compiled_plan("demo.yaml", "v5e:2x2")
    assert found["method"] == "compiled", found["note"]
    assert found["fits"]
    assert {phase["phase"] for phase in found["phases"]} >= {"prefill", "decode", "update"}
    assert all(
        phase["flops"] > 0 and phase["memory_bytes"] > 0 for phase in found["phases"] if phase["phase"] != "other"
    )


EIGHT_B, FSDP_ALONE = "plans/qwen3_8b.yaml", ("mesh.fsdp=64", "mesh.tensor=1", "training.sequences_per_microbatch=64")


@pytest.mark.parametrize(
    "name, machine, overrides",
    [
        (EIGHT_B, "v5e-64", ()),
        (EIGHT_B, "v5p-64", ("mesh.tensor=4",)),
        ("plans/llama3_70b.yaml", "v5p-256", ()),
        ("plans/qwen3_30b_a3b.yaml", "v6e-64", ()),
    ],
)
def test_large_steps_fit_their_pods(compiled_plan, name, machine, overrides):
    found = compiled_plan(name, machine, *overrides)
    assert found["method"] == "compiled", found["note"]
    assert found["fits"], found["suggestions"]
    assert found["memory_bytes"] <= found["device_bytes"]
    assert {phase["phase"] for phase in found["phases"]} >= {"prefill", "decode", "reference", "update"}


def sent_on_paper(fsdp, tensor, microbatches):
    """Bytes that a device sends in the update of Qwen3-8B; docs/plans.md derives it."""
    width, mlp, heads, kv_heads, head, layers, vocabulary = 4096, 12288, 32, 8, 128, 36, 151_936
    weight = 2 / tensor * width * (3 * mlp + 2 * (heads + kv_heads) * head)
    table = 2 / tensor * vocabulary * width
    activations = 2 * 9216 * width
    of_fsdp, of_tensor = (fsdp - 1) / fsdp, (tensor - 1) / tensor
    weights = layers * (3 + 1) * of_fsdp * weight + 2 * (1 + 2) * of_fsdp * table
    return microbatches * (weights + (5 * layers + 1) * 2 * of_tensor * activations)


@pytest.mark.parametrize(
    "overrides, fsdp, tensor, microbatches", [(FSDP_ALONE, 64, 1, 4), ((), 8, 8, 32)], ids=["fsdp", "fsdp x tensor"]
)
def test_an_update_sends_what_is_derived_on_paper(compiled_plan, overrides, fsdp, tensor, microbatches):
    found = compiled_plan(EIGHT_B, "v5e-64", *overrides)
    assert found["method"] == "compiled", found["note"]
    update = next(phase for phase in found["phases"] if phase["phase"] == "update")
    derived = sent_on_paper(fsdp, tensor, microbatches)
    assert sum(update["collectives"].values()) == pytest.approx(derived, rel=0.2)
    assert found["estimate"]["update"]["sent_bytes"] == pytest.approx(derived, rel=0.02)


def test_log_probabilities_need_less_than_a_gib(facts):
    assert facts["chunked"] <= GIB
    assert facts["whole"] > 4 * GIB


def test_the_kernel_of_pages_lowers_for_tpu(facts):
    assert facts["paged"]
    assert not facts["contiguous"]
