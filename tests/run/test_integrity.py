"""A damaged checkpoint is named and the newest good one is taken: 36 kinds of damage, and bits flipped anywhere."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import cli
from jaxrl_llm.experience import NetworkState, TrainState
from jaxrl_llm.run import checkpoints, integrity, stored_states
from jaxrl_llm.run.checkpoints import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


def make_state(step: int) -> TrainState:
    weights = jax.random.normal(jax.random.key(step), (40, 30))
    params = {"w": weights, "norm": jnp.ones(30, jnp.bfloat16) * step, "ids": jnp.arange(5, dtype=jnp.int8)}
    return TrainState(
        networks={"policy": NetworkState(params, ({"count": jnp.int32(step)}, None))},
        memory={"mean": jnp.float32(step)},
        key=jax.random.key(7),
        step=jnp.int32(step),
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A checkpoints directory with the steps 4 and 8."""
    folder = tmp_path_factory.mktemp("written") / "checkpoints"
    with checkpoints.checkpoint_manager(folder, keep=2) as manager:
        for step in (4, 8):
            meta = {"stage": "reinforcement", "stage_step": step, "tokens": 1234, "seconds": {"set-up": 1.5}}
            checkpoints.save(manager, step, make_state(step), meta)
    return folder


@pytest.fixture
def copied(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "checkpoints"))


def data_file(step: Path) -> Path:
    """The file with the arrays."""
    return max((path for path in step.glob("state/**/d/*")), key=lambda path: path.stat().st_size)


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[min(int(place * len(content)), len(content) - 1)] ^= 0x10
    path.write_bytes(content)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def become_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def emptied(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def of_other_step(step: Path, part: str) -> None:
    shutil.rmtree(step / part)
    shutil.copytree(step.parent / "4" / part, step / part)


def foreign(step: Path) -> None:
    emptied(step)
    (step / "notes.txt").write_text("not a checkpoint")


def without_digests(step: Path) -> None:
    meta = json.loads((step / "meta" / "metadata").read_text())
    (step / "meta" / "metadata").write_text(json.dumps({k: v for k, v in meta.items() if not k.startswith("digest")}))


def zeroed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100:400] = bytes(300)
    path.write_bytes(content)


def a_file(step: Path) -> None:
    shutil.rmtree(step)
    step.write_text("")


META, TREE = "meta/metadata", "state/_METADATA"
# Those of the last part change nothing that is read: the checkpoint is as good as before.
DAMAGE = {
    "data: first byte": lambda s: flip(data_file(s), 0),
    "data: a byte in the middle": lambda s: flip(data_file(s), 0.5),
    "data: a byte at two thirds": lambda s: flip(data_file(s), 0.67),
    "data: cut in half": lambda s: data_file(s).write_bytes(data_file(s).read_bytes()[:2000]),
    "data: empty": lambda s: data_file(s).write_bytes(b""),
    "data: gone": lambda s: data_file(s).unlink(),
    "data: a hole of zeros": lambda s: zeroed(data_file(s)),
    "data: a directory": lambda s: become_directory(data_file(s)),
    "data: all gone": lambda s: [path.unlink() for path in s.glob("state/**/d/*")],
    "manifest: a byte": lambda s: flip(s / "state/manifest.ocdbt", 0.5),
    "manifest: empty": lambda s: (s / "state/manifest.ocdbt").write_bytes(b""),
    "manifest: gone": lambda s: (s / "state/manifest.ocdbt").unlink(),
    "manifest: a directory": lambda s: become_directory(s / "state/manifest.ocdbt"),
    "manifest: of another step": lambda s: shutil.copy(s.parent / "4/state/manifest.ocdbt", s / "state"),
    "process folder: gone": lambda s: shutil.rmtree(s / "state/ocdbt.process_0"),
    "tree: gone": lambda s: (s / TREE).unlink(),
    "tree: empty": lambda s: (s / TREE).write_text(""),
    "tree: not JSON": lambda s: (s / TREE).write_text("{" * 5000),
    "tree: a list": lambda s: (s / TREE).write_text("[]"),
    "tree: an array has another name": lambda s: edit(s / TREE, '"key": "norm"', '"key": "form"'),
    "meta: gone": lambda s: (s / META).unlink(),
    "meta: folder gone": lambda s: shutil.rmtree(s / "meta"),
    "meta: empty": lambda s: (s / META).write_text(""),
    "meta: a number changed": lambda s: edit(s / META, "1234", "1235"),
    "meta: a digest changed": lambda s: edit(s / META, '"0:40,0:30": "', '"0:40,0:30": "f'),
    "meta: nested deeply": lambda s: (s / META).write_text("[" * 100_000),
    "meta: no text": lambda s: (s / META).write_bytes(b"\xff\xfe\x00"),
    "meta: a list": lambda s: (s / META).write_text("[1]"),
    "meta: of another step": lambda s: of_other_step(s, "meta"),
    "state: gone": lambda s: shutil.rmtree(s / "state"),
    "state: empty": lambda s: emptied(s / "state"),
    "state: of another step": lambda s: of_other_step(s, "state"),
    "step: an empty directory": emptied,
    "step: a foreign directory": foreign,
    "step: a file": a_file,
}
HARMLESS = {
    "marks of completeness: gone": lambda s: [path.unlink() for path in s.rglob("commit_success.txt")],
    "shardings: gone": lambda s: (s / "state/_sharding").unlink(),
    "notes on arrays: gone": lambda s: shutil.rmtree(s / "state/array_metadatas"),
    "orbax's own notes: gone": lambda s: (s / "_CHECKPOINT_METADATA").unlink(),
    "meta: written before there were digests": without_digests,
}


