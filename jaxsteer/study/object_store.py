"""A run in an object store: done in a working copy on the disk, which is copied to the store as it grows.

While the run is under way the store has it as one object, ``unfinished.zip``: the whole directory as it was after some
checkpoint of the search. An object is replaced whole, so whatever dies, the store has a state to go on from. When the
run is done its files are written one by one, ``metrics.json`` last, and the archive is deleted after that.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from jaxsteer.checkpoints.loading import cache_dir
from jaxsteer.errors import UserError
from jaxsteer.files import append_text, write_bytes
from jaxsteer.files.paths import user_path
from jaxsteer.files.stores import PATIENCE_S, Bucket, is_url
from jaxsteer.processes import PREEMPTED, from_first, is_first
from jaxsteer.runs.files import CONFIG, FORMAT, METRICS

log = logging.getLogger(__name__)

ARCHIVE = "unfinished.zip"
LOOK_S = 2.0
"""Seconds between two looks at the working copy."""
LAST_S = 10.0
"""Seconds to copy what there is when the process is about to end."""
_OURS = ".copied"
"""File of the working copy: a hash per line of what it has written to the store, or was filled from."""
_AT_ONCE = 16
_WRITING = ".orbax-checkpoint-tmp"


@contextmanager
def working_directory(out: str | Path, say: Callable[[str], None] = log.info) -> Iterator[Path]:
    """The directory to do a run in: ``out``, or for the URL of a store a working copy of what is there.

    The working copy, ``$JAXSTEER_CACHE/runs/HASH``, must be shared between hosts. The first process copies it to the
    store in the background whenever files have come or gone, once more when the run ends early, and when it has
    finished, file by file; then the working copy is removed. A store that fails meanwhile is a warning. Raises
    ``UserError`` for a store that cannot be read or written, for a URL where other things are than a run, and when a
    finished run cannot be copied; it stays in the working copy then, and the same command copies it.
    """
    if not is_url(str(out)):
        yield user_path(out)
        return
    copy = _Copy(str(out))
    from_first(copy.fill)
    if not copy.folder.is_dir():
        raise UserError(
            f"the first process works in {copy.folder}, which is not there for this one. Set JAXSTEER_CACHE to a "
            "directory that all processes share"
        )
    say(f"Working in {copy.folder}, which is copied to {copy.url}")
    try:
        with copy.kept_up():
            yield copy.folder
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code == PREEMPTED:  # in all processes: the others wait for the first
            from_first(copy.leave)
        elif is_first():
            copy.leave()
        if isinstance(error, UserError):
            raise UserError(f"{error} ({copy.folder} is the working copy of {copy.url})") from error
        raise
    from_first(copy.finish)


class _Copy:
    """The working copy of what is at a URL."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.folder = cache_dir() / "runs" / hashlib.sha256(self.url.encode()).hexdigest()[:32]
        self._there: dict[str, str] = {}  # hashes of the objects, as far as they are known
        self._saved: list[str] = []  # names of files when the archive was written

    def fill(self) -> None:
        """Make the working copy what is at the URL, unless that was written from it, and see that one may write."""
        self._bucket = bucket = Bucket(self.url)
        self._there = dict.fromkeys(bucket.names(), "")
        known = [name for name in (METRICS, ARCHIVE, CONFIG) if name in self._there]
        if self._there and ARCHIVE not in known and CONFIG not in known:
            self._refuse()
        marker = known[0] if known else None
        try:
            if marker is None:  # what this machine may have was never copied
                self.folder.mkdir(parents=True, exist_ok=True)
            else:
                self._follow(marker)
        except OSError as error:
            raise UserError(
                f"the working copy of {self.url} in {self.folder} cannot be written ({error.strerror}). Set "
                "JAXSTEER_CACHE to a directory with room"
            ) from error
        if marker != METRICS:
            bucket.check_writable()

    def _follow(self, marker: str) -> None:
        data = self._read(marker)
        ours = self.folder / _OURS
        if ours.exists() and _hash(data) in ours.read_text().split():
            return  # the working copy is that state, or goes on from it
        if marker != ARCHIVE and FORMAT.encode() not in self._read(CONFIG):
            self._refuse()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        if marker == ARCHIVE:
            try:
                zipfile.ZipFile(io.BytesIO(data)).extractall(self.folder)
            except zipfile.BadZipFile as error:
                raise UserError(f"{self.url}/{ARCHIVE} is damaged ({error}): delete it to begin again") from error
            self._saved = _names(self.folder)
        elif marker == CONFIG:
            write_bytes(self.folder / CONFIG, data)
        else:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(self._fetch, [name for name in self._there if name != ARCHIVE]))
        self._note(data)

    def _fetch(self, name: str) -> None:
        path = self.folder / name
        if not path.resolve().is_relative_to(self.folder.resolve()):
            self._refuse()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, self._read(name))

    def _read(self, name: str) -> bytes:
        data = self._bucket.read(name)
        if data is None:
            raise UserError(f"{self.url} lacks {name} of the run that it holds: delete the other files to begin again")
        self._there[name] = _hash(data)
        return data

    def _refuse(self) -> None:
        shown = ", ".join(sorted(self._there)[:5])
        raise UserError(f"{self.url} is not empty ({shown}) and holds no run of jaxsteer: give another URL")

    def _note(self, data: bytes) -> None:
        """Remember, before it is written, that an object is this working copy's."""
        append_text(self.folder / _OURS, _hash(data) + "\n")

    @contextmanager
    def kept_up(self) -> Iterator[None]:
        """Save in the background while the body runs."""
        ended = threading.Event()

        def keep_up() -> None:
            pause, last = LOOK_S, ""
            while not ended.wait(pause):
                began = time.monotonic()
                try:
                    self.save()
                    last = ""
                except (UserError, OSError) as error:
                    if str(error) != last:
                        log.warning("%s The run goes on in %s, and copying is tried again.", error, self.folder)
                    last = str(error)
                pause = max(LOOK_S, 10 * (time.monotonic() - began))  # a slow store gets less

        self._saving = threading.Thread(target=keep_up, daemon=True)
        if is_first():
            self._saving.start()
        try:
            yield
        finally:
            ended.set()

    def save(self, patience_s: float = PATIENCE_S) -> None:
        """Write the archive, if files have come or gone since the last one."""
        begun, done = ((self.folder / name).exists() for name in (CONFIG, METRICS))
        if not begun or done or _names(self.folder) == self._saved:
            return
        names, data = _archive(self.folder)
        self._write(ARCHIVE, data, patience_s)
        self._saved = names

    def _write(self, name: str, data: bytes, patience_s: float = PATIENCE_S) -> None:
        if name in (ARCHIVE, CONFIG, METRICS):
            self._note(data)
        self._bucket.write(name, data, patience_s=patience_s)
        self._there[name] = _hash(data)

    def leave(self) -> None:
        """Save in the time that is left."""
        until = time.monotonic() + LAST_S
        self._saving.join(LAST_S)
        try:
            if self._saving.is_alive():
                raise UserError(f"{self.url} has not answered in {LAST_S:.0f} s.")
            self.save(max(1.0, until - time.monotonic()))
        except (UserError, OSError) as error:
            log.warning("%s The last state of the run is in %s only.", error, self.folder)

    def finish(self) -> None:
        """Write the files of the finished run that are not there, and remove the working copy."""
        self._saving.join()
        try:
            self._put(CONFIG)
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(self._put, set(_names(self.folder)) - {CONFIG, METRICS}))
            self._put(METRICS)
            if ARCHIVE in self._there:
                self._bucket.write(ARCHIVE, None)
        except (UserError, OSError) as error:
            raise UserError(f"{error} The run is done and lies in {self.folder}: the same command copies it") from error
        shutil.rmtree(self.folder, ignore_errors=True)

    def _put(self, name: str) -> None:
        data = (self.folder / name).read_bytes()
        if self._there.get(name) != _hash(data):
            self._write(name, data)


def _names(folder: Path) -> list[str]:
    """The files under ``folder`` that are whole, by their names from there."""
    return sorted(
        (Path(path) / name).relative_to(folder).as_posix()
        for path, _, names in os.walk(folder)
        for name in names
        if not name.startswith(".") and _WRITING not in path
    )


def _archive(folder: Path) -> tuple[list[str], bytes]:
    """The names of the files under ``folder``, and an archive of all of them at one time."""
    for _ in range(10):
        names, data = _names(folder), io.BytesIO()
        try:
            with zipfile.ZipFile(data, "w") as archive:
                for name in names:
                    content = (folder / name).read_bytes()
                    archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED, compresslevel=1)
        except FileNotFoundError:
            continue
        if _names(folder) == names:
            return names, data.getvalue()
    raise UserError(f"{folder} changes too fast to be copied.")


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
