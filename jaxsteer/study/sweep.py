"""``sweep``: layers x coefficients of a persona's direction, with what each setting costs on neutral text.

Train questions make the direction, validation questions the sweep and the choice of a setting, test questions the
figures of that setting. One program serves all layers, coefficients and control directions.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.evals.choice import choice_eval, distinct, first_rows, rate
from jaxsteer.evals.free_answers import WrittenResult, written_rates
from jaxsteer.evals.neutral_texts import neutral_texts
from jaxsteer.evals.side_effects import side_effects
from jaxsteer.files import append_text, read_log, read_text
from jaxsteer.models.model import Model
from jaxsteer.models.padding import pad_rows
from jaxsteer.models.sites import resid_site
from jaxsteer.personas import (
    Direction,
    Item,
    Persona,
    check_cues,
    contrast_pairs,
    load_direction,
    load_persona,
    mean_difference,
    number_of_questions,
    random_direction,
    save_direction,
    split,
)
from jaxsteer.personas.written_persona import ready
from jaxsteer.prompts import Placement, encode_texts, question_conversation, render
from jaxsteer.ranges import CountFrom0, Positive, Range, Seed, check_ranges
from jaxsteer.runs import files
from jaxsteer.runs.bars import load, progress_bar
from jaxsteer.runs.folder import RunFolder, opened
from jaxsteer.steer import Edit, Vectors, add, mean_norms, save_vectors
from jaxsteer.study.free_replies import TEST_REPLIES, VALIDATION_REPLIES, FreeReplies, free_replies
from jaxsteer.study.objective_stage import Say
from jaxsteer.study.outcome import environment
from jaxsteer.study.probing import DIRECTION_ITEMS
from jaxsteer.study.results import Timing
from jaxsteer.study.selection import best_rate, by_replies
from jaxsteer.study.setting import context_items
from jaxsteer.study.sweep_result import PERSONA, ChosenSetting, Sweep, SweepRow, Unsteered

log = logging.getLogger(__name__)

ROWS_FILE, TABLE_FILE, STEERING = "sweep.jsonl", "sweep.csv", "steering.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Which settings to try, and on what."""

    out: Path
    """Directory of the results. A sweep that was cut off there goes on; a finished one is kept."""
    model: str = "organism:llama"
    """organism:llama, a converted checkpoint, a Hugging Face directory, a .gguf file, or a hub id."""
    persona: str = "sycophancy"
    """Built-in name, a public dataset (`jaxsteer data list`) or the path of a dataset."""
    direction: Path | None = None
    """direction.safetensors of a run, with a vector at the stream after every layer that is swept. By default the
    difference of means over train questions is made here."""
    read_position: Literal["published", "matched", "decision"] = "decision"
    """Where such a direction is read (decision needs cue sentences)."""
    layers: tuple[Annotated[int, Range(0)], ...] = ()
    """Blocks after which to steer, counted from 0 (default: every block)."""
    coefficients: tuple[float, ...] = (-1.0, -0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5, 1.0)
    """In units of the mean norm of the stream at the site. Positive leads away from the persona."""
    positions: Literal["all", "prompt", "last", "response", "last_and_response"] = "all"
    """Tokens to steer: all but the first, the prompt's, its last one, the response's, or the last two together."""
    controls: CountFrom0 = 1
    """Random directions of the same norms, as a control."""
    style: Literal["chat", "plain"] = "chat"
    """Chat template of the model, or plain text."""
    questions: int = 48
    """Validation questions of the sweep, each in both choice orders."""
    neutral: Path | None = None
    """Text file, one request per line, to measure side effects on (default: 32 everyday requests; on an organism,
    sentences of its own world)."""
    max_kl: Positive = 0.5
    """A setting is only chosen if its divergence on neutral text stays below this, in nats per token."""
    seed: Seed = 0
    """Seed of the control directions."""
    split_seed: Seed = 0
    """Seed of the division into train, validation and test questions."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights; by default float32 on CPU and the checkpoint's own elsewhere."""
    quiet: bool = False
    """No progress bars."""

    def record(self) -> dict[str, Any]:
        """What config.json keeps: everything that decides the result, and no place of this machine."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("out", "quiet")}
        return fields | {k: v.name for k, v in fields.items() if isinstance(v, Path)}


def sweep(options: SweepOptions, *, model: Model | None = None, say: Say = log.info) -> Sweep:
    """Measure every layer and coefficient; write the rows as they come and the result into metrics.json.

    A row holds the persona rate on validation questions with its controls, KL to the unedited model and perplexity on
    neutral text, and where answers are replies the rate of free ones. The row with the best rate for the persona's goal
    (``choose``) is measured on test questions and written as ``STEERING``. Raises ``UserError`` before any expensive
    work for options that cannot work.
    """
    _check(options)
    persona = load_persona(options.persona)
    if options.direction is None:
        check_cues(persona, options.read_position)
    texts = read_requests(options.neutral) if options.neutral else None
    config = {"data_hash": persona.data_hash, **options.record(), "kind": "sweep"}
    with opened(options.out, config, say) as folder:
        if folder.finished is not None:
            return Sweep.from_json(folder.finished, str(folder.path / files.METRICS))
        result = _measure(options, folder, persona, texts, model, say)
        files.write_text(options.out / TABLE_FILE, result.csv())
        folder.finish(result)
    return result


def _measure(
    options: SweepOptions,
    folder: RunFolder,
    persona: Persona,
    texts: Sequence[str] | None,
    model: Model | None,
    say: Say,
) -> Sweep:
    started = time.perf_counter()
    model = model or load(options.model, quiet=options.quiet, dtype=options.dtype)
    persona = ready(model, persona, None, folder.path, say, quiet=options.quiet)
    n_layers = model.config.n_layers
    layers = options.layers or tuple(range(n_layers))
    if not all(0 <= layer < n_layers for layer in layers):
        raise UserError(f"--layers {' '.join(map(str, layers))}: {model.name} has layers 0 to {n_layers - 1}.")
    neutral = _encode(model, texts or neutral_texts(model), Placement(style=options.style))
    splits = split(persona, seed=options.split_seed)
    with progress_bar("directions", quiet=options.quiet):
        directions = _directions(options, model, persona, splits.train, layers)
    folder.begin()
    save_direction(directions[PERSONA], options.out / files.DIRECTION)

    items = context_items(distinct(splits.validation), options.questions)
    with progress_bar("without steering", quiet=options.quiet) as advance:
        (baseline,) = choice_eval(model, items, [""], placement=Placement(style=options.style), progress=advance)
    with progress_bar("neutral replies", quiet=options.quiet):
        free = free_replies(model, splits.train, splits.validation)
        said = _said(options, model, free, items[:VALIDATION_REPLIES], None)
    rows = _known_rows(options.out / ROWS_FILE)
    say(
        f"Sweep: {len(layers)} layers x {len(options.coefficients)} coefficients x {len(directions)} directions on "
        f"{number_of_questions(items)} questions{' in both choice orders' * (free is None)} and {len(neutral)} neutral "
        "texts"
    )
    files.write_lines(options.out / ROWS_FILE, map(_line, rows.items()))  # without a line that was cut
    with progress_bar("sweep", len(layers), unit="layer", quiet=options.quiet) as advance:
        advance(len(rows))
        for layer in layers:
            if layer in rows:
                continue
            found = _layer_rows(options, model, directions, layer, items, neutral, baseline)
            rows[layer] = _with_replies(options, model, directions, found, items, free, said)
            append_text(options.out / ROWS_FILE, files.line(_line((layer, rows[layer]))))
            advance(len(rows))
    table = tuple(row for layer in layers for row in rows[layer])
    chosen = choose(table, options.max_kl, persona.goal)
    with progress_bar("test questions", quiet=options.quiet):
        tested = None if chosen is None else _on_test(options, model, directions, chosen, splits.test, free)
    if chosen is not None:
        save_vectors(steering_of(directions[PERSONA], chosen, options.positions), options.out / STEERING)
    return Sweep(
        model=model.name,
        fingerprint=model.fingerprint,
        persona=persona.name,
        goal=None if persona.goal == "reduce" else persona.goal,
        direction=directions[PERSONA].metadata,
        baseline=Unsteered(validation=rate(baseline), perplexity=table[0].baseline_perplexity),
        rows=table,
        chosen=tested,
        max_kl=options.max_kl,
        neutral_tokens=sum(map(len, neutral)),
        timing=Timing(sweep_s=time.perf_counter() - started),
        environment=environment(model),
    )


def _check(options: SweepOptions) -> None:
    check_ranges(options)
    if not options.coefficients:
        raise UserError("--coefficients names no value: give at least one")
    for name in ("coefficients", "layers"):
        values = getattr(options, name)
        if len(set(values)) < len(values):
            raise UserError(f"--{name} names a value twice: {' '.join(map(str, values))}")


def stream_norms(model: Model, texts: Path | None = None, *, placement: Placement) -> dict[str, float]:
    """Mean norm of the stream after every block on the lines of a file, or on neutral texts: by site."""
    encoded = _encode(model, read_requests(texts) if texts else neutral_texts(model), placement)
    tokens, mask = pad_rows(encoded)
    return mean_norms(model, tokens, [resid_site(layer) for layer in range(model.config.n_layers)], mask)


def read_requests(path: Path) -> tuple[str, ...]:
    """The lines of a text file, one request each. Raises ``UserError`` for a file without any."""
    texts = tuple(line.strip() for line in read_text(path).split("\n") if line.strip())
    if not texts:
        raise UserError(f"{path} is empty: expected one request per line.")
    return texts


def _encode(model: Model, texts: Sequence[str], placement: Placement) -> list[np.ndarray]:
    if model.tokenizer is None:
        raise UserError(f"model {model.name} has no tokenizer.json: texts need the tokenizer beside the weights")
    rendered = [render(model.tokenizer, question_conversation(text, placement), "") for text in texts]
    return [np.asarray(ids, np.int32) for ids in encode_texts(model.tokenizer, rendered, style=placement.style)]


def _directions(
    options: SweepOptions, model: Model, persona: Persona, train: Sequence[Any], layers: Sequence[int]
) -> dict[str, Direction]:
    """The persona's direction and the random ones, with a vector and a norm at every layer."""
    sites = [resid_site(layer) for layer in layers]
    if options.direction is not None:
        direction = load_direction(options.direction, model=model)
        missing = [s for s in sites if s not in direction.delta or s not in direction.mean_resid_norm]
        if missing:
            raise UserError(
                f"{options.direction} has no vector with a mean norm at {missing[0]}"
                + (f" and {len(missing) - 1} other sites" if len(missing) > 1 else "")
                + f". It has: {', '.join(direction.sites)}. Choose among these with --layers."
            )
    else:
        pairs = contrast_pairs(
            model,
            persona,
            context_items(train, DIRECTION_ITEMS),
            options.read_position,
            placement=Placement(style=options.style),
            split_seed=options.split_seed,
        )
        direction = mean_difference(model, pairs, sites)
    rng = np.random.default_rng([options.seed, 2])
    seeds = rng.integers(2**31, size=options.controls)
    randoms = {f"random {i}": random_direction(direction, int(seed)) for i, seed in enumerate(seeds)}
    return {PERSONA: direction, **randoms}


