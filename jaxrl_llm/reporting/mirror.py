"""A run directory at an address of fsspec (`s3://`, `gs://`, `az://`, `memory://`, ...), kept as a copy of a local one.

A run writes to a local directory: records are appended there, and orbax writes checkpoints there. Complete files are
copied to the address, in the background after each checkpoint and once more at the end. Records are copied before
checkpoints, and the meta file of a checkpoint after its arrays, so that the run can be resumed from the address at any
time. The storage needs neither appending nor renaming nor locks.

If each of several processes has its own disk, each has a local directory with the arrays of its devices. It uploads
these and its own logs (`Share`); process 0 uploads all other files, and the meta file of a checkpoint after all other
processes have reported the upload of their arrays.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from jaxrl_llm.addresses import is_address, working_directory
from jaxrl_llm.bounds import error_line
from jaxrl_llm.reporting.ownership import FILE, owned_place
from jaxrl_llm.reporting.shares import BROUGHT, Share, step_folder, step_folders, step_number

_STATE, _COPY = ".mirror.json", ".copy"  # local: the copied files; at the address: its working copy
_PART = ".part-"  # followed by the number of a process: a file in a local folder before it is renamed
_META = "meta/metadata"  # a checkpoint with this file is complete
_SAYS_SECONDS, _PATIENCE_SECONDS = 5.0, 60.0  # interval of reports during uploads, and patience


class Mirror:
    """An address and the local directory that it is a copy of.

    Args:
      address: of a run directory.
      directory: the local one; `working_directory` of the address by default.
      say: receives a message when the address cannot be written to during a run.
      share: of this process, if each of several processes has its own local directory; None if one process has all
          files.

    Raises:
      ValueError: if fsspec has no package for the address; names the package.
    """

    def __init__(
        self,
        address: str,
        directory: Path | None = None,
        say: Callable[[str], Any] = print,
        share: Share | None = None,
    ):
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        try:
            self.fs, self.root = fsspec.core.url_to_fs(address, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"{address} cannot be reached: {error}; install the package for it (gcsfs for gs://, s3fs for "
                "s3://, adlfs for az://), or give a local directory"
            ) from None
        self.address, self.say, self.share = address.rstrip("/"), say, share
        self.root, self._renames = self.root.rstrip("/"), isinstance(self.fs, LocalFileSystem)
        self.directory = working_directory(address) if directory is None else directory
        self._at_work = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def apart(self) -> bool:
        """Whether each of several processes has its own local directory."""
        return self.share is not None

    def there(self) -> dict[str, int]:
        """Size of each file at the address by its name, without checkpoints whose meta file is missing.

        Raises:
          ValueError: if the address cannot be reached.
        """
        try:
            found = self.fs.find(self.root, detail=True)
        except FileNotFoundError:
            return {}
        except Exception as error:  # storage libraries have their own types
            raise ValueError(
                f"{self.address} cannot be reached: {error_line(error)}; restore access, or give another address"
            ) from error
        sizes = {name[len(self.root) + 1 :]: int(info["size"]) for name, info in found.items()}
        whole = {name.removesuffix(_META) for name in sizes if name.endswith(_META)}
        return {
            name: size
            for name, size in sizes.items()
            if name not in (FILE, _COPY)
            and not name.startswith((BROUGHT, _PART))
            and (step_folder(name) is None or step_folder(name) in whole)
        }

    def started(self) -> bool:
        """Whether the address has a run, or the local directory has one that is not yet copied to the address."""
        state = self._state()
        waits = bool(state["copy"]) and not state["share"] and (self.directory / "config.yaml").is_file()
        return "config.yaml" in self.there() or waits

    def computed(self) -> bool:
        """Whether the local directory has records of steps, or a checkpoint."""
        records = self.directory / "metrics.jsonl"
        return bool(step_folders(self._local())) or (records.is_file() and records.stat().st_size > 0)

    def begin(self) -> None:
        """Empty the local directory for a new run: an earlier start that computed no step may have left files."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def fetch(self) -> None:
        """Copy the run at the address to the local directory, unless the address was written from this directory.

        In that case the local files are as new or newer, and nothing is fetched, unless they are only a share.

        Raises:
          ValueError: if there is no run.
        """
        there = self.there()
        if "config.yaml" not in there and (self.directory / "config.yaml").is_file() and not self._state()["share"]:
            return  # not copied to the address yet
        if "config.yaml" not in there:
            raise ValueError(f"{self.address} has no run (config.yaml is missing); give the address of a run")
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        with (self.directory.parent / f".{self.directory.name}.lock").open("w") as lock:
            with contextlib.suppress(OSError):  # file systems without locks
                fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes of a run, the first one fetches
            self._fetch(there)

    def _fetch(self, there: dict[str, int]) -> None:
        sent = {}
        state = self._state()
        with contextlib.suppress(FileNotFoundError):
            if (
                state["copy"]
                and not state["share"]
                and self.fs.cat_file(f"{self.root}/{_COPY}").decode() == state["copy"]
            ):
                return
        for name in self._local():
            if name not in there:
                (self.directory / name).unlink(missing_ok=True)
        self._remove_empty()
        for name, size in there.items():
            file = self.directory / name
            if not (file.is_file() and state["sent"].get(name) == _stamp(file) and file.stat().st_size == size):
                file.parent.mkdir(parents=True, exist_ok=True)
                self.fs.get_file(f"{self.root}/{name}", str(file.with_name(f".{file.name}.part")))
                file.with_name(f".{file.name}.part").replace(file)
            sent[name] = _stamp(file)
        self._remember({"copy": "", "sent": sent, "share": False})

    def push(self) -> None:
        """Copy changed files to the address, and delete files there that were deleted locally.

        Raises:
          OSError and the storage's own errors: if it cannot be written; the next call continues.
        """
        with self._at_work:
            state = self._state()
            if not state["copy"] or (self.share is not None and not state["share"]):
                state |= {"copy": state["copy"] or uuid.uuid4().hex, "share": self.share is not None}
                self._remember(state)
                self.fs.makedirs(self.root, exist_ok=True)
            if self.share is None or self.share.is_main:
                self._push_all(state, self._local())
            else:
                self._push_arrays(state, self._local(), self.share)
            self._remember(state)

    def _push_all(self, state: dict[str, Any], names: list[str]) -> None:
        """`push` for a process that has all files, or all except the arrays of other processes."""
        elsewhere = None if self.share is None else self.share.arrived(self.fs, self.root)
        for name in names:
            stamp = _stamp(self.directory / name)
            if stamp is None or stamp == state["sent"].get(name):
                continue
            if name.endswith(_META) and elsewhere is not None and step_folder(name) not in elsewhere:
                continue
            if self._put(name):
                state["sent"][name] = stamp
        self.fs.pipe_file(f"{self.root}/{_COPY}", state["copy"].encode())
        gone = state["sent"].keys() - set(names)
        if self.share is not None:
            gone |= self._left_by_others(names)
        for name in sorted(gone, key=lambda each: not each.endswith(_META)):
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(f"{self.root}/{name}")
            state["sent"].pop(name, None)
        folders = {str(folder) for name in gone for folder in PurePosixPath(name).parents} - {"."}
        for folder in sorted(folders, key=len, reverse=True):  # folders that are not empty remain
            with contextlib.suppress(OSError, NotImplementedError):
                self.fs.rmdir(f"{self.root}/{folder}")

    def _push_arrays(self, state: dict[str, Any], names: list[str], share: Share) -> None:
        """`push` for a process that has only its own arrays and logs; process 0 deletes removed files."""
        before, since = share.said_by(self.fs, self.root, share.process)["steps"], time.monotonic()
        state["sent"] = {name: state["sent"][name] for name in names if name in state["sent"]}
        for name in filter(share.brings, names):
            stamp = _stamp(self.directory / name)
            if stamp is not None and stamp != state["sent"].get(name) and self._put(name):
                state["sent"][name] = stamp
            if time.monotonic() - since > _SAYS_SECONDS:
                share.say(self.fs, self.root, before)
                since = time.monotonic()
        share.say(self.fs, self.root, step_folders(names))

    def _left_by_others(self, names: list[str]) -> set[str]:
        """Files at the address of steps that retention has deleted locally; other processes may have later steps."""
        here = {step_number(step) for step in step_folders(names)}
        there = [name[len(self.root) + 1 :] for name in self.fs.find(f"{self.root}/checkpoints")]
        steps = {name: step_number(step) for name in there if (step := step_folder(name))}
        return {name for name, step in steps.items() if step not in here and step < max(here, default=0)}

    def _wait_for_others(self, share: Share) -> None:
        """Wait until the other processes have copied their arrays of the newest step, or have sent no sign for a
        while."""
        newest = set(sorted(step_folders(self._local()), key=step_number)[-1:])
        heard, since = None, time.monotonic()
        while not newest <= share.arrived(self.fs, self.root):
            said = [share.said_by(self.fs, self.root, other) for other in share.others]
            if said != heard:
                heard, since = said, time.monotonic()
            elif time.monotonic() - since > _PATIENCE_SECONDS:
                return
            time.sleep(0.5)

    def _put(self, name: str) -> bool:
        """Copy a file; returns False if retention has deleted it meanwhile."""
        file, target = self.directory / name, f"{self.root}/{name}"
        try:
            self._put_whole(file, target)
        except FileNotFoundError:
            if not file.is_file():
                return False
            self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)  # for storage with real folders
            self._put_whole(file, target)
        return True

    def _put_whole(self, file: Path, target: str) -> None:
        """Write a file atomically: an object appears complete or not at all, and a local file is written, then
        renamed."""
        if not self._renames:
            return self.fs.put_file(str(file), target)
        part = f"{self.root}/{_PART}{0 if self.share is None else self.share.process}"
        self.fs.put_file(str(file), part)
        os.replace(part, target)

    def brought(self, file: Path, *, seconds: float = 10.0) -> str:
        """Copy one file to the address now and return its place: the local path, if the storage does not accept it in
        time.

        For the last message of a process that cannot wait.
        """
        name, there = file.relative_to(self.directory).as_posix(), threading.Event()

        def bring() -> None:
            with contextlib.suppress(Exception):
                if self._put(name):
                    there.set()

        bringing = threading.Thread(target=bring, name="mirror of a file", daemon=True)
        bringing.start()
        bringing.join(seconds)
        return f"{self.address}/{name}" if there.is_set() else str(file)

    def push_later(self) -> None:
        """`push` in the background, unless one is running; a failure is reported, and the next call continues."""
        if self._thread is not None and self._thread.is_alive():
            return

        def work() -> None:
            try:
                self.push()
            except Exception as error:
                self.say(f"{self.address} cannot be written now ({error_line(error)}); the run continues and retries")

        self._thread = threading.Thread(target=work, name="mirror", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def kept(self, *, beat: float = 15.0) -> Iterator[None]:
        """Own the address during a block, and copy all files there when the block ends, also after an exception.

        If each of several processes has a share, process 0 owns the address, and waits for the others at the end.

        Raises:
          OwnedError: if another process owns it.
          ConnectionError: if the address cannot be written at the end; the local directory is complete.
        """
        self.fs.makedirs(self.root, exist_ok=True)
        owner = self.share is None or self.share.is_main
        place = self.fs, f"{self.root}/{FILE}", self.address
        with owned_place(*place, say=self.say, beat=beat) if owner else contextlib.nullcontext():
            try:
                yield
            finally:
                if self._thread is not None:
                    self._thread.join()
                try:
                    if self.share is not None and owner:
                        self._wait_for_others(self.share)
                    self.push()
                except Exception as error:
                    raise ConnectionError(
                        f"{self.address} cannot be written ({error_line(error)}); {self.directory} has the whole "
                        f"run: jaxrl train --resume {self.address} on this machine uploads it"
                    ) from error

    def _local(self) -> list[str]:
        """Names of local files in the order in which they are copied: records, arrays of checkpoints, their meta
        files."""
        found = []
        for folder, folders, files in os.walk(self.directory):
            folders[:] = [name for name in folders if "orbax-checkpoint-tmp" not in name]
            at = Path(folder).relative_to(self.directory)
            found += [(at / name).as_posix() for name in files if not name.startswith(".") or at != Path()]
        return sorted(found, key=lambda name: (step_folder(name) is not None, name.endswith(_META), name))

    def _remove_empty(self) -> None:
        for folder, _, _ in os.walk(self.directory, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)

    def _state(self) -> dict[str, Any]:
        try:
            return {"share": False} | json.loads((self.directory / _STATE).read_text())
        except (OSError, ValueError):
            return {"copy": "", "sent": {}, "share": False}

    def _remember(self, state: dict[str, Any]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        part = self.directory / f"{_STATE}.part"
        part.write_text(json.dumps(state))
        part.replace(self.directory / _STATE)


def local_copy(path: str | os.PathLike) -> Path:
    """A local path unchanged; for an address, the local directory with the files that are at the address now.

    Raises:
      ValueError: if there is no run.
    """
    if not is_address(path):
        return Path(path)
    mirror = Mirror(os.fspath(path))
    mirror.fetch()
    return mirror.directory


@contextlib.contextmanager
def changed_in_place(path: str | os.PathLike, say: Callable[[str], Any] = print) -> Iterator[Path]:
    """A run directory to be changed: for an address, the local copy, whose changes are copied there at the end.

    Raises:
      ValueError: if there is no run.
      OwnedError: if another process writes to the address.
      ConnectionError: if the address cannot be written at the end.
    """
    if not is_address(path):
        yield Path(path)
        return
    mirror = Mirror(os.fspath(path), say=say)
    mirror.fetch()
    with mirror.kept():
        mirror.fetch()  # changes of the last owner
        yield mirror.directory


def _stamp(file: Path) -> list[int] | None:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return [found.st_size, found.st_mtime_ns]
