"""The command ``jaxsteer``: parses, calls, prints. Global JAX settings live here and nowhere else."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

from jaxsteer.errors import UserError

CHECK_FAILED = 1
USAGE_ERROR = 2
INTERRUPTED = 130
CRASHED = 70


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, as ``status_of`` does."""
    return status_of(_command, list(sys.argv[1:] if argv is None else argv))


def status_of(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """The exit status of ``command(arguments)``.

    0: done. 1: a check failed. 2: bad input, with one message on stderr. 130: interrupted. One of several processes
    (``jaxsteer.processes``) that fails does not return when it is alone in that: it ends, and the others with
    it.
    """
    try:
        status = command(arguments)
    except UserError as error:
        print(f"jaxsteer: error: {error}", file=sys.stderr)
        status = USAGE_ERROR
    except SystemExit as stop:  # the parser's: help, or arguments that it has explained already
        status = stop.code if isinstance(stop.code, int) else USAGE_ERROR
    except KeyboardInterrupt:
        print("jaxsteer: interrupted", file=sys.stderr)
        status = INTERRUPTED
    except Exception:
        if not _several():
            raise
        traceback.print_exc()
        status = CRASHED
    if status not in (0, CHECK_FAILED) and _several():
        from jaxsteer.processes import leave

        leave(status)
    return status


def _command(arguments: list[str]) -> int:
    if arguments[:1] in (["--version"], ["-V"]):
        from jaxsteer import __version__

        print(f"jaxsteer {__version__}")
        return 0
    _settings()
    arguments = join_processes(arguments)
    from jaxsteer.cli.commands import parse

    command = parse(arguments)
    with _quiet_unless_first():
        return command.run()


def _settings() -> None:
    """Quiet logs, and compiled programs kept between commands."""
    # Before jax and transformers are imported: both read these once.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    keep_programs()


def keep_programs() -> None:
    """Keep compiled programs on disk between processes, unless the user has said where they go."""
    import jax

    from jaxsteer.checkpoints.loading import cache_dir

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

    join(coordinates_of(Coordinates(given.coordinator, given.num_processes, given.process_id)))
    return rest


def _several() -> bool:
    """Whether this is one of several processes, without waking a device that no command has asked for."""
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
