"""Converted checkpoints in object stores.

The small files of a checkpoint (record, index, tokenizer) are copied into the cache; the arrays stay where they are,
and every process reads of them what its devices hold, as from a disk.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from jaxsteer.errors import UserError
from jaxsteer.files import write_bytes
from jaxsteer.files.stores import Bucket

RECORD = "jaxsteer.json"
WEIGHTS = "weights"
INDEX = "weights/index.json"


def side_files(url: str, cache: Path) -> Path:
    """A directory in ``cache`` with all files of the checkpoint at ``url`` but its arrays, up to date.

    Raises ``UserError`` when there is no checkpoint, or when the store cannot be read.
    """
    store = Bucket(url)
    local = cache / hashlib.sha256(store.url.encode()).hexdigest()[:32]
    record = store.read(RECORD)
    if record is None:
        raise UserError(
            f"There is no converted checkpoint at {store.url} (no {RECORD} in it). Convert the model with `jaxsteer "
            f"convert` on a disk, and copy the directory there."
        )
    if (local / RECORD).is_file() and (local / RECORD).read_bytes() == record:
        return local
    (local / WEIGHTS).mkdir(parents=True, exist_ok=True)
    (local / RECORD).unlink(missing_ok=True)
    names = store.names(but=WEIGHTS)  # the arrays, of which there may be thousands of chunks
    for name in [*(name for name in names if "/" not in name and name != RECORD), INDEX]:
        data = store.read(name)
        if data is None:
            raise UserError(f"The checkpoint {store.url} lacks {name}. Copy it again.")
        write_bytes(local / name, data)
    write_bytes(local / RECORD, record)
    return local
