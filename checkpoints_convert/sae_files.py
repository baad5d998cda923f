"""The files of an SAE: found on the disk or on the hub, read as named arrays and JSON beside them, never executed."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import glob
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, TypeVar

import numpy as np

from checkpoints_convert.files import DTYPES, read_header
from jaxsteer.errors import UserError, first_line
from jaxsteer.files import parse_json, read_text, read_torch
from jaxsteer.files.npz import read_npz
from jaxsteer.files.paths import user_path
from jaxsteer.files.sae_form import Matrix

T = TypeVar("T")
SUFFIXES = (".safetensors", ".npz", ".pt", ".pth", ".bin")
NAMES = ("sae_weights.safetensors", "sae.safetensors", "params.safetensors", "params.npz", "ae.pt")
"""What the libraries call the one file; another beside it is not the SAE."""
NESTED = "checkpoints/final.safetensors"
_NOT_SAES = ("sparsity.safetensors", "optimizer*", "opt*.pt", "*scheduler*", "training_*", "trainer_*")
_HUB = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<folder>[^:]*))?")
_SHOWN = 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overrides:
    """What the caller knows and the file may not say."""

    model: str | None = None
    site: str | None = None
    k: int | None = None
    norm_scaling_factor: float | None = None
    use_threshold: bool = False
    unit_decoder: bool | None = None
    """Whether decoder rows are to have norm 1; by default as the library of the layout does it."""
    site_out: str | None = None
    """Of SAEs that write to several layers: the site whose decoder is read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SAEFiles:
    """The contents of an SAE's file, with what stands beside it."""

    file: Path
    tensors: dict[str, np.ndarray]
    settings: dict[str, dict[str, Any]]
    """Name of a JSON file beside it -> its contents; "../config.json" of the folder above."""
    origin: str
    """Hub id, revision and path, or the path on the disk: names often say layer, width and k."""
    overrides: Overrides

    def describe(self) -> str:
        """Keys and shapes, and the JSON files with their keys."""
        arrays = [f"  {name} {list(a.shape)} {a.dtype}" for name, a in sorted(self.tensors.items())]
        more = len(arrays) - _SHOWN
        lines = [f"{self.file} holds", *arrays[:_SHOWN], *([f"  and {more} more"] if more > 0 else [])]
        lines += [f"{name} beside it has the keys {_some(sorted(s))}" for name, s in sorted(self.settings.items())]
        return "\n".join(lines if self.settings else [*lines, "and there is no JSON file beside it"])

    def refuse(self, why: str) -> NoReturn:
        """Raise the error of a file that cannot be used, with what it holds."""
        raise UserError(f"The SAE {self.origin} cannot be read: {why}.\n{self.describe()}")

    def ask(self, argument: str, what: str, example: str) -> NoReturn:
        """Raise the error of something that the files do not say."""
        raise UserError(
            f"The SAE {self.origin} does not say {what}, and neither does its name. Give {argument}={example}."
        )

    def tensor(self, name: str) -> np.ndarray:
        """One array, by its exact name."""
        if name not in self.tensors:
            self.refuse(f"the tensor {name!r} is missing")
        return self.tensors[name]

    def matrix(self, name: str, *, transposed: bool = False) -> Matrix:
        """One array of two dimensions."""
        values = self.tensor(name)
        if values.ndim != 2 or not self._numbers(values):
            self.refuse(f"the tensor {name!r} should be a matrix of numbers")
        return Matrix(values, transposed)

    def vector(self, name: str) -> np.ndarray:
        """One array of one dimension as float64."""
        values = self.tensor(name)
        if values.ndim != 1 or not self._numbers(values):
            self.refuse(f"the tensor {name!r} should have one dimension")
        return values.astype(np.float64)

    def scalar(self, name: str) -> float:
        """One array of one finite value."""
        values = self.tensor(name)
        if values.size != 1 or not self._numbers(values) or not np.isfinite(values.astype(np.float64)).all():
            self.refuse(f"the tensor {name!r} should hold one number")
        return float(values.astype(np.float64).reshape(()))

    def _numbers(self, values: np.ndarray) -> bool:
        return values.dtype.kind in "fiu" or values.dtype == DTYPES["BF16"]

    def said(self, config: Mapping[str, Any], name: str, kind: type[T], default: Any = None) -> Any:
        """What a config says under ``name``; ``default`` where it says nothing or null. Refuses another kind of value.

        A whole number may be written as a float, and a float as a whole number.
        """
        value = config.get(name)
        if value is None:
            return default
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if kind is float and number:
            return float(value)
        if kind is int and number and value == int(value) and abs(value) < 2**31:
            return int(value)
        if kind not in (int, float) and isinstance(value, kind):
            return value
        names = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}
        self.refuse(f"its config has {name} = {str(value)[:80]!r}, expected {names.get(kind, 'an object')}")

    def in_name(self, pattern: str) -> str | None:
        """The first group of the last match of ``pattern`` in the origin, which ends in the most specific name."""
        matches = re.findall(pattern, self.origin, re.IGNORECASE)
        return matches[-1] if matches else None


