"""The directory of one run: opened before any work, begun when nothing speaks against it, finished with its metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxsteer import __version__
from jaxsteer.files.records import Record
from jaxsteer.processes import from_first, is_first
from jaxsteer.study import files


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run's directory, open for writing. Of several processes the first one writes."""

    path: Path
    config: dict[str, Any]
    """What config.json holds."""
    finished: dict[str, Any] | None
    """What metrics.json holds, if the same run is done already."""

    def begin(self) -> None:
        """Write config.json: from here on the directory is this run's."""
        files.write_json(self.path / files.CONFIG, self.config)

    def finish(self, result: Record) -> None:
        """Write metrics.json and remove what the search would have needed to go on."""
        files.write_json(self.path / files.METRICS, result.to_json())
        if is_first():
            shutil.rmtree(self.path / files.STATE, ignore_errors=True)


@contextlib.contextmanager
def opened(out: files.RunDir, config: dict[str, Any], say: Callable[[str], None]) -> Iterator[RunFolder]:
    """The directory of the run with this ``config`` (and format and version beside it). Whoever finds it ``finished``
    has nothing to do.

    A run of the same config that was cut off is done again. A directory that was made for a run that is refused goes
    again. Raises ``UserError`` as ``files.open_run`` does.
    """
    path = Path(out)
    config = {"format": files.FORMAT, "version": __version__, **config}
    made = not path.exists()
    finished = from_first(lambda: files.open_run(path, config))
    if finished is not None:
        say(f"{path} already holds this run: nothing to do")
    try:
        yield RunFolder(path=path, config=config, finished=finished)
    except BaseException:
        if made and is_first():
            with contextlib.suppress(OSError):  # something was written
                path.rmdir()
        raise
