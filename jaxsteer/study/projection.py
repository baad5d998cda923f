"""Replies of a file projected on vectors: how far each lies along them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxsteer.display import aligned
from jaxsteer.errors import UserError
from jaxsteer.files import write_text
from jaxsteer.models.model import Model
from jaxsteer.models.reading import direction_sites, read_rows
from jaxsteer.personas.dataset_files import place
from jaxsteer.personas.dataset_files import read_rows as file_rows
from jaxsteer.personas.passages import passage_of
from jaxsteer.personas.traits import Average, Rollout, read_masks
from jaxsteer.prompts import apply_template
from jaxsteer.runs.bars import progress_bar
from jaxsteer.steer.vectors import Vectors, check_vectors


def project_replies(
    model: Model, vectors: Vectors, replies: Sequence[Rollout], *, average: Average = "response_avg"
) -> Float[np.ndarray, "s n"]:
    """<r, v>/|v| of what is read of every reply, at every site of ``vectors``, in units of the stream.

    Raises ``UserError`` for vectors that do not fit the model, for a vector of zeros, and for a reply without tokens.
    """
    sites = direction_sites(model, vectors.sites)
    for site in vectors.sites:
        if not vectors.norm(site):
            raise UserError(f"the vector at {site} is zero: nothing lies along it. Choose other sites")
    units = np.stack([vectors.arrays[site] / vectors.norm(site) for site in vectors.sites]).astype(np.float64)
    rows, masks = read_masks(model, replies, average)
    found = np.zeros((len(sites), len(rows)))
    done = 0
    with progress_bar("reading replies", len(rows), unit="reply") as advance:
        for chunk, states in read_rows(model, rows, masks, sites):
            found[:, chunk] = np.einsum("sbd,sd->sb", states.astype(np.float64), units)
            done += len(chunk)
            advance(done)
    return found


def project_file(
    model: Model,
    vectors: Vectors,
    path: Path,
    out: Path,
    *,
    average: Average = "response_avg",
    any_weights: bool = False,
) -> str:
    """Project the replies of a file, write its rows with a column for each site, and return a table of the means.

    A row has a prompt, as rendered text ("prompt") or to be asked through the chat template ("question"), and an
    "answer" ("response", "completion"); or "messages" that end with the assistant's. Raises ``UserError`` with the line
    for other rows.
    """
    check_vectors(vectors, model, any_weights=any_weights)
    rows = [*file_rows(path, ())]
    if not rows:
        raise UserError(f"{path} holds no reply: expected one in each row")
    found = project_replies(model, vectors, [_reply(model, path, line, row) for line, row in rows], average=average)
    names = [f"{average} {site}" for site in vectors.sites]
    text = io.StringIO()
    columns = list(dict.fromkeys(str(name) for _, row in rows for name in row))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, *names])
    for (_, row), values in zip(rows, found.T, strict=True):
        writer.writerow([*(row.get(name) for name in columns), *(f"{value:.6g}" for value in values)])
    write_text(out, text.getvalue())
    lines = [(site, f"{row.mean():.4g}", f"{row.std():.4g}") for site, row in zip(vectors.sites, found, strict=True)]
    note = f"{len(rows)} replies, {average}; projection on the unit vector, in units of the stream. {vectors.sign}"
    return aligned([("site", "mean", "standard deviation"), *lines], note=note)


def _reply(model: Model, path: Path, line: int, row: dict[str, Any]) -> Rollout:
    passage = passage_of(path, line, row)
    if not passage.messages:
        if not passage.prompt:
            raise UserError(f"{place(path, line)}: a text alone is no reply: expected what stands before it as prompt")
        return Rollout(id=passage.id, question=passage.prompt, prompt=passage.prompt, answer=passage.text)
    *before, last = [dict(message) for message in passage.messages]
    if not before or last["role"] != "assistant":
        raise UserError(f"{place(path, line)}: messages must end with the assistant's, behind at least one other")
    prompt = apply_template(model.tokenizer, before)
    return Rollout(id=passage.id, question=before[-1]["content"], prompt=prompt, answer=last["content"])
