"""The command ``jaxsteer``: parses, calls, prints. Global JAX settings live here and nowhere else."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxsteer.errors import UserError

CHECK_FAILED = 1
USAGE_ERROR = 2
CRASHED = 70
INTERRUPTED = 130
TERMINATED = 143
OUTPUT = "the output"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, as ``status_of`` does."""
    return status_of(_command, list(sys.argv[1:] if argv is None else argv))


def status_of(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """The exit status of ``command(arguments)``.

    0: done. 1: a check failed. 2: bad input, or a place that cannot be read or written. 70: a bug. 130: interrupted.
    143: ended by SIGTERM or SIGHUP. What is not 0 or 1 comes with one message on stderr, and with a traceback only
    where ``--debug`` is among the arguments. One of several processes (``jaxsteer.processes``) that fails does not
    return when it is alone in that: it ends, and the others with it.
    """
    try:
        with _signals():
            status = command([argument for argument in arguments if argument != "--debug"])
            with _printing():
                sys.stdout.flush()
    except BaseException as error:
        status, said = _told(error)
        if "--debug" in arguments:
            traceback.print_exc()
        if said:
            from jaxsteer.display import escaped

            print(escaped(f"jaxsteer: {said}"), file=sys.stderr)
    if status not in (0, CHECK_FAILED) and _several():
        from jaxsteer.processes import leave

        leave(status)
    return status


def _told(error: BaseException) -> tuple[int, str]:
    """The exit status for an exception, and what is said about it; nothing where the parser has said all."""
    if isinstance(error, UserError):
        return USAGE_ERROR, f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, _with_notes("interrupted", error)
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else USAGE_ERROR
        return status, _with_notes("ended by a signal", error) if status == TERMINATED else ""
    if isinstance(error, OSError):
        if error.filename == OUTPUT:
            _no_output()
        name = error.filename or "a file could not be read or written"
        return USAGE_ERROR, f"error: {name}: {error.strerror or error}"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):  # of NumPy, of XLA
        return USAGE_ERROR, (
            f"error: there is not enough memory: {str(error).partition(chr(10))[0] or 'an array does not fit.'} Choose "
            "smaller counts (batch, rows, samples, pool, latents), a smaller model or more devices"
        )
    return CRASHED, _bug(error)


def _with_notes(what: str, error: BaseException) -> str:
    """What was kept, as those say whom the exception passed."""
    texts = error.args if isinstance(error, KeyboardInterrupt) else ()
    return "; ".join([what, *map(str, texts), *getattr(error, "__notes__", ())])


def _bug(error: BaseException) -> str:
    """One line for what nobody foresaw: what, where, and how to report it."""
    from jaxsteer.errors import first_line

    steps = traceback.extract_tb(error.__traceback__)
    ours = [step for step in steps if {"jaxsteer", "checkpoints_convert"} & set(step.filename.split(os.sep))] or steps
    what = f"{type(error).__name__}: {first_line(error)[:300]}"
    place = f"{os.sep.join(ours[-1].filename.split(os.sep)[-3:])}:{ours[-1].lineno}, {ours[-1].name}"
    return (
        f"bug: {what} ({place}). Please report it to the authors of jaxsteer, with the command and what it prints with "
        "--debug"
    )


@contextlib.contextmanager
def _printing() -> Iterator[None]:
    """What goes wrong with an unnamed file inside the block is the output's fault."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or OUTPUT
        raise


def _no_output() -> None:
    """Write nothing more to an output that is closed or full: Python would try again when it ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM ends the command as an exception, so that it can clean up and say what it kept; SIGHUP is SIGTERM.

    No signal is lost: Python drops an exception that is raised in a finalizer or a callback of its own or of JAX, which
    is where a signal may find it, and then the signal is sent again.
    """

    def end(*_: object) -> None:
        raise SystemExit(TERMINATED)

    def forward(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # also where a search or JAX listens for it

    dropped, thread = sys.unraisablehook, threading.get_ident()

    def again(what: Any) -> None:
        lost = what.exc_value
        if isinstance(lost, KeyboardInterrupt) or (isinstance(lost, SystemExit) and lost.code == TERMINATED):
            number = signal.SIGINT if isinstance(lost, KeyboardInterrupt) else signal.SIGTERM
            timer = threading.Timer(0.01, signal.pthread_kill, (thread, number))  # once this callback is done
            timer.daemon = True
            timer.start()
        else:
            dropped(what)

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number, handler in ((signal.SIGTERM, end), (signal.SIGHUP, forward)):
            if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
                before[number] = signal.signal(number, handler)
        sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = dropped
        for number, handler in before.items():
            signal.signal(number, handler)


def _command(arguments: list[str]) -> int:
    if arguments[:1] in (["--version"], ["-V"]):
        from jaxsteer import __version__

        print(f"jaxsteer {__version__}")
        return 0
    from jaxsteer.cli.commands import help_text, needs_command, parse

    if not needs_command(arguments):
        with _printing():
            print(help_text())
        return 0 if arguments else USAGE_ERROR
    _settings()
    arguments = join_processes(arguments)

    with _printing():  # help
        command = parse(arguments)
    with _quiet_unless_first(), _escaping():
        return command.run()


def _settings() -> None:
    """Quiet logs, and compiled programs kept between commands."""
    # Before jax and transformers are imported: both read these once.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Formatter("%(levelname)s: %(message)s"))
    keep_programs()


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        from jaxsteer.display import escaped

        return escaped(super().format(record))


def keep_programs() -> None:
    """Keep compiled programs on disk between processes, unless the user has said where they go."""
    import jax

    from jaxsteer.checkpoints.loading import cache_dir

    warnings.filterwarnings("ignore", message="Error (read|writ)ing persistent compilation cache")  # it works without
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def join_processes(arguments: list[str]) -> list[str]:
    """Find the processes that this one works with; returns what else was asked for.

    The flags are those of every command and may stand anywhere.
    """
    parser = argparse.ArgumentParser(prog="jaxsteer", add_help=False, allow_abbrev=False)
    parser.add_argument("--coordinator")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    given, rest = parser.parse_known_args(arguments)
    if {"-h", "--help", "--help-all"} & set(rest):  # read alone, also where others would have to be waited for
        return rest

    from jaxsteer.processes import Coordinates, coordinates_of, join

    join(coordinates_of(Coordinates(given.coordinator, given.num_processes, given.process_id)), rest)
    return rest


def _several() -> bool:
    """Whether this is one of several processes, without waking a device that no command has asked for."""
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized() and jax.process_count() > 1


@contextlib.contextmanager
def _quiet_unless_first() -> Iterator[None]:
    """What a command prints appears once."""
    if not _several():
        yield
        return
    from jaxsteer.processes import is_first

    if is_first():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


class _Escaping(io.TextIOBase):
    """An output that shows control characters, which files and models may hold, instead of obeying them."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def write(self, text: str) -> int:
        from jaxsteer.display import escaped

        with _printing():
            self.inner.write(escaped(text))
        return len(text)

    def flush(self) -> None:
        with _printing():
            self.inner.flush()

    def isatty(self) -> bool:
        return self.inner.isatty()

    def fileno(self) -> int:
        return self.inner.fileno()


@contextlib.contextmanager
def _escaping() -> Iterator[None]:
    with contextlib.redirect_stdout(_Escaping(sys.stdout)):  # type: ignore[type-var]
        yield
