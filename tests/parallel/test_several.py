"""`jaxrl train` with several processes on loopback, under a watchdog, with four devices in total.

This file, run as a script, is one process of a test of steps: `test_several.py PROCESS COUNT PORT DEVICES WHAT OUT`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml

from jaxrl_llm.reporting.run_directory import read_records

# The tests read checkpoints without their original shardings.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DEVICES, STEPS, WARM = 4, 6, 2
LIMIT = 900  # seconds after which the watchdog ends a test's processes


# ---- two steps, without the command line ----


def two_steps(process: int, count: int, port: int, devices: int, *, what: str, out: str) -> None:
    import jax.numpy as jnp
    import optax
    from reward_functions import even_share, first_letter, second_vowel, vowel_share

    from jaxrl_llm.advantages import group_normalized
    from jaxrl_llm.experience import Prompts
    from jaxrl_llm.losses import clipped_surrogate, kl_estimate
    from jaxrl_llm.models.model import Model
    from jaxrl_llm.parallel import hosts, make_mesh
    from jaxrl_llm.parallel.start import initialise, place_of_this_process
    from jaxrl_llm.rewards import majority_match
    from jaxrl_llm.rollout import plans
    from jaxrl_llm.rows import Replay
    from jaxrl_llm.run import checkpoints, stored_states
    from jaxrl_llm.training import Placement, Resources, Rollout, make_train_step

    jax.config.update("jax_num_cpu_devices", devices)
    peers = initialise(place_of_this_process(f"127.0.0.1:{port}", count, process), {}, seconds=60)
    hosts.join(peers)
    bigram = Model(
        init=lambda key: {"scores": jax.random.normal(key, (26, 26))},
        apply=lambda params, tokens, positions, cache: (jax.nn.one_hot(tokens, 26), cache),
        logits=lambda params, hidden: hidden @ params["scores"],
        init_cache=lambda rows, slots: (),
        expand_cache=lambda cache, samples, extra_slots: cache,
        specs=None,
        vocabulary_size=26,
        config=None,
    )
    mesh = make_mesh()
    refilled = plans.refill(plans.plain(samples_per_prompt=3), samples_per_prompt=3, max_rounds=2, metric="rewards")
    sampling: dict[str, Any] = {
        "one step off-policy": {"off_policy_steps": 1},
        "refilled": {"plan": refilled, "prompts_per_step": 2},
    }
    read: list[Any] = []
    if what == "read":  # texts become numbers, and rows without a value have weight 0
        read = [("answer_id", first_letter), ("rewards", majority_match)]
    replayed = what == "replayed, offloaded"
    offload = frozenset({"optimizer", "reference"} if replayed else ())
    step = make_train_step(
        bigram,
        optax.adam(0.01),
        source=[
            Rollout(
                samples_per_prompt=3,
                max_completion_tokens=5,
                eos_ids=(1,),
                pad_id=1,
                **({"prompts_per_step": 4} | sampling.get(what, {})),
            ),
            *([Replay(0.5, 2, 4, 2, 1)] if replayed else []),
        ],
        rewards=[second_vowel if what == "read" else even_share, vowel_share],
        credit=[*read, ("advantages", group_normalized)],
        losses=[clipped_surrogate, (kl_estimate, 0.1)],
        resources=Resources(
            decode=lambda ids: "".join(chr(ord("a") + number) for number in ids),
            placement=Placement(mesh, offload=offload),
        ),
    )

    def prompts(index: int) -> Prompts:
        number = jnp.arange(4)
        made = Prompts(
            tokens=jnp.stack([number + index, number + 4], 1),
            length=number * 0 + 2,
            prompt_id=number,
            answer_tokens=number[:, None] * 0,
            answer_length=number * 0,
        )
        return hosts.placed_rows(made, mesh)

    items = [{"body": "", "answer": str(i)} for i in range(4)]
    state, found = step.init(jax.random.key(0)), {}
    state = step.prime(state, prompts(0), items)
    for index in range(2):
        state, _, rows = step.run(state, prompts(index + bool(step.priming)), items)
        names = ("tokens", "reward_components", "rewards", "group", "weight", *(["answer_id"] if read else []))
        compared = {name: rows[name] for name in names}
        found |= {f"{name} {index}": value for name, value in hosts.host_copy(compared).items()}
        if what == "plain":  # a prompt's rows stay in one process
            _, own = hosts.own_rows(hosts.by_rows({"group": rows.group}, 4, mesh))
            assert np.bincount(own["group"], minlength=4).tolist().count(3) == 4 // count
    found["scores"] = hosts.host_copy(state.params["scores"])
    with checkpoints.checkpoint_manager(Path(out), keep=1) as manager:
        checkpoints.save(manager, 1, state, {"step": 1})
        manager.wait_until_finished()
    again = stored_states.restore(Path(out), 1, state)
    np.testing.assert_array_equal(hosts.host_copy(again.params["scores"]), found["scores"])
    assert hosts.from_main(7 if hosts.is_main() else None) == 7
    assert hosts.from_main(None) is None
    assert hosts.first_failure(None) is None
    if count > 1:
        assert hosts.first_failure("Größe" if process == 1 else None) == "process 1: Größe"
    if hosts.is_main():
        np.savez(Path(out) / "found.npz", **found, start=bigram.init(jax.random.key(0))["scores"])
    assert jnp.isfinite(found["scores"]).all()
    if peers is not None:
        peers.leave()


# ---- processes ----


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Launched:
    """Processes of one run.

    Attributes:
      processes: in the order of their numbers.
      logs: the output of each.
    """

    def __init__(self, processes: Sequence[subprocess.Popen], logs: Sequence[Path]):
        self.processes, self.logs = processes, logs

    def said(self) -> list[str]:
        return [log.read_text() for log in self.logs]

    def ended(self, seconds: float = LIMIT) -> list[int]:
        """Exit statuses of the processes."""
        until = time.monotonic() + seconds
        for number, process in enumerate(self.processes):
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                tails = "\n".join(text[-3000:] for text in self.said())
                pytest.fail(f"process {number} has not ended after {seconds:.0f} s\n{tails}")
        return [process.returncode for process in self.processes]

    def succeeded(self) -> None:
        statuses = self.ended()
        assert statuses == [0] * len(statuses), "\n".join(text[-3000:] for text in self.said())


@contextmanager
def launched(commands: list[list[str]], directory: Path, environments: list[dict] | None = None) -> Iterator[Launched]:
    """A context with running processes, which are ended at its exit."""
    directory.mkdir(parents=True, exist_ok=True)
    python_path = os.pathsep.join([str(ROOT), str(HERE)])
    shared = os.environ | {"PYTHONPATH": python_path, "JAX_PLATFORMS": "cpu"}
    logs, started = [directory / f"log{number}" for number in range(len(commands))], []
    try:
        for number, (command, path) in enumerate(zip(commands, logs, strict=True)):
            more = environments[number] if environments else {}
            with path.open("w") as log:
                started.append(
                    subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=shared | more, cwd=directory)
                )
        yield Launched(started, logs)
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait()


# ---- steps ----


@pytest.mark.parametrize(
    "what",
    [
        "plain",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("read", "one step off-policy", "refilled", "replayed, offloaded")
        ),
    ],
)
def test_steps_of_two_processes_are_those_of_one(tmp_path, what):
    with ExitStack() as stack:
        runs = []
        for count in (1, 2):
            out, port = tmp_path / str(count), str(free_port())
            sizes = [str(count), port, str(DEVICES // count), what, str(out)]
            commands = [[sys.executable, __file__, str(i), *sizes] for i in range(count)]
            runs.append(stack.enter_context(launched(commands, tmp_path / f"logs{count}")))
        for run in runs:
            run.succeeded()
    alone, both = (dict(np.load(tmp_path / str(count) / "found.npz")) for count in (1, 2))
    for name in alone.keys() - {"scores", "start"}:
        np.testing.assert_array_equal(both[name], alone[name], err_msg=name)
    assert (np.nanstd(alone["reward_components 0"], 0) > 0.05).all()
    if what == "read":
        assert np.isnan(alone["reward_components 0"]).any()
        assert len(np.unique(alone["answer_id 0"])) > 4
    assert relative(alone["scores"], alone["start"]) > 1e-3
    # The order of sums over rows differs, and Adam makes a full step for a gradient near 0.
    assert relative(both["scores"], alone["scores"]) < (1e-5 if what == "read" else 1e-6)


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm((ours - theirs).ravel()) / np.linalg.norm(theirs.ravel()))


# ---- whole runs ----

REWARDS = {"in the program": "even_share", "on the host": "vowel_share"}
# One layout for each kind of reward; `tensor` and `fsdp` span four processes, and two.
MESHES = {"in the program": {"fsdp": 2, "tensor": 2}, "on the host": {"data": 2, "fsdp": 2}}


def config_of(kind: str, data_directory: str) -> dict:
    return {
        "name": "several",
        "task": {
            "name": "addition",
            "levels": [1],
            "options": {"scratchpad": False},
            "train_items": 24,
            "validation_items": 4,
            "test_items": 4,
        },
        "data": {"directory": data_directory},
        "model": {"width": 16, "layers": 1, "heads": 2, "kv_heads": 2, "mlp_width": 32},
        "warm_start": {"steps": WARM, "sequences_per_step": 8, "learning_rate": 0.02, "warmup_steps": 1},
        "rollout": {"samples_per_prompt": 4, "max_prompt_tokens": 9, "max_completion_tokens": 6},
        "rewards": [{"python": f"reward_functions:{REWARDS[kind]}"}],
        "credit": [{"advantages": "group_normalized"}],
        "losses": ["clipped_surrogate"],
        "training": {"steps": STEPS, "prompts_per_step": 4, "learning_rate": 0.003},
        "evaluation": {"problems": 4, "samples_per_problem": 3, "k": [1], "sequences_per_batch": 16},
        "checkpoints": {"every_steps": 50, "keep": 9},
        "reporting": {"samples_every_steps": 1, "samples_per_report": 16},
        "mesh": MESHES[kind],
    }


@pytest.fixture(scope="module")
def configs(tmp_path_factory, data_directory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("configs")
    paths = {kind: folder / f"{REWARDS[kind]}.yaml" for kind in REWARDS}
    for kind, path in paths.items():
        path.write_text(yaml.safe_dump(config_of(kind, data_directory)))
    return paths


def train(count: int, *words: str | Path, seconds: int = 120) -> list[list[str]]:
    """The commands of the processes of a run."""
    port, command = free_port(), [sys.executable, "-m", "jaxrl_llm.cli", "train", *map(str, words)]
    if count == 1:
        return [command]
    flags = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(count), "--start-timeout", str(seconds)]
    return [[*command, *flags, "--process-id", str(number)] for number in range(count)]


def share(count: int, **more: str) -> list[dict[str, str]]:
    """Environments that give each process its share of the devices."""
    return [{"JAX_NUM_CPU_DEVICES": str(DEVICES // count)} | more for _ in range(count)]


def finished(count: int, folder: Path, *words: str | Path) -> None:
    with launched(train(count, *words), folder, share(count)) as run:
        run.succeeded()
        assert not any("after warm-up" in text for text in run.said()), run.said()
        assert not any("pass@1" in text for text in run.said()[1:]), "one process shows the results"


def params_of(directory: Path, step: int = WARM + STEPS) -> dict[str, np.ndarray]:
    path = directory / "checkpoints" / str(step) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        policy = reader.metadata(path).item_metadata.tree["networks"]["policy"]
        there = {"networks": {"policy": {"params": policy["params"]}}}
        wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), there)
        arguments = ocp.args.PyTreeRestore(item=there, restore_args=wanted, partial_restore=True)
        params = reader.restore(path, args=arguments)["networks"]["policy"]["params"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_run(ours: Path, theirs: Path) -> None:
    lines = [read_records(path / "samples.jsonl") for path in (ours, theirs)]
    assert len(lines[0]) == 16 * STEPS
    tokens = [[line.pop("tokens", {}) for line in each] for each in lines]
    assert lines[0] == lines[1]  # every completion with its rewards
    for one, other in zip(*tokens, strict=True):  # sums in another order; three decimals are written
        assert one == {n: v if n == "text" else pytest.approx(v, abs=2.1e-3) for n, v in other.items()}
    metrics = [read_records(path / "metrics.jsonl") for path in (ours, theirs)]
    assert [line["step"] for line in metrics[0]] == list(range(1, WARM + STEPS + 1))
    for one, other in zip(*metrics, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-6)
        assert one.get("reward", 0.0) == pytest.approx(other.get("reward", 0.0), rel=1e-6)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (ours, theirs)]
    for name in ("before", "after", "completion_tokens_sampled", "config_hash"):
        assert summaries[0][name] == summaries[1][name], name
    expected = params_of(theirs)
    for name, value in params_of(ours).items():
        assert relative(value, expected[name]) < 1e-5, name


@pytest.fixture(scope="module")
def alone(configs, tmp_path_factory) -> dict[str, Path]:
    """Directories of the runs of one process."""
    folder = tmp_path_factory.mktemp("alone")
    for kind, config in configs.items():
        finished(1, folder / f"logs {kind}", config, f"run_dir={folder / kind}")
    return {kind: folder / kind for kind in configs}


@pytest.mark.slow
def test_the_runs_learn_something(alone):
    # Otherwise equal parameters would prove nothing.
    for directory in alone.values():
        before, after = params_of(directory, WARM), params_of(directory)
        assert max(relative(after[name], before[name]) for name in after) > 1e-3
        rewards = [line["reward"] for line in read_records(directory / "metrics.jsonl")[WARM:]]
        assert len(set(rewards)) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", REWARDS)
def test_a_run_of_several_processes_is_that_of_one(alone, configs, tmp_path, kind, count):
    finished(count, tmp_path / "logs", configs[kind], f"run_dir={tmp_path / 'run'}")
    assert_same_run(tmp_path / "run", alone[kind])


SELECTIONS: dict[str, dict[str, Any]] = {
    "bandit": {"temperature": 0.2},
    "by_pass_rate": {},
    "domain_aware": {"domains": "level", "refresh_every_steps": 1},
    "variance_aware": {"refresh_every_steps": 1},
}


@pytest.mark.slow
def test_selections_of_two_processes_choose_as_those_of_one(data_directory, tmp_path):
    tree = config_of("in the program", data_directory)
    tree["task"] |= {"levels": [1, 2]}
    tree["training"] |= {"steps": 4}
    tree["stages"] = [{"name": name, "data": {"selection": {name: given}}} for name, given in SELECTIONS.items()]
    config, runs = tmp_path / "config.yaml", {count: tmp_path / f"run{count}" for count in (1, 2)}
    config.write_text(yaml.safe_dump(tree))
    for count, directory in runs.items():
        finished(count, tmp_path / f"logs{count}", config, f"run_dir={directory}")
    alone, both = (read_records(directory / "samples.jsonl") for directory in runs.values())
    assert len(alone) == len(both) == 16 * 4 * len(SELECTIONS)
    for one, other in zip(alone, both, strict=True):  # every prompt with its completion and its rewards
        assert {n: v for n, v in one.items() if n != "tokens"} == {n: v for n, v in other.items() if n != "tokens"}
    told = [read_records(directory / "metrics.jsonl") for directory in runs.values()]
    for one, other in zip(*told, strict=True):
        reported = {name: value for name, value in one.items() if name.startswith("selection/")}
        assert {name: other[name] for name in reported} == pytest.approx(reported, rel=1e-5, abs=1e-7)
    assert len({line["prompt"] for line in alone}) > 12  # of 24, four per step


def until_step(run: Launched, directory: Path, step: int) -> None:
    until = time.monotonic() + LIMIT
    path = directory / "metrics.jsonl"
    while not (path.exists() and len(read_records(path)) >= step):
        assert all(process.poll() is None for process in run.processes), run.said()
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("asked, then", [(0, 1), (1, 4)])
def test_sigterm_to_one_saves_one_step_and_another_number_of_processes_goes_on(alone, configs, tmp_path, asked, then):
    directory, config = tmp_path / "run", configs["on the host"]
    status = ["--stopped-status", "17"] if asked else []
    commands = train(2, config, f"run_dir={directory}", *status)
    with launched(commands, tmp_path / "logs", share(2, REWARD_SECONDS="1")) as run:
        until_step(run, directory, WARM + 1)
        run.processes[asked].send_signal(signal.SIGTERM)
        assert run.ended(120) == [17 if asked else 143] * 2, run.said()
        stops = [line for text in run.said() for line in text.splitlines() if line.startswith("stopped at step ")]
    assert len(stops) == 2
    assert len(set(stops)) == 1, stops
    step = int(stops[0].removeprefix("stopped at step ").split(";")[0])
    assert WARM < step < WARM + STEPS
    saved = sorted(int(path.name) for path in (directory / "checkpoints").iterdir())
    assert saved == [WARM, step]
    finished(then, tmp_path / "more", "--resume", directory)
    assert_same_run(directory, alone["on the host"])


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_kill_of_one_ends_the_other_and_the_run_goes_on(alone, configs, tmp_path, killed):
    directory, config = tmp_path / "run", configs["on the host"]
    commands = train(2, config, f"run_dir={directory}", "checkpoints.every_steps=1")
    with launched(commands, tmp_path / "logs", share(2, REWARD_SECONDS="1")) as run:
        until_step(run, directory, WARM + 2)
        run.processes[killed].kill()
        since = time.monotonic()
        status, said = run.ended(90)[1 - killed], run.said()[1 - killed]
    assert time.monotonic() - since < 60
    # If process 0 is lost, jax may abort first, without naming the process.
    assert (status == 75 and f"process {killed} on" in said and "was lost" in said) or (
        killed == 0 and status == -signal.SIGABRT
    ), (status, said)
    finished(2, tmp_path / "more", "--resume", directory)
    assert_same_run(directory, alone["on the host"])


@pytest.mark.slow
@pytest.mark.parametrize("replaced", [False, True])
def test_both_go_on_from_their_hosts_or_neither_does(alone, configs, tmp_path, replaced):
    directory, config = tmp_path / "run", configs["on the host"]
    local = ["checkpoints.local_dir=" + str(tmp_path / "local"), "checkpoints.local_every_steps=1"]
    commands = train(2, config, f"run_dir={directory}", *local)
    with launched(commands, tmp_path / "logs", share(2, REWARD_SECONDS="1")) as run:
        until_step(run, directory, WARM + 4)
        for process in run.processes:
            process.kill()
        run.ended(30)
    assert [int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdecimal()] == [WARM]
    if replaced:  # a new host has no local checkpoint
        shutil.rmtree(next((tmp_path / "local").glob("*/process-1")))
    with launched(train(2, "--resume", directory), tmp_path / "more", share(2)) as run:
        run.succeeded()
        told = "resuming from the local checkpoint of step" in " ".join(run.said()[0].split())
    assert told != replaced
    # Runs of one and two processes may differ in the last digit of an entropy, so completions and rewards are compared.
    names = ("step", "completion", "reward")
    lines = [read_records(path / "samples.jsonl") for path in (directory, alone["on the host"])]
    assert [[line[n] for n in names] for line in lines[0]] == [[line[n] for n in names] for line in lines[1]]
    expected = params_of(alone["on the host"])
    assert all(relative(value, expected[name]) < 1e-5 for name, value in params_of(directory).items())
    assert json.loads((directory / "summary.json").read_text())["goodput"]["starts"] == 2


@pytest.mark.slow
@pytest.mark.fault(
    "address", "a run of two processes at an address is resumed on other machines", "the numbers are the same"
)
def test_two_processes_write_to_an_address_and_go_on_elsewhere(alone, configs, tmp_path):
    address, config = f"file://{tmp_path}/bucket/run", configs["in the program"]
    first, second = ({"XDG_CACHE_HOME": str(tmp_path / name)} for name in ("first", "second"))
    words = [config, f"run_dir={address}", f"training.steps={STEPS - 1}", "checkpoints.every_steps=1"]
    with launched(train(2, *words), tmp_path / "logs", share(2, **first)) as run:
        run.succeeded()
    shutil.rmtree(tmp_path / "first")  # these machines are gone
    commands = train(2, "--resume", address, f"training.steps={STEPS}")
    with launched(commands, tmp_path / "more", share(2, **second)) as run:
        run.succeeded()
    assert_same_run(tmp_path / "bucket" / "run", alone["in the program"])


@pytest.mark.slow
@pytest.mark.fault(
    "address",
    "the processes of a run share no disk",
    "each uploads the arrays of its devices; a checkpoint counts when all have, and each process downloads it whole",
)
def test_processes_without_a_shared_disk_bring_their_arrays_and_go_on_elsewhere(alone, configs, tmp_path):
    address, config = f"file://{tmp_path}/bucket/run", configs["in the program"]
    kept = ["checkpoints.every_steps=1", "checkpoints.keep=2"]
    # A reference that is stored once next to the checkpoints, with weight 0 in the loss.
    words = [config, f"run_dir={address}", *kept, "losses=[clipped_surrogate, {kl_estimate: {coefficient: 0.0}}]"]

    def apart(name: str) -> list[dict[str, str]]:
        return [share(2, XDG_CACHE_HOME=str(tmp_path / f"{name}{number}"))[number] for number in range(2)]

    with launched(train(2, *words, f"training.steps={STEPS - 1}"), tmp_path / "logs", apart("first")) as run:
        run.succeeded()
    bucket = tmp_path / "bucket" / "run"
    there = (path.relative_to(bucket / "checkpoints") for path in (bucket / "checkpoints").rglob("*") if path.is_file())
    assert {int(path.parts[0]) for path in there} == {WARM + STEPS - 2, WARM + STEPS - 1}
    for number in range(2):
        shutil.rmtree(tmp_path / f"first{number}")  # these machines are gone
    commands = train(2, "--resume", address, f"training.steps={STEPS}")
    with launched(commands, tmp_path / "more", apart("second")) as run:
        run.succeeded()
    assert list((bucket / "frozen").iterdir())
    names = ("step", "completion", "reward")
    lines = [read_records(path / "samples.jsonl") for path in (bucket, alone["in the program"])]
    assert [[line[n] for n in names] for line in lines[0]] == [[line[n] for n in names] for line in lines[1]]
    expected = params_of(alone["in the program"])
    assert all(relative(value, expected[name]) < 1e-5 for name, value in params_of(bucket).items())
    # A single process reads it like any other checkpoint.
    with launched([[sys.executable, "-m", "jaxrl_llm.cli", "ckpt", "verify", address]], tmp_path / "verify") as run:
        run.succeeded()


@pytest.mark.slow
def test_processes_of_which_some_share_a_disk_are_refused(configs, tmp_path):
    commands = train(3, configs["on the host"], f"run_dir=file://{tmp_path}/bucket/run", "mesh={devices: 3, data: 3}")
    homes = [{"XDG_CACHE_HOME": str(tmp_path / name), "JAX_NUM_CPU_DEVICES": "1"} for name in ("a", "a", "b")]
    with launched(commands, tmp_path / "logs", homes) as run:
        assert run.ended() == [2, 2, 2], run.said()
        assert all("but here share one: 0, 1; 2. Let XDG_CACHE_HOME name" in text for text in run.said())
    assert not (tmp_path / "bucket").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "apart",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.fault(
                "address",
                "a function of the user's fails on a process that shares no disk",
                "its traceback is at the address, in `host/N/logs/NAME.log` of process N",
            ),
        ),
    ],
)
def test_a_reward_that_fails_on_one_process_ends_all_with_the_state_saved(configs, tmp_path, apart):
    directory = tmp_path / "bucket" / "run"
    place = f"file://{directory}" if apart else str(directory)
    commands = train(2, configs["on the host"], f"run_dir={place}")
    environments = share(2)
    environments[1]["REWARD_FAILS"] = "1"
    for number in range(2 * apart):
        environments[number]["XDG_CACHE_HOME"] = str(tmp_path / f"home{number}")
    with launched(commands, tmp_path / "logs", environments) as run:
        assert run.ended() == [1, 1], run.said()
        for text in run.said():
            assert "process 1: reward 'vowel_share' raised RuntimeError: the judge is out of office" in text
            assert f"the last good checkpoint is step {WARM}; go on with: jaxrl train --resume {place}" in text
            assert f"its traceback and output are in {place}/host/1/logs/vowel_share.log" in text
    assert "the judge is out of office" in (directory / "host" / "1" / "logs" / "vowel_share.log").read_text()
    assert [path.name for path in (directory / "checkpoints").iterdir()] == [str(WARM)]


@pytest.mark.slow
def test_a_process_that_never_comes_is_named(configs, tmp_path):
    commands = train(3, configs["on the host"], f"run_dir={tmp_path / 'run'}", seconds=20)
    with launched(commands[:2], tmp_path / "logs", share(2)) as run:
        assert run.ended(120) == [75, 75]
        assert all("2 of 3 processes came within 20 s; missing: 2" in text for text in run.said())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_mesh_without_the_devices_of_a_process_is_refused(configs, tmp_path):
    commands = train(2, configs["on the host"], "mesh={devices: 2, data: 2}", f"run_dir={tmp_path / 'run'}")
    with launched(commands, tmp_path / "logs", share(2)) as run:
        assert run.ended() == [2, 2], run.said()
        assert all("the mesh takes 2 of 4 devices, and none of process 1 of 2" in text for text in run.said())


if __name__ == "__main__":
    two_steps(*map(int, sys.argv[1:5]), what=sys.argv[5], out=sys.argv[6])
