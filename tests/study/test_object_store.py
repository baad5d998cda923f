"""Runs at a URL of a store: here of the disk, written by the same code as a bucket."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxsteer.cli import main
from jaxsteer.errors import UserError
from jaxsteer.files.stores import Bucket
from jaxsteer.models.model import Model
from jaxsteer.prompt_search.resume import Notes, Sizes, Store
from jaxsteer.runs import files
from jaxsteer.runs.folder import open_run
from jaxsteer.study import SearchOptions, run, stages
from jaxsteer.study import many_runs as several
from jaxsteer.study import object_store as module
from jaxsteer.study.object_store import ARCHIVE, working_directory
from tests.helpers.tiny import tiny_model

Make = Callable[..., SearchOptions]
CONFIG = {"format": files.FORMAT, "seed": 0}
NAMES = ["config.json", "metrics.json", "pareto.jsonl", "pool/metrics.json"]


class Cut(Exception):
    """The machine is gone."""


class Place:
    """A store on the disk, and machines that have nothing of it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at, self.url = folder / "bucket" / "run", f"file://{folder}/bucket/run"
        self._machines, self._folder, self._monkeypatch = 0, folder, monkeypatch
        self.fresh_machine()

    def fresh_machine(self) -> None:
        self._machines += 1
        self._monkeypatch.setenv("JAXSTEER_CACHE", str(self._folder / f"cache{self._machines}"))

    def names(self) -> list[str]:
        return sorted(p.relative_to(self.at).as_posix() for p in self.at.rglob("*") if p.is_file())

    def wait_for(self, step: int) -> bytes:
        """The archive, when the checkpoint after a step is in it."""
        archive, deadline = self.at / ARCHIVE, time.monotonic() + 30
        while time.monotonic() < deadline:
            if archive.exists() and any(f"/state/{step}/" in name for name in zipfile.ZipFile(archive).namelist()):
                return archive.read_bytes()
            time.sleep(0.01)
        raise TimeoutError

    def cut(self, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
        """The store fails when the object ``at`` is written."""
        write = Bucket.write

        def failing(bucket: Bucket, name: str, data: bytes | None, **options: Any) -> None:
            if name == at:
                raise UserError(f"{bucket.url} cannot be written (it is gone).")
            write(bucket, name, data, **options)

        monkeypatch.setattr(Bucket, "write", failing)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


def work(folder: Path, *, steps: int = 3, end: int = 3) -> int:
    """A run as files: a checkpoint per step with what was done before, then the results. Returns the steps it did."""
    if open_run(folder, CONFIG) is not None:
        return 0
    files.write_json(folder / files.CONFIG, CONFIG)
    with Store(folder / files.STATE, resume=True) as store:
        like = np.zeros(4, np.float32)
        if store.open({"run": 1}) is None:
            store.begin(Sizes(batch=1, wave=1))
        found = store.restore(0, like)
        state, first = (like, 0) if found is None else (found[0], found[1].step)
        for step in range(first, steps):
            if step == end:
                raise Cut
            state = state + step
            notes = Notes(wave=0, step=step + 1, where=f"step {step + 1}", rejected=[], seconds=0.0)
            store.save(step + 1, state, notes, wait=True)
    (folder / "pool").mkdir(exist_ok=True)
    files.write_lines(folder / files.PARETO, [{"sum": state}])
    files.write_json(folder / "pool" / files.METRICS, {})
    files.write_json(folder / files.METRICS, {"sum": state})
    shutil.rmtree(folder / files.STATE)
    return steps - first


def test_a_directory_is_itself(tmp_path: Path) -> None:
    with working_directory(tmp_path / "run") as folder:
        assert folder == tmp_path / "run"
    with working_directory("runs/x") as folder:
        assert folder == Path("runs/x")


def test_the_files_of_a_run_are_at_the_url(place: Place, tmp_path: Path) -> None:
    said: list[str] = []
    with working_directory(place.url + "/", said.append) as folder:
        assert work(folder) == 3
    assert place.names() == NAMES and not folder.exists() and place.url in said[0]
    work(tmp_path / "local")
    for name in NAMES:
        assert (place.at / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    place.fresh_machine()
    stamps = {name: (place.at / name).stat().st_mtime_ns for name in NAMES}
    with working_directory(place.url) as folder:
        assert work(folder) == 0, "nothing is done again"
        (folder / files.REPORT).write_text("page")
    assert place.names() == sorted([*NAMES, files.REPORT]), "what was added is copied"
    assert stamps == {name: (place.at / name).stat().st_mtime_ns for name in NAMES}, "and nothing else"


def test_a_run_that_was_cut_off_goes_on_elsewhere(place: Place) -> None:
    with pytest.raises(Cut), working_directory(place.url) as folder:
        work(folder, end=2)
    assert place.names() == [ARCHIVE]
    place.fresh_machine()
    with working_directory(place.url) as folder:
        assert work(folder) == 1, "from the checkpoint after the second step"
    assert place.names() == NAMES and json.loads((place.at / "metrics.json").read_text()) == {"sum": [3.0] * 4}


def test_checkpoints_are_copied_while_the_run_goes_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    with pytest.raises(Cut), working_directory(place.url) as folder:
        with pytest.raises(Cut):
            work(folder, end=2)
        there = place.wait_for(2)
        # As a machine that dies at once: what is half written is not in the copy.
        half = folder / files.STATE / "state" / "3.orbax-checkpoint-tmp-7"
        half.mkdir()
        (half / "array").write_text("half")
        raise Cut
    assert (place.at / ARCHIVE).read_bytes() == there
    place.fresh_machine()
    with working_directory(place.url) as folder:
        assert work(folder) == 1 and not list(folder.rglob("*tmp*"))


@pytest.mark.parametrize("at", ["config.json", "pareto.jsonl", "metrics.json"])
@pytest.mark.parametrize("same_machine", [True, False])
def test_a_store_that_fails_at_the_end_loses_nothing(
    at: str, same_machine: bool, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Cut), working_directory(place.url) as folder:
        work(folder, end=1)
    with monkeypatch.context() as patch:
        place.cut(patch, at)
        with pytest.raises(UserError, match=r"it is gone\). The run is done and lies in .*: the same command copies"):
            with working_directory(place.url) as folder:
                assert work(folder) == 2
    assert ARCHIVE in place.names() and "metrics.json" not in place.names()
    if not same_machine:
        place.fresh_machine()
    with working_directory(place.url) as folder:
        assert work(folder) == (0 if same_machine else 2)
    assert place.names() == NAMES


def test_a_store_that_fails_on_the_way_is_a_warning(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    with caplog.at_level(logging.WARNING), pytest.raises(Cut), working_directory(place.url) as folder:
        with pytest.raises(Cut):
            work(folder, end=1)
        before = place.wait_for(1)
        place.cut(monkeypatch, ARCHIVE)
        work(folder, end=2)
    assert "it is gone). The last state of the run is in" in caplog.text
    assert (place.at / ARCHIVE).read_bytes() == before
    monkeypatch.undo()
    monkeypatch.setenv("JAXSTEER_CACHE", str(folder.parent.parent))
    with working_directory(place.url) as folder:
        assert work(folder) == 1, "this machine has more than the store, and goes on from that"


def test_another_machines_progress_is_taken_over(place: Place) -> None:
    first = os.environ["JAXSTEER_CACHE"]
    with pytest.raises(Cut), working_directory(place.url) as folder:
        work(folder, end=1)
    place.fresh_machine()
    with pytest.raises(Cut), working_directory(place.url) as folder:
        work(folder, end=2)
    os.environ["JAXSTEER_CACHE"] = first  # of the fixture's
    with working_directory(place.url) as folder:
        assert work(folder) == 1


def test_what_cannot_be_is_refused_before_the_run(place: Place, tmp_path: Path) -> None:
    place.at.mkdir(parents=True)
    (place.at / "photo.jpg").write_text("x")
    with (
        pytest.raises(UserError, match=r"is not empty \(photo.jpg\) and holds no run of jaxsteer"),
        working_directory(place.url),
    ):
        pytest.fail("it began")
    for name in ("config.json", "metrics.json"):  # of a model, say
        (place.at / name).write_text("{}")
    with pytest.raises(UserError, match="holds no run of jaxsteer"), working_directory(place.url):
        pytest.fail("it began")
    assert place.names() == ["config.json", "metrics.json", "photo.jpg"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be read"), working_directory(f"file://{tmp_path}/file/run"):
        pytest.fail("it began")
    with pytest.raises(UserError, match="file:///proc/run cannot be written"), working_directory("file:///proc/run"):
        pytest.fail("it began")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / ARCHIVE).write_text("no archive")
    with pytest.raises(UserError, match=f"{ARCHIVE} is damaged"), working_directory(f"file://{tmp_path}/damaged"):
        pytest.fail("it began")


def test_another_run_is_not_touched(place: Place) -> None:
    with pytest.raises(Cut), working_directory(place.url) as folder:
        work(folder, end=1)
    before = (place.at / ARCHIVE).read_bytes()
    with pytest.raises(UserError, match="another run's files .* is the working copy of file://"):
        with working_directory(place.url) as folder:
            open_run(folder, {**CONFIG, "seed": 1})
    assert (place.at / ARCHIVE).read_bytes() == before and place.names() == [ARCHIVE]


@pytest.mark.slow
def test_a_search_that_was_cut_off_ends_as_one_that_was_not(
    options: Make, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(**vars(tiny_model()))
    local = options(steps=24, save_every=0.0)
    run(local, model=model)
    appended = files.append_line

    def cut(path: Path, row: Any) -> None:
        if row["step"] == 20:
            raise Cut
        appended(path, row)

    monkeypatch.setattr(files, "append_line", cut)
    with pytest.raises(Cut), working_directory(place.url) as folder:
        run(options(steps=24, save_every=0.0, out=folder), model=model)
    monkeypatch.setattr(files, "append_line", appended)
    place.fresh_machine()
    with working_directory(place.url) as folder:
        run(options(steps=24, resume=True, out=folder), model=model)
    for name in ("pareto.jsonl", "choices.json", "config.json"):
        assert (place.at / name).read_bytes() == (local.run.out / name).read_bytes()
    assert place.names() == sorted(p.name for p in local.run.out.iterdir())
    assert [row["step"] for row in files.read_lines(place.at / "progress.jsonl")] == [10, 20, 24]


@pytest.mark.slow
@pytest.mark.parametrize("many", [(), ("--vary", "seed=0:2")])
def test_the_command_writes_to_a_url(
    many: tuple[str, ...],
    place: Place,
    persona_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for room in (stages, several):
        monkeypatch.setattr(room, "load_model", lambda *_, **__: Model(**vars(tiny_model())))
    small = "--steps 3 --prompt-length 3 --population 2 --children 4 --contexts 2 --report-prompts 2 --quiet".split()
    command = ["search", "--persona", str(persona_file), *small, *many, "--out"]
    local = persona_file.parent / "local"
    assert main([*command, place.url]) == 0
    assert f"Report: {place.url}/report.html" in capsys.readouterr().out
    assert main([*command, str(local)]) == 0
    names = sorted(p.relative_to(local).as_posix() for p in local.rglob("*") if p.is_file())
    assert place.names() == names
    before = {name: (place.at / name).read_bytes() for name in names}
    place.fresh_machine()
    assert main([*command, place.url]) == 0
    assert "already holds this run" in capsys.readouterr().out
    assert before == {name: (place.at / name).read_bytes() for name in names}
