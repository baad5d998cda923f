"""The command ``jaxsteer``: parses, calls, prints. Global JAX settings live here and nowhere else."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from jaxsteer.errors import UserError

USAGE_ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0: done. 1: a check failed. 2: bad input, with one message on stderr. 130: interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] in (["--version"], ["-V"]):
            from jaxsteer import __version__

            print(f"jaxsteer {__version__}")
            return 0
        _settings()
        from jaxsteer.cli.commands import parse

        return parse(arguments).run()
    except UserError as error:
        print(f"jaxsteer: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except SystemExit as stop:  # the parser's: help, or arguments that it has explained already
        return stop.code if isinstance(stop.code, int) else USAGE_ERROR
    except KeyboardInterrupt:
        print("jaxsteer: interrupted", file=sys.stderr)
        return INTERRUPTED


def _settings() -> None:
    """Quiet logs, and compiled programs kept between commands."""
    # Before jax and transformers are imported: both read these once.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    import jax

    from jaxsteer.models.loading import cache_dir

    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:  # a user's own setting stays
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
