"""A conversion that ends early, in whatever way, goes on where it was and ends as if nothing had happened."""

from __future__ import annotations

import errno
import json
import logging
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import checkpoints_convert.files as files
import checkpoints_convert.streaming as module
from checkpoints_convert import convert
from checkpoints_convert.work_directory import work_path
from jaxsteer import UserError, load
from jaxsteer.models import sharding
from tests.helpers.checkpoints import hf_directory, random_params, tiny_config
from tests.helpers.killed import ROOT

CONFIG = tiny_config()
GROUPS = 6  # of CONFIG: three leaves and three layers
LEAVES = 30
BLOCK_BYTES = 1000


def contents(out: Path) -> tuple[dict[str, Any], dict[str, str], dict[str, bytes]]:
    """Everything that two equal checkpoints have in common: the record, the index, and every other file."""
    record = json.loads((out / "jaxsteer.json").read_text())
    assert record.pop("created")
    index = json.loads((out / "weights" / "index.json").read_text())
    files = {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    return record, index, {name: data for name, data in files.items() if name != "jaxsteer.json"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_directory(tmp_path_factory.mktemp("resume") / "hf", CONFIG)


@pytest.fixture(scope="module")
def whole(source: Path) -> Any:
    """What an uninterrupted conversion makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "_BLOCK_BYTES", BLOCK_BYTES)
        found = contents(convert(source, source.parent / "whole", progress=False))
    assert len(found[1]) == LEAVES and len(found[2]) > 100
    return found


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "_BLOCK_BYTES", BLOCK_BYTES)


class Killer:
    """Conversions in a process that forks (tests/helpers/killed.py)."""

    def __init__(self, source: Path) -> None:
        command = [sys.executable, str(ROOT / "tests" / "helpers" / "killed.py"), str(source), str(BLOCK_BYTES)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, **order: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({key: str(v) if key == "out" else v for key, v in order.items()}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def killer(source: Path) -> Iterator[Killer]:
    made = Killer(source)
    yield made
    assert made.process.stdin is not None and made.process.stdout is not None
    made.process.stdin.close()
    made.process.wait()
    made.process.stdout.close()


def test_killed_at_every_kind_of_moment(whole: Any, killer: Killer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for point, fewest, most in (
        ("work_directory.write_text:1:before", 0, 0),  # no manifest yet
        ("work_directory.write_text:1:after", 0, 0),
        ("streaming.write_leaf:1:before", 0, 0),
        ("streaming.write_leaf:1:after", 0, 0),  # written, but not noted
        ("os.replace:1:before", 0, 0),  # between a note and its name
        ("work_directory.sync:2:after", 1, 1),
        ("os.replace:3:before", 3, 3),
        ("streaming.write_leaf:4:before", 3, 3),  # in the first layer
        ("streaming.write_leaf:14:after", 3, 4),  # in the second, when the first may have been noted
        ("streaming.write_text:1:before", GROUPS, GROUPS),  # all groups, no index
        ("streaming.write_text:1:after", GROUPS, GROUPS),
        ("streaming.write_text:2:before", GROUPS, GROUPS),  # no record
        ("work_directory.sync:1:after", GROUPS, GROUPS),
        ("work_directory.sync:2:after", GROUPS, GROUPS),
    ):
        status = killer(out=out, point=point)["status"]
        assert status == -9, point
        assert not out.exists(), point
        notes = list((work_path(out) / "done").glob("*.json"))
        assert fewest <= len(notes) <= most, point
    answer = killer(out=out)
    assert answer["status"] == 0 and answer["saves"] == 0
    assert contents(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_between_the_rename_and_the_end(whole: Any, killer: Killer, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert killer(out=out, point="work_directory.discard:1:before")["status"] == -9
    assert contents(out) == whole
    with pytest.raises(UserError, match="exists already"):
        convert(source, out, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # The same, and then the result is removed: what is left of the work is not taken for finished groups.
    assert killer(out=tmp_path / "other", point="work_directory.discard:1:before")["status"] == -9
    shutil.rmtree(tmp_path / "other")
    assert killer(out=tmp_path / "other")["saves"] == LEAVES
    assert contents(tmp_path / "other") == whole


def test_killed_twenty_times_at_random_moments(whole: Any, killer: Killer, tmp_path: Path) -> None:
    rng, kills = random.Random(0), 0
    usual = killer(out=tmp_path / "usual")["seconds"]
    out = tmp_path / "out"
    while kills < 20:
        kills += killer(out=out, seconds=rng.uniform(0.1, 0.6) * usual)["status"] == -9
        if out.exists():  # it came to its end before it was killed
            assert contents(out) == whole
            shutil.rmtree(out)
    assert killer(out=out)["status"] == 0
    assert contents(out) == whole
    assert not list(tmp_path.glob(".*"))


def stop_at(patch: pytest.MonkeyPatch, group: int, error: BaseException) -> list[str]:
    """Let ``error`` come when the group of that number is to be written; returns the leaves that are written."""
    write_leaf, written = module.write_leaf, []

    def limited(job: module.Job, leaf: tuple[str, ...], *args: Any) -> module.Values:
        if group >= 0 and leaf in job.groups[list(job.groups)[group]]:
            raise error
        values = write_leaf(job, leaf, *args)
        written.append("/".join(leaf))
        return values

    patch.setattr(module, "write_leaf", limited)
    return written


def test_ctrl_c_keeps_the_work(
    source: Path, whole: Any, tmp_path: Path, small_blocks: None, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 4, KeyboardInterrupt())
        convert(source, out, progress=False)
    assert "4 of 6 groups of leaves are finished" in caplog.text and str(work_path(out)) in caplog.text
    assert not out.exists()
    with pytest.MonkeyPatch.context() as patch:
        written = stop_at(patch, -1, AssertionError())
        convert(source, out, progress=False)
    assert {leaf.split("/")[1] for leaf in written} == {"001", "002"} and len(written) == 18
    assert contents(out) == whole and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("RESOURCE: No space left on device [x]")]
)
def test_a_disk_that_fills_up(
    source: Path, whole: Any, tmp_path: Path, small_blocks: None, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, 3, error)
            with pytest.raises(UserError, match="No space left on device.*3 of 6 groups.*run the same conversion"):
                convert(source, out, progress=False)
        assert not out.exists()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(UserError, match="still to be written and 10 are free.*3 of 6 groups"):
        convert(source, out, progress=False)
    monkeypatch.undo()
    monkeypatch.setattr(sharding, "_BLOCK_BYTES", BLOCK_BYTES)
    assert contents(convert(source, out, progress=False)) == whole
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 0, error)
        with pytest.raises(UserError, match="No space left on device.*Nothing was left"):
            convert(source, tmp_path / "other", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_source_that_cannot_be_read_just_now(source: Path, whole: Any, tmp_path: Path, small_blocks: None) -> None:
    def failing(tensor: files.Tensor, *args: Any) -> Iterator[np.ndarray]:
        for block in original(tensor, *args):
            yield block
            if "layers.2" in tensor.name:
                raise UserError(f"{tensor.name} could not be read") from OSError(errno.EIO, "Input/output error")

    original = files.Tensor.blocks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.Tensor, "blocks", failing)
        with pytest.raises(UserError, match="layers.2.* could not be read.*groups of leaves are finished and kept"):
            convert(source, tmp_path / "out", progress=False)
    assert contents(convert(source, tmp_path / "out", progress=False)) == whole


def test_reading_says_what_and_where(source: Path, tmp_path: Path) -> None:
    tensors = files.read_headers(shutil.copytree(source, tmp_path / "hf"))
    one = tensors["model.layers.1.mlp.up_proj.weight"]
    one.file.write_bytes(one.file.read_bytes()[: one.offset + 10])
    with pytest.raises(UserError, match="model.safetensors ended while tensor 'model.layers.1.mlp.up_proj.weight'"):
        one.read()
    one.file.unlink()
    with pytest.raises(UserError, match="model.safetensors could not be read at tensor .*No such file") as caught:
        one.read()
    assert isinstance(caught.value.__cause__, OSError)


def test_bugs_leave_nothing(source: Path, tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 3, RuntimeError("a bug"))
    with pytest.raises(RuntimeError):
        convert(source, tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


def test_other_work_is_not_mixed_in(
    source: Path, whole: Any, tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = shutil.copytree(source, tmp_path / "changed")
    hf_directory(changed, CONFIG, seed=5)
    out = tmp_path / "out"
    for other, options in ((source, {"dtype": "bfloat16"}), (changed, {}), (source, {})):
        with pytest.MonkeyPatch.context() as patch:
            written = stop_at(patch, 4, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                convert(other, out, progress=False, **options)
            assert "embed" in written
    monkeypatch.setattr(module, "CONVERTER_VERSION", module.CONVERTER_VERSION + 1)
    with pytest.MonkeyPatch.context() as patch:
        written = stop_at(patch, -1, AssertionError())
        convert(source, out, progress=False)
    assert len(written) == LEAVES
    found = contents(out)
    found[0]["converter_version"] -= 1
    assert found == whole


def test_a_source_that_changes_meanwhile(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = shutil.copytree(source, tmp_path / "hf")
    write_leaf = module.write_leaf

    def touching(*args: Any) -> module.Values:
        (directory / "model.safetensors").touch()
        return write_leaf(*args)

    monkeypatch.setattr(module, "write_leaf", touching)
    with pytest.raises(UserError, match="changed while they were being converted"):
        convert(directory, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_two_at_once(source: Path, whole: Any, tmp_path: Path, small_blocks: None, caplog: Any) -> None:
    """The second waits and uses the result, unless it wants something else."""
    other = hf_directory(tmp_path / "other", CONFIG, seed=5)
    out, begun, go_on = tmp_path / "out", threading.Event(), threading.Event()
    write_leaf, results = module.write_leaf, {}

    def slow(*args: Any) -> module.Values:
        begun.set()
        assert go_on.wait(30)
        return write_leaf(*args)

    def attempt(name: str, directory: Path) -> None:
        try:
            results[name] = convert(directory, out, progress=False)
        except UserError as error:
            results[name] = error

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(module, "write_leaf", slow)
        threads = [
            threading.Thread(target=attempt, args=order)
            for order in (("first", source), ("same", source), ("different", other))
        ]
        threads[0].start()
        assert begun.wait(30)
        for thread in threads[1:]:
            thread.start()
        while caplog.text.count("waiting for it") < 2:
            assert all(thread.is_alive() for thread in threads)
        go_on.set()
        for thread in threads:
            thread.join()
    assert results["first"] == results["same"] == out
    assert "exists already" in str(results["different"])
    assert contents(out) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_locks_that_lead_elsewhere_end_at_once(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="/proc/self/out cannot be written"):
        convert(source, "/proc/self/out", progress=False)
    elsewhere = tmp_path / "elsewhere"
    work = work_path(tmp_path / "out")
    for make in (
        lambda: work.symlink_to(elsewhere),
        lambda: work.symlink_to(work),
        lambda: (work.mkdir(), (work / "lock").symlink_to(elsewhere / "lock")),
        lambda: (work.mkdir(), (work / "lock").symlink_to(tmp_path / "victim")),
        lambda: (work.mkdir(), (work / "lock").mkdir()),
        lambda: work.write_text(""),
    ):
        make()
        with pytest.raises(UserError, match="out.* cannot be written"):
            convert(source, tmp_path / "out", progress=False)
        shutil.rmtree(work) if work.is_dir() and not work.is_symlink() else work.unlink()
    assert not list(tmp_path.iterdir()), "nothing is made where a link leads"


def test_nothing_unfinished_can_be_loaded(source: Path, tmp_path: Path, small_blocks: None) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, GROUPS - 1, KeyboardInterrupt())
        convert(source, out, progress=False)
    for place in (out, work_path(out), work_path(out) / "checkpoint"):
        with pytest.raises(UserError):
            load(place)
    model = load(convert(source, out, progress=False))
    np.testing.assert_array_equal(model.params.layers.up, random_params(CONFIG).layers.up)
