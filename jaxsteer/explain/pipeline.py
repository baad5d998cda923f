"""``run``: from an SAE to explanations of all its latents, in one directory that can be resumed.

1. Words of every latent (``words``): seconds, without text.
2. Where texts are given: contexts (``contexts``), and how well words tell where latents fire (``detection``).
3. Where a writer is given: labels (``labels``), and how well they tell (``judged_detection``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsteer.errors import UserError, refuse_unknown
from jaxsteer.explain.contexts import Contexts, neighbours, read_contexts
from jaxsteer.explain.detection import DetectionResult, detect, firing_words
from jaxsteer.explain.explanations import BY_WRITER, Explanations, Found, digest_of, load_explanations
from jaxsteer.explain.judged_detection import LabelScores, judge_labels
from jaxsteer.explain.labels import Labels, write_labels
from jaxsteer.explain.options import ExplainOptions
from jaxsteer.explain.other_tools import OtherLabels
from jaxsteer.explain.result import Described, ExplainResult, WordUse, describe, word_use
from jaxsteer.explain.simulation import SimulationScores, simulate_labels, simulation_rows, token_values
from jaxsteer.explain.vocabulary import Vocabulary
from jaxsteer.explain.words import dot_words, explain_words
from jaxsteer.files import read_json
from jaxsteer.files.records import Record
from jaxsteer.models.model import Model
from jaxsteer.processes import is_first
from jaxsteer.ranges import check_ranges
from jaxsteer.runs.bars import progress_bar
from jaxsteer.runs.files import METRICS, write_json
from jaxsteer.runs.folder import opened
from jaxsteer.sae.dictionary import SAE
from jaxsteer.sae.loading import check_sae, require_same_model
from jaxsteer.sae.texts import Documents
from jaxsteer.writers.endpoint import Endpoint
from jaxsteer.writers.writer import Writer

log = logging.getLogger(__name__)

TABLE, DETECTED, LABELS, LOG = "explanations.safetensors", "detection.json", "labels.json", "replies.jsonl"


LABELLED = 100
"""Latents that a writer labels where none are named."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Explained:
    """Explanations of an SAE's latents: the table of words, and what was measured."""

    table: Explanations
    result: ExplainResult

    def find(self, query: str | Sequence[str], *, top: int = 20) -> list[Found]:
        """Latents by a writer's labels, by the classes of these, or by words.

        ``query`` is a text or several: "label:TEXT" takes latents whose label holds every word of TEXT, "class:NAME"
        those that were sorted into the class, both by the support of their label; everything else is words, as
        ``Explanations.find`` takes them. A latent that is found twice counts once. Raises ``UserError`` for words that
        are not in the vocabulary, a class that there is not, and labels where no writer gave any.
        """
        asked = [query] if isinstance(query, str) else list(query)
        said = [one for one in asked if one.startswith(BY_WRITER)]
        found: dict[int, Found] = {}
        for one in said:
            kind, _, text = one.partition(":")
            found |= {hit.latent: hit for hit in self._labelled(kind, text.strip().casefold())}
        words = [word for one in asked if one not in said for word in one.split()]
        if words or not said:
            found |= {hit.latent: hit for hit in self.table.find(words, top=top) if hit.latent not in found}
        return list(found.values())[:top]

    def _labelled(self, kind: str, text: str) -> list[Found]:
        labels = self.result.labels
        if labels is None:
            raise UserError(
                f"{kind}:{text} asks for labels, and these explanations have none: give `sae explain` a writer"
            )
        if kind == "class":
            refuse_unknown([text], [name.casefold() for name in labels.classes], "class", "labels: ")
            hits = [one for one in labels.labels if one.group.casefold() == text]
        else:
            parts = text.split()
            if not parts:
                raise UserError("label: stands without a text: expected label:TEXT, whose words the label should hold")
            hits = [one for one in labels.labels if all(part in one.label.casefold() for part in parts)]
        hits.sort(key=lambda one: (-(one.support or 0.0), one.latent))
        return [Found(one.latent, one.support or 0.0, self.table.of(one.latent)) for one in hits]

    def described(self, latent: int) -> Described:
        """All that is known of one latent. Raises ``UserError`` for one that there is not."""
        return describe(self.table, self.result, latent)

    def _repr_html_(self) -> str:
        return self.result._repr_html_()