def listed(kinds) -> str:
    """The kinds as docs/survival.md lists them."""
    by_part: dict[str, list[str]] = {}
    for kind in kinds:
        part, _, what = kind.partition(": ")
        by_part.setdefault(part, []).append(what)
    return "\n".join(f"- {part}: {', '.join(what)}" for part, what in by_part.items())


def test_the_page_lists_every_kind_of_damage():
    page = Path(__file__).parents[2].joinpath("docs", "survival.md").read_text()
    assert f":\n\n{listed(DAMAGE)}\n" in page, listed(DAMAGE)
    assert f":\n\n{listed(HARMLESS)}\n" in page, listed(HARMLESS)
    assert len(DAMAGE) >= 33


def same(found, expected) -> None:
    def bits(leaf):
        key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if key else leaf)

    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), found, expected)


# One of each way in which a checkpoint is looked at; the others are slow.
FAST = {
    "data: a byte in the middle",
    "data: gone",
    "manifest: of another step",
    "tree: not JSON",
    "meta: gone",
    "meta: a number changed",
    "meta: nested deeply",
    "state: of another step",
    "step: an empty directory",
    "step: a file",
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in FAST else [pytest.mark.slow]) for kind in DAMAGE]
)
def test_damage_is_named_and_the_checkpoint_before_it_is_taken(copied, kind):
    DAMAGE[kind](copied / "8")
    said: list[str] = []
    assert integrity.newest_good(copied, say=said.append) == 4
    assert said[0].startswith("checkpoint 8 is damaged: ")
    assert said[0].endswith("; trying the one before it")
    assert said[1].startswith("checkpoint 4 is verified (7 arrays, ")
    assert all(len(line) < 400 and "\n" not in line for line in said)
    with pytest.raises(CheckpointError, match=r"is damaged|holds no checkpoint"):
        integrity.latest_checkpoint(copied / "8")


def test_a_damaged_checkpoint_is_refused_where_it_is_meant_and_passed_over_where_it_is_not(copied, capsys):
    flip(data_file(copied / "8"), 0.5)
    with pytest.raises(CheckpointError, match=r"checkpoint 8 is damaged: .*; leave --exact out"):
        integrity.newest_good(copied, exact=True)
    assert integrity.latest_checkpoint(copied.parent) == (copied, 4)
    assert capsys.readouterr().err.startswith("warning: checkpoint 8 is damaged: ")
    same(stored_states.restore(copied, 4, make_state(4)), make_state(4))


def test_what_no_restart_reads_may_be_lost(copied):
    for kind in HARMLESS:  # one after the other, and in the end all
        HARMLESS[kind](copied / "8")
        assert integrity.newest_good(copied, say=print) == 8, kind
    same(stored_states.restore(copied, 8, make_state(8)), make_state(8))


def wrong_states(copied: Path, flips: int) -> tuple[int, int]:
    """(wrong states, noticed flips) of single bits flipped anywhere in a checkpoint, one at a time."""
    draw, wrong, noticed = random.Random(flips), 0, 0
    files = sorted(path for path in (copied / "8").rglob("*") if path.is_file() and path.stat().st_size)
    for _ in range(flips):
        path = draw.choices(files, [file.stat().st_size for file in files])[0]
        before = path.read_bytes()
        content = bytearray(before)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        step = integrity.newest_good(copied, say=lambda text: None)
        try:
            same(stored_states.restore(copied, step, make_state(step)), make_state(step))
            noticed += step == 4
        except checkpoints.Damaged:  # in what orbax notes beside the arrays: a run tries the one before it
            noticed += 1
        except AssertionError:
            wrong += 1
        path.write_bytes(before)
    return wrong, noticed


def test_a_flipped_bit_is_never_restored(copied):
    wrong, noticed = wrong_states(copied, 6)
    assert wrong == 0
    assert noticed >= 1  # of 6, each of which is noticed with probability 3/4: names of files are random


@pytest.mark.slow
def test_a_thousand_flipped_bits_are_never_restored(copied):
    assert wrong_states(copied, 1000)[0] == 0


def test_without_a_good_checkpoint_all_that_is_wrong_is_said(copied):
    for step in ("4", "8"):
        flip(data_file(copied / step), 0.5)
    with pytest.raises(
        CheckpointError, match=r"holds no good checkpoint: checkpoint 8 .*; checkpoint 4 .*; restore one"
    ):
        integrity.newest_good(copied, say=lambda text: None)


