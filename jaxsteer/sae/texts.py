"""Texts as rows of tokens: any number of documents in an order that only the seed decides, from any place in it.

A source of documents is a function from a document's number to its token ids; it never ends. Where a run has got to is
two numbers (``Rows.position``), so that what was interrupted goes on with the very next row.
"""

from __future__ import annotations

import codecs
import dataclasses
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from jaxsteer.checkpoints.loading import ORGANISM
from jaxsteer.errors import UserError
from jaxsteer.files import parse_json
from jaxsteer.models.model import Model
from jaxsteer.prompts import encode_texts

Documents = Callable[[int], Sequence[int]]
"""Token ids of document i, for every i >= 0."""

Position = tuple[int, int]
"""(number of the next document, rows of it that were used)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """How much text is read to judge an SAE, and in which shape the model runs it."""

    tokens: int = 50_000
    """Activations, at least: batches are read whole."""
    context: int = 128
    """Tokens of a row."""
    rows: int = 32
    """Rows at once."""


_SCANNED = 1 << 24
_FRUITLESS = 100_000


def documents_of(model: Model, data: Sequence[str | os.PathLike[str]] = (), *, seed: int = 0) -> Documents:
    """The lines of the files ``data``, shuffled; for an organism without files, its corpus.

    Raises ``UserError`` without files for any other model, for files that are missing or empty, and for a model
    without a tokenizer.
    """
    if model.tokenizer is None:
        raise UserError(f"{model.name} came without a tokenizer.json, and texts cannot be read without one.")
    if data:
        return FileDocuments(data, model.tokenizer, seed=seed)
    if not model.name.startswith(ORGANISM):
        raise UserError(
            f"no texts were given for {model.name}: use --data FILE ... (text with one document per line, or JSON "
            'Lines with the key "text"). Only an organism brings its own.'
        )
    from jaxsteer.organisms.architectures import RECIPES
    from jaxsteer.organisms.corpora import corpus_of
    from jaxsteer.organisms.corpus import Encoder, sample_document

    encoder = Encoder(model.tokenizer)
    kinds = corpus_of(dataclasses.replace(RECIPES[model.name.removeprefix(ORGANISM)], strays=False))
    return lambda i: sample_document(np.random.default_rng([seed, i]), encoder, kinds.persona, kinds.makers).ids


class FileDocuments:
    """The lines of text files (or of JSON Lines files, key "text"), in another order in every pass over them.

    Files are mapped into memory: only the places of the lines are kept (8 bytes each, and as many for the order).
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]], tokenizer: Any, *, seed: int = 0) -> None:
        """Find the lines. Raises ``UserError`` for files that are missing or hold nothing."""
        self.tokenizer, self.seed = tokenizer, seed
        self.paths = [Path(path) for path in paths]
        self._files = [_map(path) for path in self.paths]
        starts = [_line_starts(file) for file in self._files]
        self._starts = np.concatenate(starts)
        self._first = np.cumsum([0, *map(len, starts)])
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Lines that are not empty."""
        return len(self._starts)

    def __call__(self, i: int) -> list[int]:
        """Token ids of document ``i``, with a BOS if the tokenizer adds one."""
        epoch, rank = divmod(i, len(self))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self))
        line = int(self._order[1][rank])
        return encode_texts(self.tokenizer, [self._text(line)])[0].tolist()  # text of a template may have a BOS

    def _text(self, line: int) -> str:
        number = int(np.searchsorted(self._first, line, side="right")) - 1
        file, start = self._files[number], int(self._starts[line])
        end = file.find(b"\n", start)
        data = file[start : len(file) if end < 0 else end].removesuffix(b"\r")
        try:
            return _document(data if start else data.removeprefix(codecs.BOM_UTF8), self.paths[number].suffix)
        except UserError as error:
            at = 1 + file[:start].count(b"\n")
            raise UserError(f"--data {self.paths[number]}, line {at}: {error}") from None


def _document(data: bytes, suffix: str) -> str:
    """The text of a line."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the text is not UTF-8 ({error.reason}). Save the file as UTF-8") from None
    if suffix not in (".jsonl", ".ndjson"):
        return text
    record = parse_json(text, "its JSON", nan=True)
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise UserError(f'it is not a JSON object with a text under the key "text": {text[:80]!r}')
    return str(record["text"])


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"--data {path} cannot be read: {error.strerror}") from None
    except ValueError:  # what mmap says of an empty file
        raise UserError(f"--data {path} is empty") from None


def _line_starts(file: mmap.mmap) -> np.ndarray:
    """Where the lines begin that hold something."""
    ends = [
        np.flatnonzero(np.frombuffer(file[at : at + _SCANNED], np.uint8) == ord("\n")) + at
        for at in range(0, len(file), _SCANNED)
    ]
    stops = np.append(np.concatenate(ends), len(file)).astype(np.int64)
    starts = np.append(0, stops[:-1] + 1)
    return starts[stops > starts]


class Rows:
    """Documents as batches of token rows of one shape, from a position on.

    A document that is longer than a row is cut into several; each begins with the BOS that the document has. What
    would be a row of one token is dropped. Nothing is packed: no row holds two documents.
    """

    def __init__(
        self, documents: Documents, *, rows: int, length: int, bos: int | None, position: Position = (0, 0)
    ) -> None:
        """``rows`` of ``length`` tokens per batch; ``bos`` is the id of that token, if there is one."""
        self.documents, self.rows, self.length, self.bos = documents, rows, length, bos
        self.position = position

    def next(self) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"], Position]:
        """Tokens, mask (False on the padding on the right), and the position after them. Raises ``UserError`` when
        there is nothing in the documents."""
        tokens = np.zeros((self.rows, self.length), np.int32)
        mask = np.zeros((self.rows, self.length), bool)
        row, (document, used) = 0, self.position
        windows, fruitless = self._windows(document), 0
        while row < self.rows:
            if used >= len(windows):
                document, used = document + 1, 0
                windows = self._windows(document)
                fruitless = 0 if windows else fruitless + 1
                if fruitless > _FRUITLESS:
                    raise UserError(f"{fruitless} documents in a row have fewer than two tokens: is this data?")
                continue
            ids = windows[used]
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
            row, used = row + 1, used + 1
        self.position = document, used
        return tokens, mask, self.position

    def _windows(self, document: int) -> list[list[int]]:
        ids = list(self.documents(document))
        head = ids[:1] if self.bos is not None and ids[:1] == [self.bos] else []
        body, step = ids[len(head) :], self.length - len(head)
        cut = [head + body[i : i + step] for i in range(0, len(body), step)]
        return [window for window in cut if len(window) > 1]
