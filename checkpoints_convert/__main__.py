"""``python -m checkpoints_convert SRC OUT [--dtype bfloat16]``, ``--verify [SRC] OUT``, or ``sae SRC OUT``."""

from __future__ import annotations

import argparse
import sys

from checkpoints_convert import sae
from checkpoints_convert.streaming import OUT_DTYPES, convert
from checkpoints_convert.verify import report, verify
from jaxsteer.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Convert or verify as the command line says.

    Returns the exit code: 0, 1 if a checkpoint is not what it should be, or 2 with one message for bad input.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["sae"]:
        return sae.main(arguments[1:])
    parser = argparse.ArgumentParser(prog="checkpoints_convert", description=__doc__)
    parser.add_argument("src", metavar="SRC", nargs="?", help="Hugging Face model directory (safetensors)")
    parser.add_argument("out", metavar="OUT", help="directory to create, or to verify")
    parser.add_argument("--dtype", choices=list(OUT_DTYPES), help="dtype to store (default: the checkpoint's own)")
    parser.add_argument("--verify", action="store_true", help="check OUT against SRC, or against its own hashes")
    parser.add_argument("--source", help="origin to record (default: the name of SRC)")
    parser.add_argument("--revision", help="revision to record")
    parser.add_argument(
        "--ignore-field",
        action="append",
        default=[],
        metavar="NAME",
        help="field of config.json to leave aside",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    if options.src is None and not options.verify:
        parser.error("give SRC and OUT")
    try:
        if options.verify:
            return report(verify(options.out, options.src, progress=not options.quiet), options.out, options.src)
        origin = {"source": options.source, "revision": options.revision}
        ignored = options.ignore_field
        convert(
            options.src, options.out, dtype=options.dtype, progress=not options.quiet, ignore_fields=ignored, **origin
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"converted {options.src} to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