def run(
    model: Model,
    sae: SAE,
    documents: Documents | None = None,
    *,
    name: str = "",
    vocabulary: Vocabulary | Sequence[str] | None = None,
    writer: Writer | None = None,
    given: OtherLabels | None = None,
    any_weights: bool = False,
    options: ExplainOptions | None = None,
    out: str | Path,
    say: Callable[[str], None] = log.info,
    **changed: Any,
) -> Explained:
    """Explain all latents of ``sae``.

    ``documents`` is text to test explanations on (``jaxsteer.sae.texts.documents_of``); ``vocabulary`` a list of words
    of one's own; ``writer`` whoever labels, and judges labels on text; ``given`` labels of another tool, which are then
    taken; ``name`` what the SAE is called; ``any_weights`` explains an SAE whose files name another model all the same.
    ``changed`` are fields of ``options``. The same call, cut off, goes on in the directory ``out``. Many parameters:
    all that may be brought.

    Raises ``UserError`` for options out of range, an SAE of another model, labels of other latents, words
    none of which the tokenizer can spell, labels or words from text where there is none, and a writer none of whose
    replies can be read.
    """
    refuse_unknown(changed, [f.name for f in dataclasses.fields(ExplainOptions)], "option of explain.run")
    chosen = dataclasses.replace(options or ExplainOptions(), **changed)
    check_ranges(chosen)
    check_sae(sae, model)
    require_same_model(sae, model, any_weights=any_weights)
    if documents is None and (chosen.words == "text" or (writer is not None and chosen.based != "words")):
        raise UserError("words or labels from text need text: give documents (--data FILE ...)")
    if chosen.simulation != "none" and (writer is None or documents is None):
        raise UserError("--simulation needs a writer and text: give --writer URL and --data FILE")
    wrong = [latent for latent in chosen.label if not 0 <= latent < sae.n_latents]
    if wrong:
        raise UserError(f"there is no latent {wrong[0]} to label: this SAE has the latents 0 to {sae.n_latents - 1}")
    if given is not None:
        given.check_sae(sae)
    own = None if vocabulary is None else _given(model, vocabulary)
    config = {
        "kind": "explain",
        "model": [model.name, model.fingerprint],
        "sae": [name, digest_of(sae)],
        "text": None if documents is None else _first_tokens(documents),
        "vocabulary": None if own is None else list(own.words),
        "writer": None if writer is None else _called(writer),
        **({} if given is None else {"given": _digest_of_labels(given)}),
        **dataclasses.asdict(chosen),
    }
    with opened(out, config, say) as folder:
        if folder.finished is not None:
            return load_explained(folder.path)
        folder.begin()
        asked = _Asked(documents=documents, vocabulary=own, writer=writer, given=given, options=chosen, name=name)
        found = _explained(model, sae, asked, folder.path)
        folder.finish(found.result)
        return found


def load_explained(folder: str | Path) -> Explained:
    """What is in a directory of ``jaxsteer sae explain``. Raises ``UserError`` where nothing was finished."""
    return Explained(table=load_explanations(Path(folder) / TABLE), result=ExplainResult.read(folder))


def load_findable(path: str | Path) -> Explained | Explanations:
    """A directory of ``jaxsteer sae explain``; or a table of words alone, in which nothing can be found by labels.
    Raises ``UserError`` as ``load_explained`` and ``load_explanations``."""
    path = Path(path)
    if not path.is_dir():
        return load_explanations(path)
    return load_explained(path) if (path / METRICS).is_file() else load_explanations(path / TABLE)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Asked:
    """What ``run`` was given, checked."""

    documents: Documents | None
    vocabulary: Vocabulary | None
    writer: Writer | None
    given: OtherLabels | None
    options: ExplainOptions
    name: str


def _explained(model: Model, sae: SAE, asked: _Asked, path: Path) -> Explained:
    """All stages; what an earlier call has finished is read."""
    documents, chosen, writer = asked.documents, asked.options, asked.writer
    seconds: dict[str, float] = {}
    begun = time.monotonic()
    if (path / TABLE).is_file():
        table = load_explanations(path / TABLE)
    else:
        with progress_bar("words", unit="latent") as advance:
            words = asked.vocabulary or _vocabulary(model, documents, chosen)
            seconds["vocabulary"] = round(time.monotonic() - begun, 2)
            begun = time.monotonic()
            table = explain_words(
                model, sae, words, top=chosen.top, side=chosen.side, posterior=chosen.posterior,
                temperature=chosen.temperature, name=asked.name,
            )  # fmt: skip
            advance(sae.n_latents)
        seconds["words"] = round(time.monotonic() - begun, 2)
        if is_first():
            table.save(path / TABLE)
    plain = dot_words(model, sae, table.vocabulary, top=table.words.shape[1], side=chosen.side)
    uses = [
        word_use("mutual information", table.words, table.vocabulary),
        word_use("dot product", plain, table.vocabulary),
    ]
    tested, contexts = None, None
    if documents is not None and (writer is not None or not (path / DETECTED).is_file()):
        begun = time.monotonic()
        with progress_bar("contexts", chosen.contexts, unit="text") as advance:
            contexts = read_contexts(model, sae, documents, count=chosen.contexts, width=chosen.width, progress=advance)
        seconds["contexts"] = round(time.monotonic() - begun, 2)
    if documents is not None:
        tested = _tested(sae, table, contexts, plain, chosen, path, seconds)
        uses.append(tested.use)
    labels, scores = _labelled(model, table, asked, contexts, path)
    simulated = _simulated(model, sae, labels, asked, contexts, path)
    result = ExplainResult.of(
        table,
        detection=None if tested is None else tested.detection,
        uses=tuple(uses),
        labels=labels,
        scores=scores,
        simulation=simulated,
        seconds=seconds,
    )
    return Explained(table=table, result=result)


