"""A run at an address: at any moment it can be resumed from there, on this machine or another."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import fsspec
import pytest

from jaxrl_llm import cli
from jaxrl_llm.addresses import is_address, working_directory
from jaxrl_llm.config import parse_config
from jaxrl_llm.reporting import mirror as mirror_module
from jaxrl_llm.reporting import ownership
from jaxrl_llm.reporting.mirror import Mirror, changed_in_place, local_copy
from jaxrl_llm.reporting.ownership import OwnedError, owned_place
from jaxrl_llm.reporting.shares import Share
from jaxrl_llm.run import directories
from jaxrl_llm.run.directories import mirrored


@pytest.fixture
def address():
    memory = fsspec.filesystem("memory")
    yield "memory://bucket/runs/demo"
    if memory.exists("/bucket"):
        memory.rm("/bucket", recursive=True)


def write(directory, files):
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)


def files(directory):
    kept = [path for path in directory.rglob("*") if path.is_file() and path.name != ".mirror.json"]
    return {path.relative_to(directory).as_posix(): path.read_text() for path in kept}


RUN = {"config.yaml": "name: demo", "metrics.jsonl": '{"step": 1}\n', ".owner": "me"}
CHECKPOINT = {"checkpoints/1/state/d/0": "arrays", "checkpoints/1/meta/metadata": "{}"}


@pytest.mark.parametrize("kind", ["objects", "folders"])
@pytest.mark.fault(
    "address",
    "the machine is lost",
    "another machine resumes from the last checkpoint that was uploaded completely",
)
def test_another_machine_gets_what_was_brought_there(tmp_path, address, kind):
    address = address if kind == "objects" else f"file://{tmp_path}/bucket/run"
    here, there = Mirror(address, tmp_path / "here"), Mirror(address, tmp_path / "there")
    write(here.directory, RUN | CHECKPOINT | {"checkpoints/2.orbax-checkpoint-tmp/state/d/0": "half"})
    here.push()
    there.fetch()
    assert files(there.directory) == {n: t for n, t in (RUN | CHECKPOINT).items() if n != ".owner"}
    # Longer records, a checkpoint that retention deleted, and a new one.
    write(here.directory, {"metrics.jsonl": '{"step": 1}\n{"step": 2}\n', "checkpoints/2/meta/metadata": "{}"})
    shutil.rmtree(here.directory / "checkpoints" / "1")
    here.push()
    write(there.directory, {"checkpoints/7/meta/metadata": "of a run that went another way"})
    there.fetch()
    assert files(there.directory).keys() == {"config.yaml", "metrics.jsonl", "checkpoints/2/meta/metadata"}
    assert files(there.directory)["metrics.jsonl"].count("\n") == 2


@pytest.mark.fault(
    "address",
    "the address cannot be written during a run",
    "one message per attempt; the run continues, and incomplete uploads are ignored",
)
def test_a_checkpoint_without_its_meta_is_not_there(tmp_path, address, monkeypatch):
    here, there = Mirror(address, tmp_path / "here"), Mirror(address, tmp_path / "there")
    write(here.directory, RUN | CHECKPOINT | {"checkpoints/2/state/d/0": "a", "checkpoints/2/meta/metadata": "{}"})
    put, sent = here.fs.put_file, []

    def broken(source, target, **settings):
        sent.append(target.partition("/demo/")[2])
        if target.endswith("2/meta/metadata"):
            raise ConnectionError("the line is down")
        return put(source, target, **settings)

    monkeypatch.setattr(here.fs, "put_file", broken)
    said = []
    here.say = said.append
    here.push_later()
    here._thread.join()
    assert re.search(r"demo cannot be written now \(ConnectionError: the line is down\); the run continues", said[0])
    # Records first, then arrays, then metadata: until then another machine finds the previous checkpoint.
    assert sent[:2] == ["config.yaml", "metrics.jsonl"]
    assert sent[2].endswith("d/0")
    assert all(name.endswith("meta/metadata") for name in sent[4:])
    there.fetch()
    assert {name.split("/")[1] for name in files(there.directory) if "/" in name} == {"1"}
    monkeypatch.setattr(here.fs, "put_file", put)
    here.push()
    there.fetch()
    assert "checkpoints/2/meta/metadata" in files(there.directory)


@pytest.mark.fault(
    "address",
    "the address cannot be written at the end of a run",
    "status 75; the local working copy is complete, and the next `--resume` on this machine uploads it",
)
def test_what_could_not_be_brought_at_the_end_is_brought_by_the_next_start(tmp_path, address, monkeypatch):
    mirror = Mirror(address, tmp_path / "here")
    write(mirror.directory, RUN)
    mirror.push()
    put = mirror.fs.put_file

    def broken(*_, **__):
        raise OSError("503 Slow Down")

    def trained():
        with mirror.kept():
            write(mirror.directory, CHECKPOINT)
            monkeypatch.setattr(mirror.fs, "put_file", broken)

    with pytest.raises(ConnectionError, match=r"503 Slow Down.*here has the whole run"):
        trained()
    monkeypatch.setattr(mirror.fs, "put_file", put)
    again = Mirror(address, tmp_path / "here")
    again.fetch()  # this machine wrote it, so its copy is newer
    assert files(again.directory).keys() >= CHECKPOINT.keys()
    with again.kept():
        pass
    other = Mirror(address, tmp_path / "other")
    other.fetch()
    assert files(other.directory).keys() >= CHECKPOINT.keys()


def test_what_is_changed_in_place_is_changed_at_the_address(tmp_path, address, monkeypatch):
    here = Mirror(address, tmp_path / "here")
    write(here.directory, RUN | CHECKPOINT | {"checkpoints/2/meta/metadata": "{}"})
    here.push()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with changed_in_place(address) as run:
        assert run == working_directory(address)
        shutil.rmtree(run / "checkpoints" / "1")
    assert {name for name in here.there() if "/" in name} == {"checkpoints/2/meta/metadata"}
    here.fetch()  # the first machine now has an older copy
    assert "checkpoints/1/meta/metadata" not in files(here.directory)
    with pytest.raises(ValueError, match="has no run"), changed_in_place(f"{address}-other"):
        pass
    with changed_in_place(tmp_path) as run:
        assert run == tmp_path


@pytest.mark.fault(
    "address",
    "two runs are started at the same address",
    "the owner rewrites an object every 15 seconds; a new run waits 45 seconds to see whether it changes, unless the "
    "owner is known to have ended on the same machine. Of two that start at the same moment, the one that wrote last "
    "becomes the owner",
)
def test_an_address_has_one_owner(address):
    memory, name, said = fsspec.filesystem("memory"), "/bucket/.owner", []
    with owned_place(memory, name, address, say=said.append, beat=0.02):
        with (
            pytest.raises(OwnedError, match=r"run directory memory://bucket/runs/demo belongs to process \d+ on"),
            owned_place(memory, name, address, say=said.append, beat=0.02),
        ):
            pass
        assert "without a word; waiting" in said[0]
    assert not memory.exists(name)
    memory.pipe_file(name, json.dumps({"host": "gone", "pid": 1, "beat": 7}).encode())
    with owned_place(memory, name, address, say=said.append, beat=0.02):
        assert b'"gone"' not in memory.cat_file(name)


@pytest.mark.skipif(not ownership._machine(), reason="the system does not say which numbers of processes are its own")
def test_an_owner_that_was_killed_on_this_machine_is_not_waited_for(address):
    memory, name, said = fsspec.filesystem("memory"), "/bucket/.owner", []
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = ownership._me() | {"pid": ended.pid}
    for held, waits in ((left, 0), (left | {"machine": "another container"}, 1), (left | {"pid": os.getpid()}, 1)):
        memory.pipe_file(name, json.dumps(held).encode())
        said.clear()
        with owned_place(memory, name, address, say=said.append, beat=0.01):
            assert len(said) == waits


@pytest.mark.fault(
    "address",
    "a run is killed before it has computed anything",
    "it is at the address already, and the same command with `--resume-if-started` begins it anew",
)
def test_a_start_that_has_computed_nothing_is_in_nobodys_way(tmp_path, address, monkeypatch, micro_config):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = parse_config(micro_config | {"run_dir": address}, vocabulary_size=32)
    left = {"config.yaml": "name: killed", "metrics.jsonl": "", "checkpoints/1.orbax-checkpoint-tmp/x": ""}
    write(config.directory, left)
    assert not Mirror(address).started()
    with mirrored(config, False, print) as mirror:
        assert not files(config.directory)
        write(config.directory, RUN)
        mirror.push()
    assert Mirror(address).started()
    mirror.fs.rm(mirror.root, recursive=True)  # local files wait for upload
    assert Mirror(address).started()
    with pytest.raises(ValueError, match=r"has a working copy in .*resume that run"), mirrored(config, False, print):
        pass


@pytest.mark.parametrize(("kind", "local"), [("ext4", True), ("nfs4", False), ("fuse.gcsfuse", False)])
def test_only_what_other_hosts_could_share_is_waited_for(tmp_path, monkeypatch, kind, local):
    mounted = [SimpleNamespace(mountpoint="/", fstype="xfs"), SimpleNamespace(mountpoint=str(tmp_path), fstype=kind)]
    monkeypatch.setattr(directories.psutil, "disk_partitions", lambda all: mounted)
    assert directories._is_local(tmp_path / "jaxrl_llm" / "runs") == local
    assert directories._is_local(tmp_path.parent)
    monkeypatch.setattr(directories.psutil, "disk_partitions", lambda all: [])
    assert not directories._is_local(tmp_path)


@pytest.mark.fault(
    "address",
    "a process is killed while it brings a file",
    "at an address of objects, and in a local folder, the file is there whole or as it was",
)
def test_a_kill_leaves_no_half_file_in_a_local_folder(tmp_path, monkeypatch):
    mirror, other = shares(f"file://{tmp_path}/bucket/run", tmp_path, "a")
    write(mirror.directory, RUN)
    mirror.push()
    put = mirror.fs.put_file

    def killed(source, target, **_):
        put(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(mirror.fs, "put_file", killed)
    write(mirror.directory, {"metrics.jsonl": '{"step": 1}\n{"step": 2}\n'})
    with pytest.raises(KeyboardInterrupt):
        mirror.push()
    assert (tmp_path / "bucket/run/metrics.jsonl").read_text() == RUN["metrics.jsonl"]
    assert mirror.there().keys() == {"config.yaml", "metrics.jsonl"}
    # An incomplete report of another process is ignored.
    (tmp_path / "bucket/run/.brought-1").write_text('{"start": "a", "st')
    assert mirror.share.arrived(mirror.fs, mirror.root) == set()
    other.share.say(other.fs, other.root, ["checkpoints/1/"])
    assert mirror.share.arrived(mirror.fs, mirror.root) == {"checkpoints/1/"}


def test_one_file_is_brought_at_once_or_named_where_it_is(tmp_path, address, monkeypatch):
    mirror = Mirror(address, tmp_path / "here")
    write(mirror.directory, {"host/1/stalled.txt": "threads"})
    file = mirror.directory / "host/1/stalled.txt"
    assert mirror.brought(file) == f"{address}/host/1/stalled.txt"
    assert mirror.fs.cat_file(f"{mirror.root}/host/1/stalled.txt") == b"threads"
    monkeypatch.setattr(mirror.fs, "put_file", lambda *_: time.sleep(5))
    assert mirror.brought(file, seconds=0.01) == str(file)


def test_what_is_no_run_is_refused(tmp_path, address, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert working_directory(address) == tmp_path / "jaxrl_llm/runs/memory/bucket/runs/demo"
    assert local_copy(tmp_path) == tmp_path
    assert not is_address(tmp_path)
    with pytest.raises(ValueError, match="memory://bucket/runs/demo has no run"):
        local_copy(address)
    with pytest.raises(ValueError, match="nowhere://a cannot be reached: Protocol not known: nowhere"):
        Mirror("nowhere://a")


@pytest.mark.slow
def test_a_run_at_an_address_goes_on_on_another_machine(tmp_path, address, micro_config, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "first"))
    tree = micro_config | {"warm_start": {"steps": 0}, "run_dir": address, "evaluation": {"problems": 4, "k": [1]}}
    (tmp_path / "micro.json").write_text(json.dumps(tree))  # JSON is YAML
    config = str(tmp_path / "micro.json")
    assert cli.main(["train", config, "training.steps=3", "checkpoints.every_steps=2"]) == 0
    assert "run directory: memory://bucket/runs/demo" in capsys.readouterr().out
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    assert cli.main(["train", config, "training.steps=3"]) == 2
    assert "is not empty: resume that run" in capsys.readouterr().err
    assert cli.main(["train", "--resume", address, "training.steps=5", "checkpoints.every_steps=2"]) == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "third"))
    capsys.readouterr()
    assert cli.main(["ckpt", "verify", address, "--json"]) == 0
    assert [row["step"] for row in json.loads(capsys.readouterr().out)] == [3, 4, 5]
    assert cli.main(["ckpt", "prune", address, "--keep", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"deleted": 3}]
    assert not fsspec.filesystem("memory").exists("/bucket/runs/demo/checkpoints/3")
    run = working_directory(address)
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5]
    assert (
        cli.main(["eval", f"{address}/checkpoints/4", "--problems", "4", "--k", "1", "--out", str(tmp_path / "o")]) == 0
    )


def checkpoint_of(step, process):
    """The files of a checkpoint that a process writes: its chunk of an array, and the shared metadata."""
    said = {f"checkpoints/{step}/meta/metadata": "{}", f"checkpoints/{step}/state/w/.zarray": "{}"}
    notes = {f"checkpoints/{step}/state/array_metadatas/process_{process}": "{}"}
    return {f"checkpoints/{step}/state/w/0.{process}": f"{step} {process}"} | notes | said


def shares(address, tmp_path, start):
    return [Mirror(address, tmp_path / f"{start}{i}", share=Share(i, 2, start)) for i in range(2)]


@pytest.mark.parametrize("kind", ["objects", "folders"])
def test_a_checkpoint_is_there_when_each_process_has_brought_its_arrays(tmp_path, address, kind):
    address = address if kind == "objects" else f"file://{tmp_path}/bucket/run"
    main, other = shares(address, tmp_path, "a")
    write(main.directory, RUN | checkpoint_of(1, 0) | {"frozen/f/w/0.0": "f0", "frozen/f/w/.zarray": "{}"})
    write(other.directory, checkpoint_of(1, 1) | {"frozen/f/w/0.1": "f1", "metrics.jsonl": "of process 0"})
    write(other.directory, {"logs/reward.log": "of process 0", "host/1/logs/reward.log": "of this process"})
    main.push()
    assert not any(name.startswith("checkpoints") for name in main.there()), "the other's arrays are missing"
    other.push()
    main.push()
    everything = RUN | checkpoint_of(1, 0) | checkpoint_of(1, 1)
    everything |= {
        "frozen/f/w/0.0": "f0",
        "frozen/f/w/0.1": "f1",
        "frozen/f/w/.zarray": "{}",
        "host/1/logs/reward.log": "of this process",
    }
    expected = {name: text for name, text in everything.items() if name != ".owner"}
    # All have the whole run: a new machine, and the machines with their own parts.
    for mirror in (Mirror(address, tmp_path / "new"), *shares(address, tmp_path, "a")):
        mirror.fetch()
        assert {n: t for n, t in files(mirror.directory).items() if n in expected or "/" in n} == expected
    # Another start ignores reports of the first one; its retention deletes the first step.
    again, beside = (Mirror(address, tmp_path / f"a{i}", share=Share(i, 2, "b")) for i in range(2))
    for number, mirror in enumerate((again, beside)):
        shutil.rmtree(mirror.directory / "checkpoints" / "1")
        write(mirror.directory, checkpoint_of(2, number))
    write(beside.directory, checkpoint_of(3, 1))  # ahead
    again.push()
    assert not any(name.endswith("meta/metadata") for name in again.there())
    beside.push()
    again.push()
    assert {name.split("/")[1] for name in again.there() if name.startswith("checkpoints")} == {"2"}
    left = again.fs.find(f"{again.root}/checkpoints")
    assert any("/3/state" in name for name in left)
    assert not any("/1/" in name for name in left)


def test_at_the_end_process_0_waits_for_the_others_as_long_as_they_bring_something(tmp_path, address, monkeypatch):
    monkeypatch.setattr(mirror_module, "_PATIENCE_SECONDS", 1.0)
    main, other = shares(address, tmp_path, "a")
    write(main.directory, RUN | checkpoint_of(1, 0))
    write(other.directory, checkpoint_of(1, 1))

    def late():
        for _ in range(3):
            time.sleep(0.4)
            other.share.say(other.fs, other.root, [])
        with other.kept():
            pass

    bringing = threading.Thread(target=late)
    bringing.start()
    with main.kept(beat=0.1):
        pass
    bringing.join()
    assert "checkpoints/1/meta/metadata" in main.there()
    # A lost process is not waited for, and a step without its uploads is not complete.
    write(main.directory, checkpoint_of(2, 0))
    began = time.monotonic()
    with main.kept(beat=0.1):
        pass
    assert time.monotonic() - began < 10
    assert not any(name.startswith("checkpoints/2") for name in main.there())
