"""One process at a time works in a directory; whoever finds it taken is told by whom.

The lock is a file with the owner's host, process and time, whose time of change the owner renews while it lives. Where
the file system has locks (``flock``), one goes with the process that holds it, however that ends. It may hold on one
host only, and some file systems have none: there an owner that gave no sign for ``STALE_S`` counts as dead, which needs
clocks that agree.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxsteer.errors import UserError
from jaxsteer.files.json_files import decoded, parse_json
from jaxsteer.files.whole import make_directory, writing
from jaxsteer.processes import from_first, is_first

STALE_S = 60
"""An owner that gave no sign for so long is taken for dead."""
LOCK = ".lock"
RECORDS = ("config.json", "training.json")
"""What a command writes in its directory before it works: what it was asked for."""
_BEAT_S = 10
_LOOK_S = 0.1
_TRIES = 1000
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def hold_lock(path: Path, waiting: Callable[[], object] | None = None) -> Iterator[bool]:
    """Hold the lock file ``path``; its directory is made if it is missing. True if another one had to be waited for.

    ``waiting`` is called before a wait; without it a lock that is taken is a ``UserError`` that says by whom. The
    holder may remove the directory; whoever waits for it then makes it anew. The file is removed at the end. Raises
    ``OSError`` where there can be no such directory or lock.
    """
    waited = False
    for _ in range(_TRIES):
        path.parent.mkdir(exist_ok=True)
        try:  # a link is not followed: nobody makes one here, and where it leads nothing may be written
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:
            continue  # its holder has just finished and removed the directory
        try:
            while not _taken(handle):
                if waiting is None:
                    raise UserError(f"{path.parent} is in use by {_described(handle)}. Wait for it, or give another.")
                if not waited:
                    waiting()
                waited = True
                time.sleep(_LOOK_S)
            if _is_still(handle, path):
                with _owned(handle, path):
                    yield waited
                return
        finally:
            os.close(handle)
    raise OSError(errno.EBUSY, f"{path.parent} is removed by another process whenever it is made")


@contextlib.contextmanager
def in_use(out: Path, go_on: str = "the same command goes on") -> Iterator[None]:
    """Make the directory ``out`` of a command and keep other commands from working there; of several processes the
    first holds its ``LOCK``.

    A directory that was made and holds no more than ``RECORDS`` goes again when the block fails. Ctrl-C and SIGTERM get
    a note that says what is kept and, by ``go_on``, how to go on. Raises ``UserError`` where another command works, and
    for what is no directory in which one may write.
    """
    made = not out.exists()
    try:
        with contextlib.ExitStack() as held:
            from_first(lambda: _use(out, held))
            try:
                yield
            except BaseException as error:
                files = {path.name for path in out.rglob("*") if not path.is_dir()}
                saved = not files <= {LOCK, *RECORDS}
                if made and not saved and is_first():
                    shutil.rmtree(out, ignore_errors=True)
                if isinstance(error, KeyboardInterrupt | SystemExit):
                    kept = f"what was saved is kept in {out}: {go_on}"
                    error.add_note(kept if saved else "nothing was saved yet: the same command begins again")
                raise
    except BaseException:
        if made and is_first():
            with contextlib.suppress(OSError):  # something was written
                out.rmdir()
        raise


def _use(out: Path, held: contextlib.ExitStack) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a directory")
    with writing(make_directory(out)):
        held.enter_context(hold_lock(out / LOCK))


def _taken(handle: int) -> bool:
    """Take the lock if it is free."""
    owner, age = _owner(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elsewhere = owner.get("host") not in (None, socket.gethostname())
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        elsewhere = bool(owner)  # nobody holds a lock here: the signs of life decide
    if elsewhere and age < STALE_S:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        return False
    return True


@contextlib.contextmanager
def _owned(handle: int, path: Path) -> Iterator[None]:
    """Write the owner, and renew the file's time until the end."""
    owner = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(owner).encode(), 0)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(handle)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()  # before the handle is closed and its number used again
        if _is_still(handle, path):
            path.unlink(missing_ok=True)


def _is_still(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _owner(handle: int) -> tuple[dict[str, Any], float]:
    """What the file says of its owner, and the seconds since the last sign of it."""
    age = time.time() - os.fstat(handle).st_mtime
    try:
        owner = parse_json(decoded(os.pread(handle, 4096, 0), "lock"), "lock")
    except UserError:
        owner = None  # not yet written
    return owner if isinstance(owner, dict) else {}, age


def _described(handle: int) -> str:
    owner, age = _owner(handle)
    if not owner:
        return "another process"
    who = "process {process} on {host} since {since}".format_map({"process": "?", "host": "?", "since": "?"} | owner)
    return f"{who} (last sign {max(age, 0):.0f} s ago)"
