"""Where a model comes from: a Hugging Face directory or a GGUF file, seen alike by the converter."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from checkpoints_convert import files, gguf
from checkpoints_convert.hf import config_from_hf, stop_tokens
from jaxsteer.errors import UserError
from jaxsteer.files import read_json
from jaxsteer.models.config import ModelConfig

StoredTensor = files.Tensor | files.Part | gguf.GGUFTensor
"""A tensor in a file, under its Hugging Face name and in its shape there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A model that can be converted; of its weights, only what the files say of them has been read."""

    path: Path
    """A directory, or the (first) GGUF file."""
    config: ModelConfig
    tensors: Mapping[str, StoredTensor]
    side: Mapping[str, bytes]
    """Name -> content of the files that travel with the weights; those of a GGUF file are made of its keys."""
    ignored: tuple[str, ...] = ()
    """Tensors that are left out knowingly."""

    def content_hash(self, digests: Mapping[str, str]) -> str:
        """sha256 over everything that conversion reads.

        That is the side files, what stands before the tensors in the files of weights, and ``digests``: name -> sha256
        of the bytes, of every tensor that is used. These come with reading the tensors, so that no byte is read twice.
        """
        digest = gguf.header_digest if gguf.is_gguf(self.path) else files.header_digest
        parts = [(f"header of {file.name}", digest(file)) for file in _weights(self.path)]
        parts += [(f"file {name}", hashlib.sha256(content).hexdigest()) for name, content in self.side.items()]
        parts += [(f"tensor {name}", digest) for name, digest in digests.items()]
        return files.combine_hashes(parts)


def open_source(path: Path, ignore_fields: Collection[str] = ()) -> Source:
    """The model at ``path``, with the fields of its config.json that ``ignore_fields`` names left aside.

    Raises ``UserError`` for what is no model, is damaged, incomplete or not supported.
    """
    if gguf.is_gguf(path):
        if not path.is_file():
            raise UserError(f"There is no file {path}.")
        model = gguf.read_gguf_model(path)
        made = model.side()
        with tempfile.TemporaryDirectory() as directory:
            for name, text in made.items():
                (Path(directory) / name).write_text(text, encoding="utf-8")
            config = config_from_hf(directory, ignore_fields=ignore_fields, where=str(path))
        side = {name: text.encode() for name, text in made.items()}
        return Source(path=path, config=config, tensors=model.tensors, side=side, ignored=model.ignored)
    if not path.is_dir():
        raise UserError(
            f"{path} is neither a directory nor a .gguf file. Give the directory of a Hugging Face model (config.json, "
            f"*.safetensors) or a GGUF file."
        )
    config = config_from_hf(path, ignore_fields=ignore_fields)
    stop_tokens(path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):  # which transformers will read
        if (path / name).is_file():
            read_json(path / name)
    side = {name: (path / name).read_bytes() for name in files.side_files(path)}
    return Source(path=path, config=config, tensors=files.read_headers(path), side=side)


def file_states(path: Path) -> list[list[str | int]]:
    """Name, size, times and inode of every file that conversion reads: equal lists mean that no file has changed."""
    found = list(_weights(path))
    if not gguf.is_gguf(path):
        found += [path / name for name in files.side_files(path)]
        found += [path / files.INDEX] if (path / files.INDEX).is_file() else []
    return [[f.name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for f in found if (s := f.stat())]


def _weights(path: Path) -> Sequence[Path]:
    return gguf.parts(path) if gguf.is_gguf(path) else files.weight_files(path)