def _edit(options: SweepOptions, direction: Direction, layer: int, coefficient: float) -> Edit:
    site = resid_site(layer)
    norm = direction.mean_resid_norm[site]
    return add(site, direction.delta[site], coefficient, mean_norm=norm, positions=options.positions)


def _layer_rows(
    options: SweepOptions,
    model: Model,
    directions: dict[str, Direction],
    layer: int,
    items: Sequence[Any],
    neutral: Sequence[np.ndarray],
    baseline: Any,
) -> tuple[SweepRow, ...]:
    """All coefficients of all directions at one layer, in one program that every layer shares."""
    cells = [(name, coefficient) for name in directions for coefficient in options.coefficients]
    edits = [_edit(options, directions[name], layer, coefficient) for name, coefficient in cells]
    results = choice_eval(model, items, [""], placement=Placement(style=options.style), variants=edits)
    effects = side_effects(model, neutral, edits)
    rows = []
    for (name, coefficient), result, kl, perplexity in zip(cells, results, effects.kl, effects.perplexity, strict=True):
        found = rate(result, baseline)
        rows.append(
            SweepRow(
                direction=name,
                layer=layer,
                site=resid_site(layer),
                coefficient=coefficient,
                rate=found.rate,
                ci95=found.ci95,
                n=found.n,
                a_rate=found.a_rate,
                letter_collapse=found.letter_collapse,
                probability=found.probability,
                kl=float(kl),
                perplexity=float(perplexity),
                baseline_perplexity=effects.baseline_perplexity,
            )
        )
    return tuple(rows)


