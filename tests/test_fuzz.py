"""No file that is almost right crashes a reader: it is read, or refused with one error, in bounded memory and time.

``make test`` feeds some dozens of changed files to every reader (always the same); ``make fuzz`` goes on for
``JAXSTEER_FUZZ_S`` seconds with new ones and prints how many there were.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from jaxsteer.errors import UserError
from tests.fuzz_readers import READERS, Reader
from tests.helpers.mutations import mutate_folder

SECONDS = float(os.environ.get("JAXSTEER_FUZZ_S", "0"))
MOST_BYTES = 2 << 30
"""What a reader may take of memory for one of these files, which are small."""
MOST_S = 20.0
COUNTS: Counter[str] = Counter()


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A right example for every reader, made when it is asked for."""
    root = tmp_path_factory.mktemp("right")

    class Made(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            (root / name).mkdir()
            READERS[name].make(root / name)
            self[name] = root / name
            return self[name]

    return Made()


def feed(reader: Reader, right: Path, data: st.DataObject, name: str) -> None:
    """Change a copy of the example and read it."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        mutate_folder(data, right, folder, often=reader.often)
        limits, began = resource.getrlimit(resource.RLIMIT_AS), time.monotonic()
        with open("/proc/self/statm", encoding="ascii") as pages:
            size = int(pages.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MOST_BYTES, limits[1]))
        try:
            reader.read(folder)
            COUNTS[f"{name}: read"] += 1
        except UserError as error:
            COUNTS[f"{name}: refused"] += 1
            assert str(error).strip(), "an error without a message"
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
        assert time.monotonic() - began < MOST_S, "this took too long"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_the_examples_are_right(examples: dict[str, Path], tmp_path: Path) -> None:
    """Or the fuzz test would see nothing but refusals."""
    for name, reader in READERS.items():
        reader.read(shutil.copytree(examples[name], tmp_path / name))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", READERS)
def test_changed_files_are_read_or_refused(examples: dict[str, Path], name: str) -> None:
    reader, right = READERS[name], examples[name]
    quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
    quiet |= {"phases": [Phase.generate]}  # what fails is not made smaller, which takes minutes
    if not SECONDS:
        run = settings(max_examples=reader.examples, derandomize=True, **quiet)
        run(given(st.data())(lambda data: feed(reader, right, data, name)))()
        return
    end, rounds = time.monotonic() + SECONDS / len(READERS), int(time.time())
    while time.monotonic() < end:
        rounds += 1
        run = settings(max_examples=25, **quiet)
        seed(rounds)(run(given(st.data())(lambda data: feed(reader, right, data, name))))()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    counts = {what: COUNTS[f"{name}: {what}"] for what in ("read", "refused")}
    print(f"\n{name}: {sum(counts.values()):,} files, {counts}, 0 crashes; peak memory of the process {peak:,} MiB")
