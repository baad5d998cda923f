"""The directory of one run: opened before any work, begun when nothing speaks against it, finished with its metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxsteer import __version__
from jaxsteer.errors import UserError
from jaxsteer.files import make_directory, read_json
from jaxsteer.files.lock import LOCK, in_use
from jaxsteer.files.records import Record
from jaxsteer.processes import from_first, is_first
from jaxsteer.runs import files

GO_ON = "the same command with --resume goes on"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run's directory, open for writing. Of several processes the first one writes."""

    path: Path
    config: dict[str, Any]
    """What config.json holds."""
    finished: dict[str, Any] | None
    """What metrics.json holds, if the same run is done already."""

    def begin(self, *, resume: bool = False) -> None:
        """Write config.json: from here on the directory is this run's. Without ``resume`` nothing is taken up of a
        probe that was cut off."""
        files.write_json(self.path / files.CONFIG, self.config)
        if is_first() and not resume:
            shutil.rmtree(self.path / files.PROBED, ignore_errors=True)

    def withdraw(self) -> None:
        """Take back all that this run wrote, because it was refused before there was anything to keep: the directory
        does not stand in the way of the corrected command. Replies of a persona in words stay."""
        for path in self.path.iterdir() if is_first() else ():
            if path.name in (LOCK, files.PERSONA):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def finish(self, result: Record) -> None:
        """Write metrics.json, and remove what the search would have needed to go on unless it was interrupted."""
        files.write_json(self.path / files.METRICS, result.to_json())
        again = getattr(result, "interrupted", False)
        for name in () if again or not is_first() else (files.STATE, files.PROBED):
            shutil.rmtree(self.path / name, ignore_errors=True)


@contextlib.contextmanager
def opened(
    out: files.RunDir, config: dict[str, Any], say: Callable[[str], None], *, resume: bool | None = None
) -> Iterator[RunFolder]:
    """The directory of the run with this ``config`` (and format and version beside it). Whoever finds it ``finished``
    has nothing to do.

    A run of the same config that was cut off is done again; with ``resume``, also one that Ctrl-C ended and that is
    reported as far as it went. ``resume`` is None for commands that have no such option, and go on always. A directory
    that was made for a run that is refused goes again. Raises ``UserError`` as ``open_run`` and ``in_use`` do.
    """
    path = Path(out)
    config = {"format": files.FORMAT, "version": __version__, **config}
    with in_use(path, "the same command goes on" if resume is None else GO_ON):
        finished = from_first(lambda: open_run(path, config))
        if resume and finished is not None and finished.get("interrupted"):
            finished = None
        if finished is not None:
            say(f"{path} already holds this run: nothing to do")
        yield RunFolder(path=path, config=config, finished=finished)


def open_run(out: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """Look at the output directory before any work: ``None`` to go on, or the metrics of the finished same run.

    A run of the same config that was cut off is done again. Raises ``UserError`` for a directory that holds another
    run's files or other things.
    """
    make_directory(out)
    names = sorted(p.name for p in out.iterdir() if not p.name.startswith("."))
    if not set(names) - {files.PERSONA}:  # replies that a run wrote which was cut off before it began
        return None
    known = _read(out / files.CONFIG)
    if known is None or known.get("format") != files.FORMAT:
        raise UserError(
            f"--out {out} is not empty ({', '.join(names[:5])}) and holds no run of jaxsteer: give a new directory"
        )
    wanted = files.plain(config)
    differing = [k for k in wanted.keys() | known.keys() if wanted.get(k) != known.get(k)]
    differing.sort(key=lambda k: (k not in known, k not in wanted, k))
    if differing:
        changes = "; ".join(f"{k}: {known.get(k)!r} there, {wanted.get(k)!r} now" for k in differing[:4])
        raise UserError(
            f"--out {out} holds another run's files ({changes}): give another directory, or delete that one"
        )
    return _read(out / files.METRICS)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except UserError:
        return None