def _said(
    options: SweepOptions, model: Model, free: FreeReplies | None, items: Sequence[Item], edit: Edit | None
) -> WrittenResult | None:
    """What the model writes freely, where answers are replies."""
    if free is None:
        return None
    return free.written(model, items, [""], placement=Placement(style=options.style), edits=edit)[0]


def _with_replies(
    options: SweepOptions,
    model: Model,
    directions: dict[str, Direction],
    rows: Sequence[SweepRow],
    items: Sequence[Item],
    free: FreeReplies | None,
    before: WrittenResult | None,
) -> tuple[SweepRow, ...]:
    """The rows with free replies, where answers are replies and a row may be chosen."""
    found = []
    for row in rows:
        if row.direction == PERSONA and row.kl <= options.max_kl:
            edit = _edit(options, directions[PERSONA], row.layer, row.coefficient)
            if (said := _said(options, model, free, items[:VALIDATION_REPLIES], edit)) is not None:
                row = dataclasses.replace(row, replies=written_rates(said, None, before))
        found.append(row)
    return tuple(found)


def _line(layer_rows: tuple[int, Sequence[SweepRow]]) -> dict[str, Any]:
    """The line of a layer in ``ROWS_FILE``."""
    layer, rows = layer_rows
    return {"layer": layer, "rows": [row.to_json() for row in rows]}