def find_sae(source: str | os.PathLike[str], overrides: Overrides) -> SAEFiles:
    """The SAE in a folder, a file, or on the hub (``owner/name:folder``, ``owner/name@revision:folder/file``).

    Raises ``UserError`` for what cannot be found, holds no tensors, or holds several files of tensors.
    """
    text = os.fspath(source)
    path = user_path(text)
    origin = str(path.absolute())
    if not path.exists():
        match = _HUB.fullmatch(text)
        if not match:
            raise UserError(
                f"The SAE {text!r} was not found. Tried: a file or folder (there is none at {path.absolute()}), a "
                "Hugging Face hub id (it is not of the form owner/name:folder or owner/name@revision:folder)."
            )
        path = _download(match["repo"], match["revision"], (match["folder"] or "").strip("/"))
        origin = text
    file = path if path.is_file() else _only_file(path, origin)
    if path.is_dir() and file.parent == path:
        origin = f"{origin.rstrip('/')}/{file.name}" if file.name not in NAMES else origin
    tensors = _tensors(file)
    return SAEFiles(file=file, tensors=tensors, settings=_settings(file), origin=origin, overrides=overrides)


def _only_file(folder: Path, origin: str) -> Path:
    """The one file of tensors in a folder."""
    files = sorted(
        p
        for p in folder.iterdir()
        if p.is_file() and p.suffix in SUFFIXES and not any(fnmatch.fnmatch(p.name, n) for n in _NOT_SAES)
    )
    if (folder / NESTED).is_file() and (folder / "hyperparams.json").is_file():
        files.append(folder / NESTED)
    refuse_kind([p.name for p in files], origin)
    named = [p for p in files if p.name in NAMES]
    if len(files) == 1 or len(named) == 1:
        return named[0] if named else files[0]
    if files:
        raise UserError(
            f"The folder {origin} holds {len(files)} files of tensors: {_some([p.name for p in files])}. Which one is "
            f"meant? Give its path, for example {origin.rstrip('/')}/{files[0].name}"
        )
    inside = sorted({str(p.parent.relative_to(folder)) for s in SUFFIXES for p in folder.glob(f"*/**/*{s}")})
    seen = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    raise UserError(
        f"The folder {origin} holds no SAE: no file that ends in {', '.join(SUFFIXES)} lies in it, only "
        f"{_some(seen) or 'nothing'}. "
        + (f"Folders inside that hold one: {_some(inside)}." if inside else "Give the folder or file of one SAE.")
    )


def refuse_kind(names: Iterable[str], origin: str) -> None:
    """Refuse sets of files that are known and cannot be one SAE."""
    for name in names:
        if re.fullmatch(r"W_(enc|dec)_\d+\.safetensors", name):
            raise UserError(
                f"{origin} is a cross-layer transcoder ({name}: one encoder per layer, decoders into all later "
                "layers). jaxsteer does not read these yet."
            )


def _settings(file: Path) -> dict[str, dict[str, Any]]:
    folders = [file.parent]
    if file.parent.name == "checkpoints":
        folders.append(file.parent.parent)
    paths = {path.name: path for folder in folders for path in sorted(folder.glob("*.json"))}
    if (file.parent.parent / "config.json").is_file():
        paths.setdefault("../config.json", file.parent.parent / "config.json")
    found = {}
    for name, path in paths.items():
        try:
            contents = parse_json(read_text(path), path)
        except UserError:
            if name.startswith("../"):
                continue
            raise
        if isinstance(contents, dict):
            found[name] = contents
    return found


