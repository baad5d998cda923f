"""Explanations in and out of other tools' files: Neuronpedia's exports and delphi's result folders.

    Neuronpedia   one record per explanation: modelId, layer (the id of an SAE, "20-gemmascope-res-16k"), index,
                  description, explanationModelName, typeName ...; as JSON Lines (also packed, .jsonl.gz, and a folder
                  of these), as a JSON list, or as CSV
    delphi        explanations/HOOKPOINT_latentN.txt, each a JSON string; scores/detection and scores/fuzz beside it,
                  of the same names, each a list of texts with what they are ("activating") and what was said of them
                  ("prediction"; null where a reply could not be read)

Formats as in their public sources (hijohnnylin/neuronpedia, schema.prisma; EleutherAI/delphi, __main__.py), 2026-12.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsteer.display import short, visible
from jaxsteer.errors import UserError
from jaxsteer.explain.explanations import Explanations
from jaxsteer.explain.judged_detection import LabelScore, LabelScores, scored
from jaxsteer.explain.labels import WORDS, Label, Labels
from jaxsteer.files import (
    csv_records,
    json_records,
    kind_of,
    make_directory,
    parse_json,
    read_text,
    reading,
    write_bytes,
    write_text,
)
from jaxsteer.files.records import Record
from jaxsteer.models.sites import parse_site
from jaxsteer.sae.dictionary import SAE

WORDS_TYPE = "jaxsteer_mi-words"
"""The typeName of descriptions that are a latent's words; those of a writer have "jaxsteer_label"."""
_LAYER = re.compile(r"(?:.*?\blayers?\.|h\.|blocks\.)?(\d{1,4})(?:[.-].*)?$")
_LATENT = re.compile(r"(.+)_latent(\d{1,9})$")
_SCORES = {"detection": "detection", "fuzz": "fuzzing"}
_MOST = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherLabels(Record):
    """Explanations that another tool wrote, one for each latent that it has one for."""

    format: str
    """"neuronpedia" or "delphi"."""
    labels: Labels
    model: str
    """As the file calls it; "" where it does not."""
    source: str
    """What the file calls the SAE (Neuronpedia's source id, delphi's hookpoint)."""
    repeated: int
    """Further explanations of latents that have one: the first counts."""
    scores: tuple[LabelScores, ...] = ()
    """Of delphi: its own, by its own judge."""

    def check_sae(self, sae: SAE) -> None:
        """Raise ``UserError`` where these cannot be the latents of ``sae``: numbers beyond it, or another layer."""
        beyond = max((one.latent for one in self.labels.labels), default=0)
        if beyond >= sae.n_latents:
            raise UserError(
                f"these explanations ({self.format}, {visible(self.source) or 'of no name'}) are of another SAE: they "
                f"tell of latent {beyond:,}, and the SAE that was given has the latents 0 to {sae.n_latents - 1:,}"
            )
        said, own = _LAYER.match(self.source), re.match(r"blocks\.(\d+)\.", sae.config.site_in or "")
        if said and own and int(said[1]) != int(own[1]):
            raise UserError(
                f"these explanations ({self.format}) are of {visible(self.source)}, which is layer {int(said[1])}, and "
                f"the SAE that was given reads {sae.config.site_in}: give the file of that one"
            )


def read_labels(path: str | Path, *, source: str | None = None) -> OtherLabels:
    """Explanations of latents from a Neuronpedia export or a delphi folder, which is told by what is there.

    ``source`` names one SAE (Neuronpedia's source id, delphi's hookpoint) where the file has several.

    Raises ``UserError`` for files that are damaged or of something else (with the line), for several SAEs in one file
    and none named, and for one that holds no explanation.
    """
    at = Path(path)
    with reading(at):
        folder = at.is_dir()
        inner = sorted(child.name for child in at.iterdir()) if folder else []
    if folder and at.name == "explanations" and any(_LATENT.match(Path(name).stem) for name in inner):
        at, inner = at.parent, ["explanations"]
    if folder and "explanations" in inner and (at / "explanations").is_dir() and not _exports(at / "explanations"):
        return _read_delphi(at, source)
    if folder and not (files := _exports(at)):
        raise UserError(
            f"{path} is no folder of explanations: expected Neuronpedia's batches (.jsonl, .jsonl.gz) or delphi's "
            f"explanations/HOOKPOINT_latentN.txt, found {', '.join(map(visible, inner[:5])) or 'nothing'}"
        )
    return _read_neuronpedia(files if folder else [at], str(path), source)