def test_only_what_is_read_has_to_be_good(copied):
    said: list[str] = []
    assert integrity.newest_good(copied, within="networks/policy/params/", say=said.append) == 8
    assert "(3 arrays, " in said[0]


def test_a_run_that_goes_on_from_an_earlier_step_moves_later_ones_aside(copied):
    flip(data_file(copied / "8"), 0.5)
    (moved,) = integrity.set_aside(copied, 4)
    assert moved == copied.parent / "damaged" / "8"
    assert checkpoints.steps(copied) == [4]
    shutil.copytree(moved, copied / "8")
    assert integrity.set_aside(copied, 4) == [copied.parent / "damaged" / "8.1"]
    with checkpoints.checkpoint_manager(copied, keep=2) as manager:
        checkpoints.save(manager, 8, replace(make_state(8)), {"stage": "x"})
    assert integrity.newest_good(copied, say=print) == 8


def test_storage_that_does_not_answer_says_nothing_about_a_checkpoint(copied, monkeypatch):
    def unreachable(*_):
        raise ValueError("UNAVAILABLE: Error reading gs://bucket: connection reset")

    monkeypatch.setattr(stored_states, "stored_shapes", unreachable)
    with pytest.raises(ValueError, match="UNAVAILABLE"):
        integrity.newest_good(copied)


# ---- retention and tools --------------------------------------------------------------------------------------------


def kept(folder: Path, metrics: dict[int, float | None], **policy) -> list[int]:
    with checkpoints.checkpoint_manager(folder, **policy) as manager:
        for step, metric in metrics.items():
            checkpoints.save(manager, step, {"step": jnp.int32(step)}, {"stage": "x"}, metric=metric)
    return checkpoints.steps(folder)


@pytest.mark.parametrize(
    "policy, expected",
    [
        pytest.param({"keep": 2}, [5, 6], marks=pytest.mark.slow),
        pytest.param({"keep": 1, "keep_every_steps": 2}, [2, 4, 6], marks=pytest.mark.slow),
        ({"keep": 1, "keep_every_steps": 3, "keep_best": 1}, [3, 6]),
        pytest.param({"keep": 1, "keep_best": 1}, [3, 6], marks=pytest.mark.slow),
        ({"keep": 2, "keep_best": 2, "best_is": "lowest"}, [2, 4, 5, 6]),
    ],
)
def test_the_newest_are_kept_with_some_for_ever_and_the_best(tmp_path, policy, expected):
    metrics = {1: None, 2: 0.1, 3: 0.9, 4: 0.2, 5: 0.5, 6: None}
    assert kept(tmp_path / "checkpoints", metrics, **policy) == expected


def jaxrl(capsys, *arguments: str, status: int = 0):
    assert cli.main([*arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_checkpoints_are_listed_verified_and_pruned(copied, capsys):
    listed = jaxrl(capsys, "ckpt", "list", str(copied.parent))
    assert [(row["step"], row["stage"]) for row in listed] == [(4, "reinforcement"), (8, "reinforcement")]
    assert [row["state"] for row in jaxrl(capsys, "ckpt", "verify", str(copied.parent))] == ["good", "good"]
    flip(data_file(copied / "8"), 0.5)
    rows = jaxrl(capsys, "ckpt", "verify", str(copied.parent), status=1)
    assert [row["state"].split(":")[0] for row in rows] == ["good", "damaged"]
    assert len(jaxrl(capsys, "ckpt", "verify", str(copied / "4"))) == 1
    assert jaxrl(capsys, "ckpt", "prune", str(copied.parent), "--keep", "1") == []  # the newest good one stays
    shutil.rmtree(copied / "8")
    shutil.copytree(copied / "4", copied / "8")
    assert jaxrl(capsys, "ckpt", "prune", str(copied.parent), "--keep", "1", "--keep-every", "4") == []
    assert jaxrl(capsys, "ckpt", "prune", str(copied.parent), "--keep", "1") == [{"deleted": 4}]


def test_a_checkpoint_is_written_anew_with_digests(copied, tmp_path, capsys):
    without_digests(copied / "8")
    (copied.parent / "config.yaml").write_text("name: x\n")
    jaxrl(capsys, "ckpt", "convert", str(copied.parent), str(tmp_path / "whole"))
    assert [row["state"] for row in jaxrl(capsys, "ckpt", "verify", str(tmp_path / "whole"))] == ["good"]
    same(stored_states.restore(tmp_path / "whole" / "checkpoints", 8, make_state(8)), make_state(8))
    assert (tmp_path / "whole" / "config.yaml").is_file()
    jaxrl(capsys, "ckpt", "convert", str(copied.parent), str(tmp_path / "one"), "--only", "policy")
    found = stored_states.restore_params(tmp_path / "one" / "checkpoints", 8, make_state(8).params)
    same(found, make_state(8).params)
    assert cli.main(["ckpt", "convert", str(copied.parent), str(tmp_path / "one")]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert cli.main(["ckpt", "convert", str(copied.parent), str(tmp_path / "two"), "--only", "critic"]) == 2
    assert "holds no network 'critic'; it has policy" in capsys.readouterr().err