def _known_rows(path: Path) -> dict[int, tuple[SweepRow, ...]]:
    """By layer, what a sweep of this version had measured when it was cut off; not a last line that was cut itself."""
    lines, cut = read_log(path) if path.is_file() else ([], False)
    if cut:
        log.warning("%s: a line was cut; that layer is measured again", path)
    known = {line["layer"]: tuple(SweepRow.from_json(row, str(path)) for row in line["rows"]) for line in lines}
    return {layer: rows for layer, rows in known.items() if all(row.n is not None for row in rows)}


def choose(rows: Sequence[SweepRow], max_kl: Positive, goal: str = "reduce") -> SweepRow | None:
    """The best setting of the persona's direction by ``best_rate``, equal rates settled by the lower KL.

    Where answers are replies, rates are those of free replies (``selection.by_replies``).
    None if all are too disturbing or a letter collapse.
    """
    usable = [row for row in rows if row.direction == PERSONA and row.kl <= max_kl and not row.letter_collapse]
    compared = by_replies(usable, [row.replies for row in usable], goal)
    return usable[best_rate(compared, [row.kl for row in usable], goal=goal)] if usable else None


def steering_of(direction: Direction, row: SweepRow, positions: str = "all") -> Vectors:
    """The setting of a row as vectors that steer as it did, without further options."""
    vectors = direction.vectors().at(row.site)
    return dataclasses.replace(
        vectors,
        coefficient=row.coefficient,
        coefficient_units="mean_resid_norm",
        positions=positions,
        metadata={**vectors.metadata, "site": row.site},
    )


def _on_test(
    options: SweepOptions,
    model: Model,
    directions: dict[str, Direction],
    row: SweepRow,
    test: Sequence[Any],
    free: FreeReplies | None,
) -> ChosenSetting:
    """The chosen setting and its random controls on test questions."""
    edits = [_edit(options, direction, row.layer, row.coefficient) for direction in directions.values()]
    items = distinct(test)
    (baseline,) = choice_eval(model, items, [""], placement=Placement(style=options.style))
    results = choice_eval(model, items, [""], placement=Placement(style=options.style), variants=edits)
    rates = {name: rate(result, baseline) for name, result in zip(directions, results, strict=True)}
    few = items[:TEST_REPLIES]
    said = [_said(options, model, free, few, edit) for edit in (None, *edits)]
    scored = [first_rows(result, len(few)) for result in (baseline, *results)]
    written = {
        name: written_rates(one, score, None if one is said[0] else said[0])
        for name, one, score in zip(("", *directions), said, scored, strict=True)
        if one is not None
    }
    return ChosenSetting(
        **{field.name: getattr(row, field.name) for field in dataclasses.fields(row)},
        test=rates.pop(PERSONA),
        test_baseline=rate(baseline),
        test_controls=rates,
        test_replies=written,
    )
