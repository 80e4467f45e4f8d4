"""Who the processes of a run are, and the roll call that they hold before they start."""

from __future__ import annotations

import json
import socket
import threading
import time
from importlib import metadata
from types import SimpleNamespace

import pytest

from jaxrl_llm import cli
from jaxrl_llm.parallel import hosts
from jaxrl_llm.parallel.peers import Place, ProcessLost
from jaxrl_llm.parallel.roll_call import Disagreement, call_roll
from jaxrl_llm.parallel.start import facts, initialise, place_of_this_process
from jaxrl_llm.run.stages import Stopped, TrainingError

SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_NODELIST": "node[003,007-009],other1",
    "SLURM_NTASKS": "32",
    "SLURM_STEP_NUM_TASKS": "32",
    "SLURM_PROCID": "13",
    "SLURM_LOCALID": "5",
    "SLURM_STEP_NUM_NODES": "4",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "6",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}


@pytest.fixture
def environment(monkeypatch):
    for name in (*SLURM, *OPEN_MPI, "JAX_COORDINATOR_PORT", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)

    def add(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return add


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# ---- who they are ----


def test_one_process_alone_needs_nothing(environment):
    assert place_of_this_process() is None
    assert place_of_this_process(processes=1) is None
    assert initialise(None, {}) is None
    environment(SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert place_of_this_process() is None


def test_a_pod_that_is_no_part_of_a_job_is_one_process(environment, recwarn):
    environment({"KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert place_of_this_process() is None
    assert not recwarn.list  # jax's advice to install kubernetes is for jobs


def test_slurm_with_one_process_for_each_gpu(environment):
    environment(SLURM)
    assert place_of_this_process() == Place("node003:61444", 32, 13, "slurm", (5,))
    environment({"JAX_COORDINATOR_PORT": "7000"})
    assert place_of_this_process().coordinator == "node003:7000"


def test_slurm_with_one_process_for_each_node_gives_it_all_gpus(environment):
    environment(SLURM | {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "0"})
    assert place_of_this_process() == Place("node003:61444", 4, 3, "slurm", None)


def test_open_mpi(environment):
    environment(OPEN_MPI)
    place = place_of_this_process()
    assert (place.processes, place.process, place.how, place.local_devices) == (8, 6, "ompi", (2,))
    assert place.coordinator.startswith("10.96.0.1:")
    environment({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"})
    assert place_of_this_process().local_devices is None


def test_open_mpi_5_is_not_recognised_by_jax_and_needs_an_address(environment):
    environment({name: value for name, value in OPEN_MPI.items() if name != "OMPI_MCA_orte_hnp_uri"})
    with pytest.raises(ValueError, match=r"(OMPI_COMM_WORLD_SIZE is 8|Open MPI 5).*add --coordinator"):
        place_of_this_process()
    assert place_of_this_process("host0:7000") == Place("host0:7000", 8, 6)


def test_a_tpu_slice_on_gke(environment, monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_tpu_env_value_from_metadata", lambda key: None)
    environment({"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost,b,c,d", "TPU_WORKER_ID": "2"})
    assert place_of_this_process() == Place("localhost:8482", 4, 2, "gketpu", None)
    environment({"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "localhost"})
    assert place_of_this_process() == Place("localhost:8482", 8, 6, "gketpu, MEGASCALE_NUM_SLICES=2", None)
    environment({"MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"})
    assert place_of_this_process() is None


@pytest.mark.parametrize(
    "flags, message",
    [
        ((None, 4, 1), "--processes 4 and --process-id 1 came without --coordinator"),
        (("a:1", None, None), "--coordinator a:1 came without --processes and --process-id"),
        (("a", 2, 0), "--coordinator is 'a'; write it as HOST:PORT"),
        (("a:0", 2, 0), "write it as HOST:PORT"),
        (("a:1", 2, 2), "--process-id is 2, --processes 2; they go from 0 to 1"),
        (("a:1", 0, 0), "--processes 0"),
    ],
)
def test_flags_that_do_not_go_together(environment, flags, message):
    with pytest.raises(ValueError, match=message):
        place_of_this_process(*flags)


# ---- the roll call ----


def roll(port: int, count: int, *processes: dict, seconds: float = 20.0) -> list:
    """What call_roll returns or raises in each of several threads that stand for processes."""
    results: list = [None] * len(processes)

    def call(at: int, process: int, **given):
        place = Place(f"127.0.0.1:{port}", given.pop("count", count), process)
        try:
            results[at] = call_roll(place, given.pop("facts", {}), seconds=seconds, **given)
        except Exception as error:
            results[at] = error

    threads = [threading.Thread(target=call, args=(at,), kwargs=given) for at, given in enumerate(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def test_all_hear_what_process_0_decided():
    peers = roll(free_port(), 3, {"process": 2}, {"process": 0, "decide": lambda: {"resume": True}}, {"process": 1})
    assert [peer.decided for peer in peers] == [{"resume": True}] * 3
    for peer in sorted(peers, key=lambda peer: -peer.place.process):
        peer.leave()


def test_a_difference_is_named_on_every_process_and_nobody_starts():
    same = {"jax": "0.10.2", "training.learning_rate": "0.1"}
    other = same | {"training.learning_rate": "0.2", "model.width": "64"}
    results = roll(
        free_port(), 3, *({"process": i, "facts": facts} for i, facts in enumerate([same, same, other])), seconds=20
    )
    host = socket.gethostname()
    for error in results:
        assert isinstance(error, Disagreement)
        assert f"training.learning_rate is 0.1 (process 0 on {host}, 1 on {host}), but 0.2 (process 2" in str(error)
        assert "model.width is not there (process 0" in str(error)
        assert "jax is" not in str(error)


def test_a_process_that_never_comes_is_named_in_bounded_time():
    started = time.monotonic()
    results = roll(free_port(), 4, {"process": 0}, {"process": 2}, seconds=1.5)
    assert time.monotonic() - started < 10
    for error in results:
        assert isinstance(error, ProcessLost)
        assert "2 of 4 processes came within 1.5 s; missing: 1, 3" in str(error)


def test_process_0_that_never_comes_is_named_in_bounded_time():
    port = free_port()
    (error,) = roll(port, 2, {"process": 1}, seconds=1.5)
    assert isinstance(error, ProcessLost)
    assert f"process 1 of 2 could not reach process 0 at 127.0.0.1:{port} within 1.5 s" in str(error)


def test_another_number_of_processes_is_said_before_the_time_is_up():
    started = time.monotonic()
    results = roll(free_port(), 4, {"process": 0}, {"process": 1, "count": 2}, seconds=30)
    assert time.monotonic() - started < 10
    assert all("number of processes is 4 (process 0" in str(error) for error in results)


def test_two_processes_of_one_number():
    results = roll(free_port(), 3, {"process": 0}, {"process": 1}, {"process": 1}, seconds=20)
    assert all(isinstance(error, Disagreement) for error in results)
    assert "both say that they are number 1" in str(results[0])


def connected(port: int) -> socket.socket:
    """A connection to a port on which somebody is about to listen."""
    until = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=5)
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_what_knocks_at_the_port_and_is_no_process_is_ignored():
    port = free_port()
    results: list = []
    waiting = threading.Thread(target=lambda: results.extend(roll(port, 2, {"process": 0})))
    waiting.start()
    strangers = []
    for words in (b"GET / HTTP/1.1\r\n\r\n", b'{"greeting": "hello"}\n', b"\xff\xfe\n"):
        strangers.append(connected(port))
        strangers[-1].sendall(words)
    strangers[0].close()
    (one,) = roll(port, 2, {"process": 1})
    waiting.join(20)
    assert [peer.place.process for peer in (one, *results)] == [1, 0]
    one.leave()
    results[0].leave()


@pytest.mark.parametrize("late", [1, 2])
def test_a_process_that_was_started_again_takes_its_place(late):
    port = free_port()
    results: list = []
    waiting = threading.Thread(target=lambda: results.extend(roll(port, 3, {"process": 0})))
    waiting.start()
    hello = {"greeting": "jaxrl roll call", "process": 1, "host": "x", "facts": {"number of processes": "3"}}
    with connected(port) as first:
        first.sendall(json.dumps(hello).encode() + b"\n")
        time.sleep(0.2)
    early: list = []
    other = threading.Thread(target=lambda: early.extend(roll(port, 3, {"process": 3 - late})))
    other.start()
    time.sleep(0.3)  # with the one that has ended it would make all of them
    rest = roll(port, 3, {"process": late})
    other.join(20)
    rest += early
    waiting.join(20)
    assert sorted(peer.place.process for peer in (*rest, *results)) == [0, 1, 2]
    for peer in (*rest, *results):
        peer.leave()


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        (error,) = roll(port, 2, {"process": 0}, seconds=1)
    assert f"process 0 cannot listen on port {port}" in str(error)


def test_facts_name_versions_source_and_every_key():
    told = facts({"a": {"b": 1, "c": {}}, "d": [1, 2]})
    assert {"a.b": "1", "a.c": "{}", "d": "[1, 2]"}.items() <= told.items()
    assert {"Python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "jaxrl_llm's source"} <= set(told)
    assert "not installed" not in {told["Python"], told["jax"], told["flax"], told["optax"], told["orbax-checkpoint"]}


@pytest.mark.parametrize("package", ["flax", "optax", "orbax-checkpoint", "libtpu", "Python"])
def test_a_process_with_another_version_of_a_package_is_named(monkeypatch, package):
    here = facts({})
    if package == "Python":
        monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    else:
        version = metadata.version
        monkeypatch.setattr(metadata, "version", lambda name: "0.0.1" if name == package else version(name))
    there = facts({})
    errors = roll(free_port(), 2, {"process": 0, "facts": here}, {"process": 1, "facts": there}, seconds=20)
    for error in errors:
        assert isinstance(error, Disagreement)
        assert f"{package} is {here[package]}" in str(error) or f"but {here[package]}" in str(error)
        assert there[package] in str(error)


# ---- the command line ----


def test_flags_of_the_command_are_checked(environment, micro_yaml, tmp_path, capsys):
    assert cli.main(["train", str(micro_yaml), f"run_dir={tmp_path}/run", "--processes", "2"]) == 2
    assert "--processes 2 came without --coordinator and --process-id" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_process_that_never_comes_ends_the_command_with_75(environment, micro_yaml, tmp_path, capsys):
    flags = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process-id", "0"]
    words = ["train", str(micro_yaml), f"run_dir={tmp_path}/run", *flags, "--start-timeout", "0.5"]
    assert cli.main(words) == 75
    assert "1 of 2 processes came within 0.5 s; missing: 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_resume_if_started(environment, micro_yaml, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "jaxrl_llm.commands.start_training.train",
        lambda config, *, resume, **_: seen.append(resume) or {"name": "x"},
    )
    words = ["train", str(micro_yaml), f"run_dir={tmp_path}/run"]
    assert cli.main([*words, "--resume-if-started"]) == 0
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    assert cli.main([*words, "--resume-if-started"]) == 0
    assert cli.main(words) == 0
    assert seen == [False, True, False]


def test_the_status_of_a_run_that_a_signal_stopped_can_be_chosen(
    environment, micro_yaml, tmp_path, monkeypatch, capsys
):
    def stopped(*args, **kwargs):
        raise Stopped("stopped at step 3")

    monkeypatch.setattr("jaxrl_llm.commands.start_training.train", stopped)
    words = ["train", str(micro_yaml), f"run_dir={tmp_path}/run"]
    assert cli.main(words) == 143  # as shells say that SIGTERM ended a process
    assert cli.main([*words, "--stopped-status", "0"]) == 0
    assert "stopped at step 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "outcome, status, left",
    [
        ({"name": "x"}, 0, (0, "")),
        (Stopped("stopped at step 3"), 143, (0, "")),
        (TrainingError("reward is nan"), 1, (1, "reward is nan")),
        (ValueError("no such file"), 2, (2, "no such file")),
        (RuntimeError("Gloo: connection closed"), 1, (1, "RuntimeError('Gloo: connection closed')")),
        (KeyboardInterrupt(), 130, (130, "interrupted")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_others_are_told_how_a_process_ends(environment, micro_yaml, tmp_path, monkeypatch, outcome, status, left):
    said, exits = [], []
    others = SimpleNamespace(
        place=Place("x:1", 2, 1), decided={"resume": False}, leave=lambda status=0, why="": said.append((status, why))
    )

    def run(*args, **kwargs):
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr("jaxrl_llm.commands.start_training.train", run)
    monkeypatch.setattr("jaxrl_llm.commands.start_training.initialise", lambda *args, **kwargs: others)
    monkeypatch.setattr("jaxrl_llm.parallel.peers.exit_now", exits.append)
    monkeypatch.setattr(hosts, "_peers", None)
    words = ["train", str(micro_yaml), f"run_dir={tmp_path}/run", "--stopped-status", "143"]
    assert cli.main(words) == status
    assert said == [left]
    assert exits == ([status] if left[0] else [])  # without waiting, as the interpreter's exit would
