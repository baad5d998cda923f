"""Safetensors files: headers checked before a byte of data is read, tensors read block by block."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.files import decoded, parse_json, read_json, reading

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
"""Files beside the weights that travel with a model."""

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Dtypes of weights that can be converted."""
# Every fixed-width dtype of the format: sizes are checked even for tensors that will be refused or ignored.
_WIDTHS = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_WIDTHS |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, **{name: dtype.itemsize for name, dtype in DTYPES.items()}}
_MAX_HEADER = 100_000_000
_LONGEST_NAME = 255
_READ = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """Where one tensor lies: ``offset`` counts bytes from the start of ``file``."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    raw = True
    """The values are the bytes of the file."""

    @property
    def stored_as(self) -> str:
        """The type in the file, as people name it."""
        return self.dtype

    @property
    def nbytes(self) -> int:
        """Size on disk in bytes."""
        return math.prod(self.shape) * _WIDTHS.get(self.dtype, 0)

    @property
    def row_bytes(self) -> int:
        """Size on disk of one row (of the first axis)."""
        return math.prod(self.shape[1:]) * _WIDTHS.get(self.dtype, 0)

    def read(self, update: Callable[[memoryview], object] = lambda data: None) -> np.ndarray:
        """The tensor's values, in its own dtype; see ``blocks``."""
        rows = self.shape[0] if self.shape else 1
        found = list(self.blocks(rows, update=update))
        return found[0].reshape(self.shape) if found else np.empty(self.shape, DTYPES[self.dtype])

    def blocks(
        self, rows: int, memory: np.ndarray | None = None, update: Callable[[memoryview], object] = lambda data: None
    ) -> Iterator[np.ndarray]:
        """The tensor's values, in its own dtype, so many rows (of the first axis) at a time; the last may be fewer.

        ``update`` gets the bytes in pieces, see ``_fill``. Where ``memory`` is given
        (uint8, at least one block), every block is a view of it, which the next block overwrites. Raises ``UserError``
        naming file and tensor if the file ends early or cannot be read.
        """
        shape = self.shape or (1,)
        try:
            with open(self.file, "rb", buffering=0) as stream:
                stream.seek(self.offset)
                for start in range(0, shape[0], rows):
                    count = min(rows, shape[0] - start)
                    values = (
                        np.empty(count * self.row_bytes, np.uint8)
                        if memory is None
                        else memory[: count * self.row_bytes]
                    )
                    self._fill(stream, values.data, update)
                    # Read once, not kept: the page cache takes these pages again for what is written, and in a virtual
                    # machine that is several times faster than fresh ones.
                    if hasattr(os, "posix_fadvise"):
                        at = self.offset + start * self.row_bytes
                        os.posix_fadvise(stream.fileno(), at, count * self.row_bytes, os.POSIX_FADV_DONTNEED)
                    yield values.view(DTYPES[self.dtype]).reshape(count, *shape[1:])
        except OSError as error:
            raise UserError(
                f"{self.file} could not be read at tensor {self.name!r} ({error.strerror or error})."
            ) from error

    def _fill(self, stream: io.FileIO, data: memoryview, update: Callable[[memoryview], object]) -> None:
        """Read ``data`` in pieces; ``update`` gets each, of whole values and while it is in the processor's cache."""
        for start in range(0, len(data), _READ):
            piece = data[start : start + _READ]
            done = 0
            while done < len(piece):
                count = stream.readinto(piece[done:])
                if not count:
                    raise UserError(f"{self.file} ended while tensor {self.name!r} was read. Download it again.")
                done += count
            update(piece)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A matrix that lies [in, out] in the file, shown as [out, in], or a third of the outputs of a tensor: GPT-2's.

    It has the methods of ``Tensor``.
    """

    whole: Tensor
    turned: bool
    third: int | None
    raw = True
    """What ``update`` gets are the values."""

    @property
    def name(self) -> str:
        """Of the tensor in the file, with the third in brackets."""
        return self.whole.name if self.third is None else f"{self.whole.name}[{'qkv'[self.third]}]"

    @property
    def file(self) -> Path:
        """Where the tensor lies."""
        return self.whole.file

    @property
    def dtype(self) -> str:
        """As the whole's."""
        return self.whole.dtype

    @property
    def stored_as(self) -> str:
        """The type in the file, as people name it."""
        return self.whole.stored_as

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in], or [out] for biases."""
        *ins, outs = self.whole.shape
        return (outs // (1 if self.third is None else 3), *ins)

    @property
    def nbytes(self) -> int:
        """Its share of the size on disk, in bytes."""
        return self.whole.nbytes // (1 if self.third is None else 3)

    @property
    def row_bytes(self) -> int:
        """Size of one row (of the first axis)."""
        return self.nbytes // max(1, self.shape[0])

    def blocks(
        self, rows: int, memory: np.ndarray | None = None, update: Callable[[memoryview], object] = lambda data: None
    ) -> Iterator[np.ndarray]:
        """As ``Tensor.blocks``; the file is mapped, and a block's columns are gathered from it."""
        del memory  # a block is gathered, not read
        shape, dtype = self.shape, DTYPES[self.dtype]
        bits = np.dtype(f"u{dtype.itemsize}")
        first = shape[0] * (self.third or 0)
        try:
            stored = np.memmap(self.file, bits, "r", self.whole.offset, self.whole.shape)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.file} could not be read at tensor {self.name!r} ({error}).") from error
        for start in range(0, shape[0], rows):
            end = min(start + rows, shape[0])
            block = np.ascontiguousarray(stored[..., first + start : first + end].T)
            update(block.reshape(-1).view(np.uint8).data)
            yield block.view(dtype)