def _tensors(file: Path) -> dict[str, np.ndarray]:
    if file.suffix == ".safetensors":
        return _map_tensors(file)
    if file.suffix == ".npz":
        return read_npz(file)
    if file.suffix in (".pt", ".pth", ".bin"):
        return _flatten(read_torch(file), file)
    raise UserError(f"{file} is no file of tensors that is known: those end in {', '.join(SUFFIXES)}")


def _map_tensors(file: Path) -> dict[str, np.ndarray]:
    """The float tensors of a safetensors file, mapped into memory: only what is used is read."""
    tensors = read_header(file)
    data = np.memmap(file, np.uint8, "r")
    found = {}
    for tensor in tensors:
        if tensor.dtype in DTYPES:
            raw = data[tensor.offset : tensor.offset + tensor.nbytes]
            values = raw.view(DTYPES[tensor.dtype]).reshape(tensor.shape)
            # A header whose length is no multiple of the item's size leaves the data unaligned.
            found[tensor.name] = values if values.flags.aligned else values.copy()
    return found


def _flatten(value: Any, file: Path, prefix: str = "") -> dict[str, np.ndarray]:
    """Arrays and numbers of nested dicts by dotted names."""
    if not isinstance(value, dict):
        kind = f"an array of shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise UserError(f"{file} holds {kind} where an SAE is a dict of tensors")
    found: dict[str, np.ndarray] = {}
    for key, part in value.items():
        if isinstance(part, dict):
            found |= _flatten(part, file, f"{prefix}{key}.")
        elif isinstance(part, np.ndarray) or (isinstance(part, (int, float)) and not isinstance(part, bool)):
            found[f"{prefix}{key}"] = np.asarray(part)
    return found


def _download(repo: str, revision: str | None, folder: str) -> Path:
    """The path of ``folder`` (or of a file) in a hub repository; only its own files are fetched."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision)
        files = [sibling.rfilename for sibling in info.siblings or []]
        wanted = _choose_files(files, folder)
        if not wanted:
            _refuse_without_sae(repo, folder, files)
        patterns = [glob.escape(name) for name in wanted]
        root = huggingface_hub.snapshot_download(repo, revision=info.sha, allow_patterns=patterns)
    except UserError:
        raise
    except Exception as error:  # many types: offline, unknown repository or revision, gated, proxies
        try:
            root = huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True)
        except (LocalEntryNotFoundError, OSError, ValueError):
            root = ""
        if not root or not (Path(root) / folder).exists():
            reason = first_line(error)
            raise UserError(
                f"The SAE {repo}:{folder} is neither on this machine nor obtainable from the Hugging Face hub "
                f"({reason}). Without network, download it elsewhere (`hf download {repo} --include '{folder}/*' "
                f"--local-dir DIR`) and pass the folder."
            ) from None
    return Path(root) / folder


def _choose_files(files: list[str], folder: str) -> list[str]:
    """Files directly in ``folder`` (or the file of that name with the JSON beside it), and a config above."""
    if folder in files:
        parent = str(PurePosixPath(folder).parent)
        return [folder, *(f for f in files if str(PurePosixPath(f).parent) == parent and f.endswith(".json"))]
    root = folder or "."
    inside = [f for f in files if str(PurePosixPath(f).parent) == root and f.endswith((*SUFFIXES, ".json"))]
    nested = [f for f in files if f == (f"{folder}/{NESTED}" if folder else NESTED)]
    if not any(f.endswith(SUFFIXES) for f in (*inside, *nested)):
        return []
    above = str(PurePosixPath(folder).parent / "config.json") if folder else ""
    return [*inside, *nested, *(f for f in files if f == above)]


def _refuse_without_sae(repo: str, folder: str, files: list[str]) -> NoReturn:
    """Refuse a folder that holds no SAE, naming the nearest that do."""
    folders = sorted({str(PurePosixPath(f).parent) for f in files if f.endswith(SUFFIXES)} - {"."})
    inside = [f for f in folders if f.startswith(f"{folder}/")] if folder else folders
    offer = inside or difflib.get_close_matches(folder, folders, n=8, cutoff=0.3) or folders
    raise UserError(
        f"The hub repository {repo} holds no SAE in {folder or 'its root'!r}. "
        + (f"Folders with one: {_some(offer)}. Write {repo}:FOLDER." if offer else "It holds no file of tensors.")
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