def _vocabulary(model: Model, documents: Documents | None, chosen: ExplainOptions) -> Vocabulary:
    if chosen.words == "model":
        return Vocabulary.of_model(model, size=chosen.size)
    assert documents is not None
    texts = (model.tokenizer.decode(documents(i), skip_special_tokens=True) for i in range(chosen.contexts))
    return Vocabulary.of_text(model, texts, size=chosen.size)


def _given(model: Model, vocabulary: Vocabulary | Sequence[str]) -> Vocabulary:
    return vocabulary if isinstance(vocabulary, Vocabulary) else Vocabulary.of_words(model, vocabulary)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tested(Record):
    """What text says of the words."""

    detection: DetectionResult
    use: WordUse
    """Of the words at which latents fire most strongly."""


def _tested(
    sae: SAE,
    table: Explanations,
    contexts: Contexts | None,
    plain: np.ndarray,
    chosen: ExplainOptions,
    path: Path,
    seconds: dict[str, float],
) -> _Tested:
    if (path / DETECTED).is_file():
        return _Tested.from_json(read_json(path / DETECTED), str(path / DETECTED))
    assert contexts is not None
    begun = time.monotonic()
    with progress_bar("detection", unit="latent") as advance:
        found = detect(
            table, contexts, neighbours(sae, min(chosen.near, sae.n_latents - 1)), plain=plain, seed=chosen.seed,
            progress=advance,
        )  # fmt: skip
    seconds["detection"] = round(time.monotonic() - begun, 2)
    tested = _Tested(detection=found, use=_firing_use(contexts, table))
    write_json(path / DETECTED, tested.to_json())
    return tested


def _firing_use(contexts: Contexts, table: Explanations) -> WordUse:
    weights = firing_words(contexts, table.vocabulary, table.words.shape[1])
    order = np.argsort(-weights, axis=1, kind="stable")[:, : table.words.shape[1]]
    return word_use(
        "strongest tokens", np.where(np.take_along_axis(weights, order, 1) > 0, order, -1), table.vocabulary
    )


def _labelled(
    model: Model, table: Explanations, asked: _Asked, contexts: Contexts | None, path: Path
) -> tuple[Labels | None, tuple[LabelScores, ...]]:
    """Labels, those that were given or the writer's, and what the writer's answers to contexts say of them."""
    writer, chosen, given = asked.writer, asked.options, asked.given
    if writer is None:
        return (None, ()) if given is None else (given.labels, given.scores)
    latents = _chosen_latents(table, chosen)
    with progress_bar("labels", unit="reply") as advance:

        def tell(done: int, total: int) -> None:
            advance(done, total)

        if given is None:
            labels = write_labels(
                model, table, writer, latents, contexts=contexts, based=chosen.based, classes=chosen.classes,
                log=path / LOG, progress=tell,
            )  # fmt: skip
        else:
            labels = given.labels
        if is_first():
            write_json(path / LABELS, labels.to_json())
        judged = labels.only(latents)
        if contexts is None or not any(label.label for label in judged.labels):
            return labels, () if given is None else given.scores
        scores = tuple(
            judge_labels(model, judged, contexts, writer, kind=kind, seed=chosen.seed, log=path / LOG, progress=tell)
            for kind in ("detection", "fuzzing")
        )
    return labels, scores


def _chosen_latents(table: Explanations, chosen: ExplainOptions) -> list[int]:
    return list(chosen.label) or [int(i) for i in np.argsort(-table.information, kind="stable")[:LABELLED]]


def _simulated(
    model: Model, sae: SAE, labels: Labels | None, asked: _Asked, contexts: Contexts | None, path: Path
) -> SimulationScores | None:
    """What the writer makes of labels alone, where that was asked for and some latent has a label and a context."""
    writer, chosen = asked.writer, asked.options
    if writer is None or contexts is None or labels is None or chosen.simulation == "none":
        return None
    named = [one.latent for one in labels.labels if one.label and (not chosen.label or one.latent in chosen.label)]
    rows = simulation_rows(contexts, named[:LABELLED], seed=chosen.seed)
    if not rows:
        return None
    values = token_values(model, sae, contexts, rows)
    with progress_bar("simulation", unit="reply") as advance:
        return simulate_labels(
            model, labels, contexts, rows, values, writer, form=chosen.simulation, log=path / LOG,
            progress=lambda done, total: advance(done, total),
        )  # fmt: skip


def _first_tokens(documents: Documents) -> list[list[int]]:
    """What tells one text from another, for config.json."""
    return [list(map(int, documents(i)))[:16] for i in range(4)]


def _digest_of_labels(given: OtherLabels) -> str:
    """SHA-256 (16 hex digits) of labels that were given."""
    return hashlib.sha256(json.dumps(given.to_json()).encode()).hexdigest()[:16]


def _called(writer: Writer) -> list[str]:
    return [writer.url, writer.model] if isinstance(writer, Endpoint) else [type(writer).__name__, writer.name]
