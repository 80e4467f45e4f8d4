"""Real processes on loopback, under a watchdog: the same numbers for any number of them, and what happens at an end.

This file, run as a script, is the program of one process: `test_processes.py PROCESS COUNT PORT DEVICES PART OUT`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
LIMIT = 90  # seconds after which the watchdog ends a test's processes
ROWS = 8


# ---- the program ----


def program(process: int, count: int, port: int, devices: int, part: str, out: str) -> None:
    import jax

    from jaxrl_llm.parallel import hosts
    from jaxrl_llm.parallel.start import initialise, place_of_this_process

    jax.config.update("jax_num_cpu_devices", devices)
    if part == "slurm":
        place = place_of_this_process(seconds=30)
        assert place is not None
        assert (place.how, place.process, place.processes) == ("slurm", process, count)
    else:
        place = place_of_this_process(f"127.0.0.1:{port}", count, process)
    peers = initialise(place, {"part": part}, seconds=40)
    hosts.join(peers)
    if part in ("numbers", "slurm"):
        result = numbers()
        if hosts.is_main():
            Path(out).write_text(json.dumps(result))
    else:
        loop(process, part, out)
    if peers is not None:
        peers.leave()


def built(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Rows that depend on their number alone, as those of a data set do."""
    draws = [np.random.default_rng(int(row)).standard_normal(5).astype(np.float32) for row in rows]
    return {"x": np.stack(draws), "number": rows.astype(np.int32)}


def numbers() -> dict:
    """What a step computes: rows built and scored by their host, a mean over all of them, and prompts for later."""
    sys.path.insert(0, str(ROOT / "tests" / "selection"))
    import jax
    import jax.numpy as jnp
    from every_selection import EVERY, choices
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from jaxrl_llm.parallel import hosts, make_mesh

    mesh = make_mesh()
    sharding = NamedSharding(mesh, P("data"))
    asked = []
    batch = hosts.global_rows(lambda rows: asked.append(rows) or built(rows), ROWS, sharding)
    assert batch["x"].shape == (ROWS, 5)
    alone = jax.process_count() == 1
    # Every device holds every row of this one; each row is some host's to score once all the same.
    everywhere = jax.device_put(batch["x"], NamedSharding(mesh, P())) if alone else batch["x"]
    rows, (x, number) = hosts.own_rows((batch["x"], batch["number"]))
    assert rows.tolist() == number.tolist()
    rewards = hosts.gathered_rows(rows, np.tanh(x).sum(-1), ROWS)
    placed = hosts.global_rows(lambda rows: rewards[rows], ROWS, sharding)
    whole = NamedSharding(mesh, P())
    mean = jax.jit(lambda x, r: jnp.mean(x.sum(-1) * r), out_shardings=NamedSharding(mesh, P()))(batch["x"], placed)
    return {
        "built": sorted(np.concatenate(asked).tolist()),
        "owned": len(rows),
        "batch": hosts.host_copy(batch["x"]).tolist(),
        "rewards": rewards.tolist(),
        "owned of copies": hosts.own_rows(everywhere)[0].tolist(),
        "mean": float(mean),
        "choices": choices(EVERY, 5, sharding, out_shardings=whole),
    }


def loop(process: int, part: str, out: str) -> None:
    """Steps that need all processes, until all agree to stop."""
    from jax.experimental import multihost_utils

    from jaxrl_llm.parallel import hosts
    from jaxrl_llm.parallel.peers import exit_now

    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    for step in range(100_000):
        multihost_utils.process_allgather(np.ones(2, np.float32))
        if step == 3:
            Path(f"{out}.{process}").touch()
        if part == f"{process} fails" and step == 10:
            hosts.peers().leave(1, "reward is nan at step 10")
            exit_now(1)
        if hosts.agreed_stop(bool(asked)):
            print(f"stopped at {step}", flush=True)
            return
        time.sleep(0.01)


