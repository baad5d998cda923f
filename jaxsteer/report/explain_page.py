"""The index page of an SAE's explanations: every latent in one table with search and sort, as one self-contained file.

All latents lie in the page as one compact JSON; a script draws rows as they are scrolled to, so that a page of 65,536
latents opens and answers at once. Without a script the page still has the numbers and the latents that say most.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxsteer.display import visible
from jaxsteer.explain.pipeline import Explained, load_explained
from jaxsteer.report.axis_files import kind_of_run
from jaxsteer.report.run_files import read_object
from jaxsteer.report.templates import embedded, flat, template
from jaxsteer.runs.files import CONFIG

SHOWN = 8
"""Words of a latent in the table."""


def is_explained(directory: str | Path) -> bool:
    """Whether the directory is that of ``jaxsteer sae explain``."""
    return kind_of_run(Path(directory)) == "explain"


def render_explained(directory: str | Path) -> str:
    """The whole page as text. Raises ``UserError`` for a directory without a finished result."""
    return explained_page(load_explained(directory), read_object(Path(directory) / CONFIG) or {})


def explained_page(found: Explained, config: dict[str, Any] | None = None) -> str:
    """The page. Words and labels from files are escaped, by the template or (in the table) by the browser."""
    result, table = found.result, found.table
    return template("explain").render(
        title=visible(f"{result.latents:,} latents of {result.sae or 'an SAE'}"),
        result=result,
        scored={score.words: score for score in result.detection.scores} if result.detection else {},
        first=[(int(i), table.of(int(i), SHOWN)) for i in np.argsort(-table.information, kind="stable")[:20]],
        settings=flat(config or {}),
        environment=[],
        numbers=[],
        command=None,
        data=embedded(_data(found)),
    )


def _data(found: Explained) -> dict[str, Any]:
    """What the script reads: words in use; for every latent the numbers of its words, one after the other; nats; and
    where there are any, detection AUROC, labels and their scores. Numbers have as many digits as are shown."""
    table, result = found.table, found.result
    shown = table.words[:, :SHOWN]
    used, numbers = np.unique(shown, return_inverse=True)
    data: dict[str, Any] = {
        "k": int(shown.shape[1]),
        "words": [visible(table.vocabulary.words[i]) for i in used],
        "of": numbers.reshape(-1).tolist(),
        "nats": [round(float(value), 3) for value in table.information],
    }
    if result.detection is not None:
        each = result.detection.each
        data["auroc"] = [round(each[str(i)], 2) if str(i) in each else None for i in range(len(table))]
    if result.labels is not None:
        data["labels"] = {str(one.latent): visible(one.label) for one in result.labels.labels if one.label}
    scores: dict[str, list[Any]] = {}
    for place, kind in enumerate(("detection", "fuzzing")):
        for score in (s for scored in result.label_scores if scored.kind == kind for s in scored.scores):
            scores.setdefault(str(score.latent), [None] * 3)[place] = _short(score.accuracy)
    for told in result.simulation.scores if result.simulation is not None else ():
        scores.setdefault(str(told.latent), [None] * 3)[2] = _short(told.correlation)
    if scores:
        data["scores"] = scores
    return data


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
