"""``python -m checkpoints_convert SRC OUT [--dtype bfloat16]``."""

from __future__ import annotations

import argparse
import sys

from checkpoints_convert.streaming import OUT_DTYPES, convert
from jaxsteer.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Convert as the command line says. Returns the exit code: 0, or 2 with one message for bad input."""
    parser = argparse.ArgumentParser(prog="checkpoints_convert", description=__doc__)
    parser.add_argument("src", metavar="SRC", help="Hugging Face model directory (safetensors)")
    parser.add_argument("out", metavar="OUT", help="directory to create")
    parser.add_argument("--dtype", choices=list(OUT_DTYPES), help="dtype to store (default: the checkpoint's own)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    try:
        convert(options.src, options.out, dtype=options.dtype, progress=not options.quiet)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"converted {options.src} to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