def _exports(folder: Path) -> list[Path]:
    with reading(folder):
        return sorted(one for one in folder.iterdir() if one.name.endswith((".jsonl", ".jsonl.gz")))


def _read_neuronpedia(files: Sequence[Path], name: str, source: str | None) -> OtherLabels:
    found: dict[str, list[tuple[int, str, str, str]]] = {}
    for file in files:
        for line, row in _rows(file):
            where = f"{file}, line {line}"
            if not isinstance(row, Mapping):
                raise UserError(f"{where}: {kind_of(row)} where an explanation (an object) was expected")
            if row.get("index") is None or "description" not in row:
                keys = ", ".join(visible(key) for key in list(row)[:8])
                raise UserError(f'{where}: not of Neuronpedia: it needs "index" and "description", has {keys}')
            latent = _whole(row["index"], where)
            text = _text(row, "description", where)
            author, model = _text(row, "explanationModelName", where), _text(row, "modelId", where)
            found.setdefault(_text(row, "layer", where), []).append((latent, text, author, model))
    rows = _one(found, name, source)
    authors = sorted({author for _, _, author, _ in rows if author})
    writer = (", ".join(authors[:3]) + (" and others" if len(authors) > 3 else "")) or "Neuronpedia"
    labels, repeated = _labels([(latent, text) for latent, text, _, _ in rows], writer)
    chosen = next(key for key, value in found.items() if value is rows)
    return OtherLabels(format="neuronpedia", labels=labels, model=rows[0][3], source=chosen, repeated=repeated)


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    text = read_text(file)
    return csv_records(text, file) if file.name.endswith((".csv", ".csv.gz")) else json_records(text, file)


def _read_delphi(folder: Path, source: str | None) -> OtherLabels:
    found: dict[str, list[tuple[int, str]]] = {}
    for place, latent, file in _of_latents(folder / "explanations"):
        text = parse_json(read_text(file), file)
        if not isinstance(text, str):
            raise UserError(f"{file} holds {kind_of(text)} where delphi's explanation (a JSON string) was expected")
        found.setdefault(place, []).append((latent, text))
    rows = _one(found, str(folder), source)
    place = next(key for key, value in found.items() if value is rows)
    settings = folder / "run_config.json"
    known = parse_json(read_text(settings), settings) if settings.is_file() else {}
    known = known if isinstance(known, dict) else {}
    labels, repeated = _labels(sorted(rows), str(known.get("explainer_model") or "delphi"))
    scores = []
    for kind, ours in _SCORES.items():
        each = [_delphi_score(latent, file) for p, latent, file in _of_latents(folder / "scores" / kind) if p == place]
        if each:
            read = tuple(score for score, _ in each)
            unread = sum(missing for _, missing in each)
            scores.append(LabelScores(kind=ours, writer=labels.writer, prompt="delphi", scores=read, unread=unread))
    return OtherLabels(
        format="delphi", labels=labels, model=str(known.get("model") or ""), source=place, repeated=repeated,
        scores=tuple(scores),
    )  # fmt: skip


def _of_latents(folder: Path) -> list[tuple[str, int, Path]]:
    """(hookpoint, latent, file), by latent."""
    if not folder.is_dir():
        return []
    with reading(folder):
        files = sorted(folder.glob("*.txt"))
    told = [(_LATENT.match(file.stem), file) for file in files]
    return sorted((named[1], int(named[2]), file) for named, file in told if named)


def _delphi_score(latent: int, file: Path) -> tuple[LabelScore, int]:
    """The score of a latent, and how many texts have no answer."""
    rows = parse_json(read_text(file), file, nan=True)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "activating" in row for row in rows):
        raise UserError(f'{file} holds no scores of delphi: expected a list of objects with "activating"')
    answers = [(row.get("prediction"), bool(row["activating"])) for row in rows]
    read = [(bool(said), truth) for said, truth in answers if isinstance(said, bool | int | float)]
    found = scored(latent, [said for said, _ in read], [truth for _, truth in read])
    return found, len(answers) - len(read)


