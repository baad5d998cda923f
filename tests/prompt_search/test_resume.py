"""A search that was ended anyhow goes on to exactly what it would have found; a lost disk is one clear error."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.processes import PREEMPTED
from jaxsteer.prompt_search import ALGORITHMS, EpoConfig, Store, make_problem, make_search
from jaxsteer.prompt_search.algorithms import epo
from jaxsteer.prompt_search.driver import Progress
from tests.prompt_search.setting import search_with, setting

SMALL = EpoConfig(population=2, children=4, top_k=16, restart_every=4, archive=8)
STEPS, LOOK, PROBLEMS = 7, 2, 3
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def s() -> SimpleNamespace:
    return setting()


def search(s, store: Store | None = None, *, seed: int = 0, **kwargs: Any):  # noqa: ANN001, ANN201
    problems = [make_problem(s.objective, 2, seed=seed, restart=i) for i in range(PROBLEMS)]
    options = {"steps": STEPS, "steps_per_call": LOOK, "wave": 2, "valid": lambda ids: ids[:, -1] % 4 > 0, **kwargs}
    with store or Store(Path("/nowhere")) as open_store:
        return search_with(s.model.params, s.task, problems, epo(SMALL), store=store and open_store, **options)


def same(first: Any, second: Any) -> None:
    for a, b in zip(vars(first.archive).values(), vars(second.archive).values(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert first.prompts == second.prompts and first.rejected == second.rejected


class Lost(BaseException):
    """The end of a process, as far as one can have it without ending."""


@pytest.fixture(scope="module")
def whole(s) -> Any:  # noqa: ANN001
    return search(s)


@pytest.mark.parametrize("ends", [range(2, 15, 2), (1, 5)])
def test_a_search_that_is_cut_off_again_and_again_ends_alike(s, whole, tmp_path: Path, ends) -> None:  # noqa: ANN001
    looks = 0

    def end(progress: Progress) -> None:
        nonlocal looks
        looks += 1
        if looks in ends:
            raise Lost

    for _ in ends:
        with pytest.raises(Lost):
            search(s, Store(tmp_path, every_s=0.0, resume=True), callback=end)
    steps: list[tuple[int, int]] = []
    result = search(
        s,
        Store(tmp_path, every_s=0.0, resume=True),
        callback=lambda p: (end(p), steps.append((p.first, p.step))),
    )
    same(result, whole)
    assert len(steps) < 8, "it went on and did not begin again"
    assert result.candidates == whole.candidates
    same(search(s, Store(tmp_path, resume=True), callback=end), whole)


def test_without_resume_it_begins_again(s, whole, tmp_path: Path) -> None:  # noqa: ANN001
    search(s, Store(tmp_path, every_s=0.0))
    seen: list[int] = []
    same(search(s, Store(tmp_path), callback=lambda p: seen.append(p.step)), whole)
    assert seen == [2, 4, 6, 7, 2, 4, 6, 7]


def test_another_search_is_not_taken_for_it(s, tmp_path: Path) -> None:  # noqa: ANN001
    search(s, Store(tmp_path, every_s=0.0))
    with pytest.raises(UserError, match="holds the state of another search"):
        search(s, Store(tmp_path, resume=True), seed=1)
    with pytest.raises(UserError, match="holds the state of another search"):
        search(s, Store(tmp_path, resume=True), steps=9)


def test_damaged_state_is_one_error(s, tmp_path: Path) -> None:  # noqa: ANN001
    search(s, Store(tmp_path, every_s=0.0))
    known, wave = tmp_path / "search.json", tmp_path / "wave-00000.npz"
    whole = known.read_bytes(), wave.read_bytes()
    arrays, note = dict(np.load(wave)), next(tmp_path.glob("state/*/_CHECKPOINT_METADATA"))
    for damage in (
        lambda: known.write_bytes(whole[0][:-5]),
        lambda: known.write_text("[]"),
        lambda: known.write_text("{}"),
        lambda: known.write_text(json.dumps(json.loads(whole[0]) | {"began": {"wave": "2"}})),
        lambda: known.write_bytes(b"\xff"),
        lambda: wave.write_bytes(whole[1][:200]),
        lambda: np.savez(wave, **{k: v for k, v in arrays.items() if k != "ids"}),
        lambda: np.savez(wave, **(arrays | {"notes": np.asarray("{")})),
        lambda: np.savez(wave, **(arrays | {"notes": np.asarray('{"rejected": [1], "steps": 1, "seconds": 1}')})),
        lambda: note.write_text(note.read_text().replace("item_handlers", "item_handl{rs")),
    ):
        damage()
        with pytest.raises(UserError, match="(?i)leave out --resume to begin again"):
            search(s, Store(tmp_path, resume=True))
        known.write_bytes(whole[0])
        wave.write_bytes(whole[1])


def test_sigterm_saves_and_ends(s, whole, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:  # noqa: ANN001
    def preempt(progress: Progress) -> None:
        if progress.first == 2 and progress.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        search(s, Store(tmp_path, every_s=1e9), callback=preempt)
    assert end.value.code == PREEMPTED and signal.getsignal(signal.SIGTERM) is before
    assert "saved at step 4 of 7; the same command with --resume goes on" in caplog.text
    steps: list[int] = []
    same(search(s, Store(tmp_path, resume=True), callback=lambda p: steps.append(p.step)), whole)
    assert steps == [6, 7]


def wait_for_checkpoint(folder: Path) -> None:
    """Until a checkpoint is complete: Orbax renames its directory then."""
    end = time.monotonic() + 60
    while not [path for path in folder.iterdir() if path.name.isdigit()]:
        assert time.monotonic() < end, sorted(path.name for path in folder.iterdir())
        time.sleep(0.05)


def test_a_full_disk_is_one_clear_error_and_costs_nothing_saved(s, whole, tmp_path: Path) -> None:  # noqa: ANN001
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(progress: Progress) -> None:
        if progress.step == 4:
            wait_for_checkpoint(tmp_path / "state")
            resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))

    try:
        with pytest.raises(UserError, match=r"cannot be saved in .*--resume") as error:
            search(s, Store(tmp_path, every_s=0.0), callback=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value) and "step 2 of problems 0 to 1" in str(error.value)
    steps: list[int] = []
    same(search(s, Store(tmp_path, resume=True), callback=lambda p: steps.append(p.step)), whole)
    assert steps[0] == 4, "the checkpoint after step 2 was whole"


def test_a_vanished_directory_is_one_clear_error(s, whole, tmp_path: Path) -> None:  # noqa: ANN001
    place, away = tmp_path / "state", tmp_path / "elsewhere"

    def vanish(progress: Progress) -> None:
        if progress.step == 4 and place.exists():
            wait_for_checkpoint(place / "state")
            place.rename(away)

    with pytest.raises(UserError, match=r"cannot be saved in .*the directory has vanished"):
        search(s, Store(place, every_s=0.0), callback=vanish)
    assert not (place / "search.json").exists()
    shutil.rmtree(place, ignore_errors=True)
    away.rename(place)
    same(search(s, Store(place, resume=True)), whole)


def test_a_damaged_checkpoint_is_said_to_be_one(s, tmp_path: Path) -> None:  # noqa: ANN001
    def end(progress: Progress) -> None:
        if progress.step == 6:
            raise Lost

    with pytest.raises(Lost):
        search(s, Store(tmp_path, every_s=0.0), callback=end)
    for file in (tmp_path / "state").rglob("*"):
        if file.is_file() and ("/d/" in str(file) or "manifest" in file.name):
            file.write_bytes(b"x")
    with pytest.raises(UserError, match="cannot be read"):
        search(s, Store(tmp_path, resume=True))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["gcg", "soft"])
def test_states_of_other_algorithms_go_to_disk_and_back(s, tmp_path: Path, algorithm: str) -> None:  # noqa: ANN001
    given = {"gcg": {"search_width": 8, "top_k": 16}, "soft": {}}[algorithm]
    made, seen = make_search(algorithm, given), []
    problem = make_problem(s.objective, ALGORITHMS[algorithm][0](**given).population)

    def go(store: Store | None, callback: Any = None) -> Any:
        options = {"steps": 4, "steps_per_call": 2, "callback": callback}
        return search_with(s.model.params, s.task, [problem], made, store=store, **options)

    def end(progress: Progress) -> None:
        if progress.step == 4:
            raise Lost

    whole = go(None)
    with pytest.raises(Lost), Store(tmp_path, every_s=0.0) as store:
        go(store, end)
    with Store(tmp_path, resume=True) as store:
        same(go(store, lambda p: seen.append(p.step)), whole)
    assert seen == [4]


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tmp_path: Path) -> None:
    """kill -9 from outside, at any moment of starting, searching and saving; then SIGTERM."""
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/helpers/killed_search.py"), str(tmp_path / "compiled")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def order(**order: Any) -> dict[str, Any]:
        assert server.stdin and server.stdout
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    rng = random.Random(0)
    kills = round_ = 0
    with server:
        while kills < 20:
            whole, cut = tmp_path / f"whole{round_}", tmp_path / f"cut{round_}"
            assert order(folder=str(whole), seed=round_)["status"] == 0
            while True:
                answer = order(folder=str(cut), seed=round_, looks=rng.choice([0, 1, 1, 2]), seconds=rng.random() / 2)
                if answer["status"] == 0:
                    break
                assert answer["status"] == -signal.SIGKILL
                kills += 1
            assert (cut / "result.npz").read_bytes() == (whole / "result.npz").read_bytes()
            round_ += 1
        answer = order(folder=str(tmp_path / "term"), seed=99, looks=1, seconds=0.0, signal=int(signal.SIGTERM))
        assert answer["status"] == PREEMPTED and answer["ending"] < 10
        assert order(folder=str(tmp_path / "term"), seed=99)["status"] == 0
        assert server.stdin
        server.stdin.close()