def all_finite(data: memoryview, dtype: np.dtype) -> bool:
    """Whether none of the values in these bytes is NaN or infinite: their exponents are not all ones."""
    bits = np.frombuffer(data, f"u{dtype.itemsize}")
    infinity = np.asarray(np.inf, dtype).view(bits.dtype)
    magnitude = np.asarray((1 << 8 * dtype.itemsize - 1) - 1, bits.dtype)
    return not bits.size or bool((bits & magnitude).max() < infinity)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, all of them present, in the order of their names."""
    weight_map = read_index(directory)
    if weight_map is None:
        return [directory / SINGLE]
    files = [directory / name for name in sorted(set(weight_map.values()))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise UserError(
            f"{directory} is incomplete: {INDEX} names {', '.join(absent)}, which "
            f"{'is' if len(absent) == 1 else 'are'} missing. Download the missing files."
        )
    return files


def read_index(directory: Path) -> dict[str, str] | None:
    """Tensor -> the file that holds it, of a model in several files; ``None`` if all of it is in ``SINGLE``.

    Where ``SINGLE`` lies beside an index of other files, it is taken, as transformers does, and a warning says so: the
    index is left over from another model. Raises ``UserError`` for a directory without weights, for an index that
    cannot be read, and for an adapter beside the weights, which would have to be merged into them.
    """
    if (directory / ADAPTER).exists():
        raise UserError(
            f"{directory} holds an adapter ({ADAPTER}) beside a model, and adapters are not applied. Merge it into the "
            f"model (peft: merge_and_unload) and save the result, or move {ADAPTER} away to use the model without it."
        )
    single, path = (directory / SINGLE).is_file(), directory / INDEX
    if not path.is_file():
        if single:
            return None
        raise UserError(_no_weights(directory))
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} is not a safetensors index: it has no object 'weight_map' of tensors and files.")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and Path(file).name == file and file not in ("", ".", "..")
        if not plain or "\0" in file or len(file.encode()) > _LONGEST_NAME:
            raise UserError(f"{path} puts {name!r} into the file {file!r}; only files in the same directory are read.")
    others = sorted(set(weight_map.values()) - {SINGLE})
    if single and others:
        log.warning(
            "%s holds %s, which is loaded, and an index of %s, which is not: %s is left over from another model",
            directory, SINGLE, ", ".join(others[:3]) + " ..." * (len(others) > 3), INDEX,
        )  # fmt: skip
        return None
    return weight_map


def _no_weights(directory: Path) -> str:
    if list(directory.glob("*.bin")) or list(directory.glob("*.pt")):
        return (
            f"{directory} holds only PyTorch pickle files, which jaxsteer does not open. Save the model as safetensors "
            f"(transformers: model.save_pretrained(directory))."
        )
    return f"{directory} holds no weights: expected {SINGLE}, or {INDEX} with its files."


def read_header(file: Path) -> list[Tensor]:
    """The tensors of one safetensors file, after checking that they fill it, one after the other, without gaps.

    Raises ``UserError`` for a file that is truncated, damaged, or gives bytes to several tensors.
    """
    with reading(file), open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise UserError(
                f"{file} is truncated or not a safetensors file: its header should take {length:,} bytes and the file "
                f"has {size:,}. Download it again."
            )
        header = parse_json(decoded(stream.read(length), f"the header of {file}"), f"the header of {file}")
    if not isinstance(header, dict):
        raise UserError(f"{file} has a damaged safetensors header: it is no object. Download it again.")
    header.pop("__metadata__", None)
    tensors = [_tensor(file, name, entry, 8 + length, size) for name, entry in header.items()]
    end = 8 + length
    for tensor, nbytes in sorted(tensors, key=lambda found: (found[0].offset, found[1])):
        if tensor.offset != end:
            raise UserError(
                f"{file}: tensor {tensor.name!r} begins at byte {tensor.offset:,}, where the one before it ends at "
                f"{end:,}, so that tensors overlap or leave a gap. The file is damaged. Download it again."
            )
        end += nbytes
    if end != size:
        raise UserError(f"{file}: its tensors end at byte {end:,} and the file has {size:,}. Download it again.")
    return [tensor for tensor, _ in tensors]


def _tensor(file: Path, name: str, entry: Any, data: int, size: int) -> tuple[Tensor, int]:
    """One entry of a header whose data begins at byte ``data``, and how many bytes it takes."""
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    counts = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not isinstance(dtype, str) or not counts or not all(type(n) is int and n >= 0 for n in [*shape, *offsets]):
        raise UserError(
            f"{file} has a damaged safetensors header: {name!r} is {str(entry)[:200]}, where a dtype, a shape and two "
            f"data_offsets were expected. Download it again."
        )
    begin, end = offsets
    if data + end > size:
        raise UserError(
            f"{file} is truncated: tensor {name!r} ends at byte {data + end:,} and the file has {size:,}. "
            f"Download it again."
        )
    width = _WIDTHS.get(dtype)
    if end < begin or (width and end - begin != math.prod(shape) * width):
        raise UserError(
            f"{file}: tensor {name!r} of shape {tuple(shape)} and dtype {dtype} cannot take the {end - begin:,} bytes "
            f"that the header gives it. The file is damaged."
        )
    return Tensor(name=name, file=file, dtype=dtype, shape=tuple(shape), offset=data + begin), end - begin


def read_headers(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a model directory by name; the index, if there is one, must agree with the files."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(directory):
        for tensor in read_header(file):
            if tensor.name in tensors:
                raise UserError(f"Tensor {tensor.name!r} is in {tensors[tensor.name].file.name} and in {file.name}.")
            tensors[tensor.name] = tensor
    for name, file_name in (read_index(directory) or {}).items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise UserError(
                f"{directory / INDEX} says that tensor {name!r} is in {file_name}, and it is not there. Download "
                f"{file_name} again, or mend the index."
            )
    return tensors


def side_files(directory: Path) -> list[str]:
    """Those of ``SIDE_FILES`` that the directory has.

    They are copied, so a link to another place could take along what is not the model's: it is followed within the
    directory and within a hub's cache only. Raises ``UserError`` for others.
    """
    found = [name for name in SIDE_FILES if (directory / name).is_file()]
    home = directory.resolve()
    home = home.parent.parent if home.parent.name == "snapshots" else home
    for name in found:
        target = (directory / name).resolve()
        if not target.is_relative_to(home):
            raise UserError(
                f"{directory / name} is a link to {target}, outside of the model's directory, and is not copied. If it "
                f"is the model's, put the file itself there."
            )
    return found


def combine_hashes(pairs: Iterable[tuple[str, str]]) -> str:
    """One sha256 over (name, digest) pairs, whatever their order."""
    total = hashlib.sha256()
    for name, digest in sorted(pairs):
        total.update(f"{name}\0{digest}\n".encode())
    return total.hexdigest()


def header_digest(file: Path) -> str:
    """sha256 of the header of a safetensors file."""
    with open(file, "rb") as stream:
        length = stream.read(8)
        return hashlib.sha256(length + stream.read(min(int.from_bytes(length, "little"), _MAX_HEADER))).hexdigest()
