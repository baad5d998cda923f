"""Makes tests/goldens: tiny random checkpoints and what transformers computes with them.

Needs torch (the environment of `make parity`). From the repository root:

    .venv-parity/bin/python tests/make_goldens.py

The goldens keep the comparison with transformers alive where torch is not installed. Run again only when transformers'
numbers change, and look at why.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent))
LIMIT = 150_000


def main() -> None:
    from tests.helpers.oracle import answers, build, save
    from tests.helpers.parity import VARIANTS

    for number, variant in enumerate(VARIANTS):
        directory = ROOT / "goldens" / variant
        directory.mkdir(parents=True, exist_ok=True)
        model = build(variant, seed=number)
        save(model, directory)
        np.savez_compressed(directory / "golden.npz", **answers(model, length=16))
        (directory / "generation_config.json").unlink(missing_ok=True)
        for file in directory.iterdir():
            file.chmod(0o644)
        size = sum(file.stat().st_size for file in directory.iterdir())
        print(f"{variant}: {size:,} bytes")
        assert size <= LIMIT, f"{directory} is larger than {LIMIT:,} bytes"


if __name__ == "__main__":
    main()
