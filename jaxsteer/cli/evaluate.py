"""``jaxsteer eval``: what prompts and steering do to a persona's questions, and to everything else."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from jaxsteer.cli.steering import Steering
from jaxsteer.errors import UserError
from jaxsteer.study.files import document

if TYPE_CHECKING:
    from jaxsteer.evals.choice import ChoiceResult
    from jaxsteer.models.model import Model
    from jaxsteer.personas import Dataset, Item, OpenQuestion, Persona


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval(Steering):
    """Measure prompts, steering or both on a persona's questions: rate with interval, controls and flips."""

    prompts: Annotated[tuple[str, ...], arg(aliases=["-p"])] = ()
    """Prompt texts; the zero-shot baseline is always measured too."""
    soft: Path | None = None
    """Also measure this soft prompt (soft.safetensors of a run)."""
    from_run: Path | None = None
    """Measure the prompts of this run instead, with its model, persona, style and slot."""
    model: str = "organism:llama"
    """organism:llama, a converted checkpoint, a Hugging Face directory, or a hub id."""
    transfer: tuple[str, ...] = ()
    """Further models on which the same prompt texts are measured."""
    persona: str = "sycophancy"
    """Built-in name, a public dataset (NAME or NAME:PATH, see `jaxsteer data list`) or the path of a dataset."""
    split: Literal["train", "validation", "test", "all"] = "test"
    """Which questions."""
    questions: int | None = None
    """At most this many of them (default: all)."""
    style: Literal["chat", "plain"] = "chat"
    """Chat template of the model, or plain text."""
    slot: Literal["suffix", "prefix", "system"] = "suffix"
    """Where the prompt stands."""
    per_token: bool = False
    """Compare answers by their log-probability per token, which matters where they differ in length."""
    generate: bool = False
    """Also let the model answer freely, and read by rules what it chooses and argues for."""
    judge: str | None = None
    """Also let the model behind this OpenAI-compatible address score its free answers, e.g. http://127.0.0.1:8000/v1."""
    judge_model: str = ""
    """Name of the judge there (default: the first that it lists)."""
    side_effects: bool = False
    """Also measure what becomes of replies to neutral requests and, on an organism, of look-ups."""
    split_seed: int = 0
    """Seed of the division into train, validation and test questions."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Evaluate and print."""
        from jaxsteer.checkpoints.loading import load

        asked = self._from_run() if self.from_run is not None else self
        data = asked._data()
        if asked.transfer and (asked.steer is not None or asked.soft is not None):
            raise UserError("--transfer measures prompt texts on other models; vectors and soft prompts belong to one")
        if asked.questions is not None and asked.questions < 1:
            raise UserError(f"--questions must be at least 1, got {asked.questions}")
        found = [asked._measure(load(name, dtype=asked.dtype), data) for name in (asked.model, *asked.transfer)]
        if asked.json:
            print(document(found[0] | ({"transfer": found[1:]} if asked.transfer else {})))
        else:
            from jaxsteer.cli.evaluation_text import evaluation_text

            print("\n\n".join(evaluation_text(part) for part in found))
        return 0

    def _data(self) -> _Data:
        """The questions. Raises ``UserError`` before a model is loaded where there is nothing to do with them."""
        from jaxsteer.personas import load_dataset, load_persona, split
        from jaxsteer.personas.sources import find_source

        source = find_source(self.persona) or find_source(self.persona.partition(":")[0])
        if source is not None and source.kind == "open":
            if self.judge is None:
                raise UserError(f"{self.persona} has questions without answers: give --judge URL to score free answers")
            return _Data(dataset=load_dataset(self.persona))
        if not (self.prompts or self.steer or self.soft or self.generate or self.judge):
            raise UserError("nothing to measure: use --prompts TEXT ..., --from-run DIR, --soft FILE, or --steer FILE")
        from jaxsteer.evals.choice import distinct

        persona = load_persona(self.persona)
        items = persona.items if self.split == "all" else getattr(split(persona, seed=self.split_seed), self.split)
        return _Data(persona=persona, items=distinct(items)[: self.questions])

    def _measure(self, model: Model, data: _Data) -> dict[str, Any]:
        """Everything that was asked for, on one model."""
        from jaxsteer.prompts import Placement

        edits = self.edits(model)
        if self.soft is not None:
            from jaxsteer.prompts.soft import load_soft, with_soft

            model, text = with_soft(model, load_soft(self.soft), any_weights=self.any_weights)
            self = dataclasses.replace(self, prompts=(*self.prompts, text))
        split = self.split if data.persona is not None else "all"
        about = {"model": model.name, "persona": data.name, "split": split, "style": self.style, "slot": self.slot}
        # Beside the baseline, which is neither steered nor prompted: steering alone, and with every prompt.
        texts = self.prompts if edits is None else ("", *self.prompts)
        place: dict[str, Any] = {"placement": Placement(style=self.style, slot=self.slot)}
        rows = [{"prompt": text, "steered": edits is not None and i > 0} for i, text in enumerate(("", *texts))]
        scored = [] if data.persona is None else _choices(self, model, data, edits, texts, place, rows)
        if self.generate or self.judge:
            _free_answers(self, model, data, edits, texts, place, rows, scored)
        if self.side_effects:
            _side_effects(model, edits, texts, place, rows, [q.question for q in data.asked])
        return {**about, "questions": len(data.asked), "baseline": rows[0], "prompts": rows[1:]}

    def _from_run(self) -> Eval:
        from jaxsteer.report import read_run

        assert self.from_run is not None
        found = read_run(self.from_run)
        names = ("model", "persona", "style", "slot", "split_seed", "dtype")
        missing = [name for name in names if name not in found.config]
        if missing:
            raise UserError(f"{self.from_run}/config.json lacks {', '.join(missing)}: is it a run of jaxsteer search?")
        texts = tuple(prompt.text for prompt in found.result.prompts)
        settings = {name: found.config[name] for name in names}
        return dataclasses.replace(self, prompts=(*self.prompts, *texts), **settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Data:
    """The questions of one evaluation: a persona's, or questions that are to be answered freely."""

    persona: Persona | None = None
    items: tuple[Item, ...] = ()
    dataset: Dataset | None = None

    @property
    def name(self) -> str:
        return self.persona.name if self.persona else self.dataset.name if self.dataset else ""

    @property
    def asked(self) -> Sequence[Item | OpenQuestion]:
        return self.items or (self.dataset.questions if self.dataset else ())

    @property
    def behaviour(self) -> str:
        if self.persona is not None:
            return self.persona.behaviour or self.persona.name
        return self.dataset.source.behaviour if self.dataset and self.dataset.source else self.name


Rows = list[dict[str, Any]]


def _choices(
    asked: Eval, model: Model, data: _Data, edits: Any, texts: Sequence[str], place: dict[str, Any], rows: Rows
) -> list[ChoiceResult]:
    """Rates by log-probability; for questions with several right and wrong answers also MC1 and MC2."""
    from jaxsteer.evals.choice import choice_eval, rate
    from jaxsteer.evals.truthful import truthful_eval, truthful_rates

    def beside_baseline(evaluate: Any, on: Sequence[Any], **options: Any) -> list[Any]:
        (zero,) = evaluate(model, on, [""], **options)
        return [zero, *evaluate(model, on, texts, variants=() if edits is None else [edits], **options)]

    results = beside_baseline(choice_eval, data.items, per_token=asked.per_token, **place)
    for row, result in zip(rows, results, strict=True):
        row |= rate(result, None if result is results[0] else results[0]).to_json()
    assert data.persona is not None
    groups = {item.group for item in data.items}
    questions = [q for q in data.persona.questions if q.group in groups]
    if questions:
        truths = beside_baseline(truthful_eval, questions, **place)
        for row, truth in zip(rows, truths, strict=True):
            row["truthful"] = truthful_rates(truth, None if truth is truths[0] else truths[0]).to_json()
    return results


def _free_answers(
    asked: Eval,
    model: Model,
    data: _Data,
    edits: Any,
    texts: Sequence[str],
    place: dict[str, Any],
    rows: Rows,
    scored: Sequence[ChoiceResult],
) -> None:
    """What the model writes, read by rules, and by a judge if there is one."""
    from jaxsteer.evals.free_answers import ask, written_eval, written_rates
    from jaxsteer.writers.endpoint import Endpoint
    from jaxsteer.writers.judge import judge

    if data.persona is not None:
        reasons = data.persona.reasons
        results = written_eval(model, data.items, [""], reasons=reasons, **place)
        results += written_eval(model, data.items, texts, reasons=reasons, edits=edits, **place)
        for row, result, score in zip(rows, results, scored, strict=True):
            row["written"] = written_rates(result, score, None if result is results[0] else results[0]).to_json()
            row["answers"] = list(result.texts)
        questions, groups = _orders(data.items)
    else:
        questions, groups = [q.question for q in data.asked], [q.group for q in data.asked]
        answers = ask(model, questions, [""], max_new_tokens=OPEN_TOKENS, **place)
        answers += ask(model, questions, texts, max_new_tokens=OPEN_TOKENS, edits=edits, **place)
        for row, written in zip(rows, answers, strict=True):
            row["answers"] = list(written)
    if asked.judge is not None:
        endpoint = Endpoint(url=asked.judge, model=asked.judge_model).named()
        for row in rows:
            judged = judge(endpoint, data.behaviour, questions, row["answers"])
            row["judged"] = judged.rates(groups) | {"scores": judged.scores, "replies": list(judged.replies)}


OPEN_TOKENS = 128
"""Longest free answer to a question without choices."""


def _orders(items: Sequence[Item]) -> tuple[list[str], list[str]]:
    """Questions and groups as ``written_eval`` asks them."""
    from jaxsteer.personas import orders

    copies = [copy for item in items for copy in orders(item)]
    return [item.question for item in copies], [item.group for item in copies]


def _side_effects(
    model: Model, edits: Any, texts: Sequence[str], place: dict[str, Any], rows: Rows, questions: Sequence[str]
) -> None:
    """Replies to neutral requests, look-ups of the organisms, and how likely the prompts are as text."""
    from jaxsteer.checkpoints.loading import ORGANISM
    from jaxsteer.evals.fluency import prompt_perplexity
    from jaxsteer.evals.neutral_texts import neutral_texts
    from jaxsteer.evals.organism_lookups import lookup_accuracy
    from jaxsteer.evals.side_effects import reply_effects

    prompts = ["", *texts]
    neutral = neutral_texts(model)
    parts = [([""], None), (list(texts), edits)]
    effects = [reply_effects(model, neutral, some, edits=edit, **place) for some, edit in parts if some]
    lookups: list[dict[str, Any] | None] = [None] * len(prompts)
    if model.name.startswith(ORGANISM):
        lookups = [
            row.to_json() for some, edit in parts if some for row in lookup_accuracy(model, some, edits=edit, **place)
        ]
    perplexity = prompt_perplexity(model, prompts, questions[:8], **place)
    kl = [float(value) for effect in effects for value in effect.kl]
    replies = [float(value) for effect in effects for value in effect.perplexity]
    for i, row in enumerate(rows):
        row["side_effects"] = {
            "kl": kl[i],
            "reply_perplexity": replies[i],
            "reply_tokens": effects[0].tokens,
            "lookups": lookups[i],
            "prompt_perplexity": perplexity[i],
        }