# ---- the tests ----


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def processes(directory: Path, commands: list[list[str]], environments: list[dict] | None = None):
    """Start them, and see that they are gone in the end."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    started = []
    try:
        for number, command in enumerate(commands):
            with open(directory / f"log{number}", "w") as log:
                more = environments[number] if environments else {}
                started.append(
                    subprocess.Popen(
                        command, stdout=log, stderr=subprocess.STDOUT, env=environment | more, cwd=directory
                    )
                )
        yield started
    finally:
        for one in started:
            if one.poll() is None:
                one.kill()
            one.wait()


def ended(started: list[subprocess.Popen], directory: Path, seconds: float = LIMIT) -> list[tuple[int, str]]:
    """(status, what it printed) of each."""
    until = time.monotonic() + seconds
    results = []
    for number, one in enumerate(started):
        try:
            status = one.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            logs = "\n".join((directory / f"log{i}").read_text()[-2000:] for i in range(len(started)))
            pytest.fail(f"process {number} has not ended after {seconds} s\n{logs}")
        results.append((status, (directory / f"log{number}").read_text()))
    return results


def commands(directory: Path, count: int, devices: int, part: str) -> list[list[str]]:
    port = str(free_port())
    out = str(directory / "out")
    return [[sys.executable, __file__, str(i), str(count), port, str(devices), part, out] for i in range(count)]


def until_looping(started: list[subprocess.Popen], directory: Path) -> None:
    until = time.monotonic() + LIMIT
    while not all((directory / f"out.{number}").exists() for number in range(len(started))):
        assert all(one.poll() is None for one in started), (directory / "log0").read_text()
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    """The numbers of one process with four devices."""
    directory = tmp_path_factory.mktemp("alone")
    with processes(directory, commands(directory, 1, 4, "numbers")) as started:
        ((status, log),) = ended(started, directory)
    assert status == 0, log
    return json.loads((directory / "out").read_text())


# The fast form: steps of two processes in test_several.py, and threads in test_start.py and test_peers.py.
@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_the_numbers_do_not_depend_on_the_number_of_processes(alone, tmp_path, count):
    with processes(tmp_path, commands(tmp_path, count, 4 // count, "numbers")) as started:
        results = ended(started, tmp_path)
    assert [status for status, _ in results] == [0] * count, results
    several = json.loads((tmp_path / "out").read_text())
    assert alone["built"] == alone["owned of copies"] == list(range(ROWS))
    assert (alone["owned"], several["owned"], len(several["built"])) == (ROWS, ROWS // count, ROWS // count)
    for name in ("batch", "rewards", "choices"):
        assert several[name] == alone[name], name
    assert several["mean"] == pytest.approx(alone["mean"], rel=1e-6)  # a sum in another order


@pytest.mark.slow
def test_processes_that_slurm_started(alone, tmp_path):
    port = str(free_port())
    job = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "JAX_COORDINATOR_PORT": port,
    }
    tasks = [job | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    with processes(tmp_path, commands(tmp_path, 2, 2, "slurm"), tasks) as started:
        results = ended(started, tmp_path)
    assert [status for status, _ in results] == [0, 0], results
    assert json.loads((tmp_path / "out").read_text())["rewards"] == alone["rewards"]


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_sigterm_to_one_stops_all_at_one_step(tmp_path, asked):
    with processes(tmp_path, commands(tmp_path, 2, 1, "loop")) as started:
        until_looping(started, tmp_path)
        started[asked].send_signal(signal.SIGTERM)
        results = ended(started, tmp_path, 30)
    assert [status for status, _ in results] == [0, 0], results
    steps = {line for _, log in results for line in log.splitlines() if line.startswith("stopped at ")}
    assert len(steps) == 1, results


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_that_is_killed_ends_the_other_with_a_message(tmp_path, victim):
    with processes(tmp_path, commands(tmp_path, 2, 1, "loop")) as started:
        until_looping(started, tmp_path)
        started[victim].kill()
        since = time.monotonic()
        status, log = ended(started, tmp_path, 60)[1 - victim]
    assert time.monotonic() - since < 30
    # When process 0 is lost, jax's own abort (134, of SIGABRT) may come first; it does not know who.
    assert (status == 75 and f"process {victim} on" in log and "was lost" in log) or (
        victim == 0 and status == -signal.SIGABRT and "another task died" in log
    ), (status, log)


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_ends_the_other_with_its_status_and_reason(tmp_path, failing):
    with processes(tmp_path, commands(tmp_path, 2, 1, f"{failing} fails")) as started:
        results = ended(started, tmp_path, 60)
    log = results[1 - failing][1]
    assert [status for status, _ in results] == [1, 1], log
    assert f"process {failing} on" in log
    assert "ended with status 1: reward is nan at step 10" in log


@pytest.mark.slow
def test_the_command_refuses_processes_with_different_configs(tmp_path, micro_yaml):
    flags = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--start-timeout", "60"]
    train = [sys.executable, "-m", "jaxrl_llm.cli", "train", str(micro_yaml), f"run_dir={tmp_path}/run"]
    both = [
        [*train, *flags, "--process-id", "0"],
        [*train, "training.learning_rate=0.5", *flags, "--process-id", "1"],
    ]
    with processes(tmp_path, both) as started:
        results = ended(started, tmp_path)
    for status, log in results:
        assert status == 2, log
        assert "training.learning_rate is 0.003 (process 0 on" in log
        assert "but 0.5 (process 1 on" in log
    assert not (tmp_path / "run").exists()


if __name__ == "__main__":
    program(*(int(word) for word in sys.argv[1:5]), *sys.argv[5:])