def _one(found: dict[str, list[Any]], name: str, source: str | None) -> list[Any]:
    """The explanations of one SAE."""
    if not found:
        raise UserError(f"{name} holds no explanations of latents")
    listed = ", ".join(repr(short(key)) for key in list(found)[:5])
    if source is not None:
        if source not in found:
            raise UserError(f"{name} holds nothing of {source!r}: it has {listed}")
        return found[source]
    if len(found) > 1:
        raise UserError(f"{name} holds explanations of {len(found)} SAEs ({listed}): name one of them (source)")
    return next(iter(found.values()))


def _labels(rows: Sequence[tuple[int, str]], writer: str) -> tuple[Labels, int]:
    first: dict[int, str] = {}
    for latent, text in rows:
        first.setdefault(latent, text)
    some = tuple(Label(latent=latent, label=text) for latent, text in sorted(first.items()))
    nothing = sum(not one.label for one in some)
    labels = Labels(writer=writer, based="file", prompts={}, labels=some, unread=0, nothing=nothing)
    return labels, len(rows) - len(first)


def _whole(value: Any, where: str) -> int:
    """Neuronpedia writes indices as strings."""
    text = str(value).strip()
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,10}", text, re.ASCII) or int(text) >= _MOST:
        raise UserError(f"{where}: the index is {short(text)!r}, expected the number of a latent")
    return int(text)


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if value is not None and not isinstance(value, str | int):
        raise UserError(f"{where}: {key} is {kind_of(value)}, expected a text")
    return "" if value is None else str(value).strip()


def write_neuronpedia(
    table: Explanations, labels: Labels | None, path: str | Path, *, model: str = "", source: str = ""
) -> int:
    """Write explanations as records of Neuronpedia's export (.jsonl, .jsonl.gz or .csv), and say how many.

    Every latent has one for its words; those that have a label have another. ``model`` and ``source`` are Neuronpedia's
    ids of model and SAE (by default the model's name and the SAE's site). Raises ``UserError`` for another ending.
    """
    at = Path(path)
    packed = at.name.endswith(".gz")
    ending = at.name.removesuffix(".gz").rpartition(".")[2]
    if ending not in ("jsonl", "csv"):
        raise UserError(f"{path}: Neuronpedia's files end in .jsonl, .jsonl.gz or .csv")
    named = {one.latent: one.label for one in labels.labels if one.label} if labels is not None else {}
    rows = []
    for latent in range(len(table)):
        facts = {"modelId": model or table.model, "layer": source or table.site, "index": str(latent)}
        if latent in named and labels is not None:
            own = {"explanationModelName": labels.writer, "typeName": "jaxsteer_label"}
            rows.append(facts | {"description": named[latent]} | own)
        words = ", ".join(table.of(latent, WORDS))
        rows.append(facts | {"description": words, "explanationModelName": "jaxsteer", "typeName": WORDS_TYPE})
    text = io.StringIO(newline="")
    if ending == "csv":
        sheet = csv.DictWriter(text, list(rows[0]))
        sheet.writeheader()
        sheet.writerows(rows)
    else:
        text.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data = text.getvalue().encode("utf-8")
    write_bytes(at, gzip.compress(data, mtime=0) if packed else data)
    return len(rows)


def write_delphi(table: Explanations, labels: Labels | None, folder: str | Path, *, hookpoint: str = "") -> int:
    """Write explanations as delphi's folder and say how many: a latent's label, or its words where it has none.

    ``hookpoint`` is delphi's name of the site (by default "layers.N" for what leaves block N, else the site's own).
    Raises ``UserError`` for a folder that is not empty.
    """
    at = Path(folder)
    if at.exists() and any(at.iterdir()):
        raise UserError(f"{folder} is not empty: give a new folder")
    site = parse_site(table.site)
    usual = f"layers.{site.layer}" if site.kind == "hook_resid_post" else site.name
    place = (hookpoint or usual).replace("/", "--")
    inside = make_directory(at / "explanations")
    named = {one.latent: one.label for one in labels.labels if one.label} if labels is not None else {}
    for latent in range(len(table)):
        text = named.get(latent) or ", ".join(table.of(latent, WORDS))
        write_text(inside / f"{place}_latent{latent}.txt", json.dumps(text, ensure_ascii=False))
    return len(table)
