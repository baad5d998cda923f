"""``run``: from facts to a delta and how good it is, in one directory that can be resumed.

1. Facts that the model knows (``evaluation.known_facts``).
2. Covariances of keys (``covariance``), from the cache where they are known.
3. The wanted outputs (``values``) and the update (``editing``): values.safetensors, delta.safetensors.
4. The edit beside the model as it is, random changes, fine-tuning, context and steering (``evaluation``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jaxsteer.checkpoints.deltas import Delta
from jaxsteer.errors import UserError
from jaxsteer.files import read_tensors, tensor_bytes, write_bytes
from jaxsteer.models.model import Model
from jaxsteer.processes import is_first
from jaxsteer.ranges import check_ranges
from jaxsteer.rewrite.covariance import Covariance, CovarianceOptions, covariances, text_hash
from jaxsteer.rewrite.editing import EditOptions, Rewrite, edit, layers_of
from jaxsteer.rewrite.evaluation import NEUTRAL, MeasureOptions, known_facts, measure, outcomes_of
from jaxsteer.rewrite.facts import Fact, read_facts
from jaxsteer.rewrite.result import RewriteResult
from jaxsteer.rewrite.values import ValueOptions, Values
from jaxsteer.rewrite.variants import PLAIN, Variant, delta_variant, variants_of
from jaxsteer.runs.bars import load, progress_bar
from jaxsteer.runs.files import write_lines
from jaxsteer.runs.folder import opened

log = logging.getLogger(__name__)

DELTA, VALUES, FACTS = "delta.safetensors", "values.safetensors", "facts.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewriteOptions(MeasureOptions, ValueOptions, EditOptions, CovarianceOptions):
    """Everything that decides a rewriting but the model, the facts and the text."""

    limit: int | None = None
    """So many facts at most, the first ones that count."""
    all_facts: bool = False
    """Also facts whose true answers the model does not give."""

    def part(self, kind: type) -> dict:
        """The fields of one of the options that this is made of."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(kind)}


def run(
    model: str | Model,
    facts: str | Path | Sequence[Fact],
    data: Sequence[str | Path] = (),
    *,
    options: RewriteOptions = RewriteOptions(),
    neutral: Sequence[str] = NEUTRAL,
    out: str | Path,
    say: Callable[[str], None] = log.info,
) -> RewriteResult:
    """Rewrite ``facts`` (a file as ``read_facts`` takes it, or facts) in ``model`` and measure it.

    ``data`` are text files for the covariance of keys (an organism brings its own), ``neutral`` texts on which drift is
    measured. ``out`` gets facts.jsonl (those that were rewritten), values.safetensors, delta.safetensors (for
    ``jaxsteer.load(..., delta=)``) and metrics.json; the same call, cut off, goes on there.

    Raises ``UserError``, before any search, for facts that cannot be read or that the model knows none of, for blocks
    that do not fit, and for too little text.
    """
    check_ranges(options)
    given = read_facts(facts) if isinstance(facts, str | Path) else tuple(facts)
    config = {
        "kind": "rewrite",
        "model": model if isinstance(model, str) else [model.name, model.fingerprint],
        "facts": hashlib.sha256(json.dumps([one.to_json() for one in given]).encode()).hexdigest(),
        "data": [str(path) for path in data],
        "neutral": hashlib.sha256(json.dumps(list(neutral)).encode()).hexdigest(),
        **dataclasses.asdict(options),
    }
    with opened(out, config, say) as folder:
        if folder.finished is not None:
            return RewriteResult.read(folder.path)
        ready = load(model) if isinstance(model, str) else model
        layers = layers_of(ready, EditOptions(**options.part(EditOptions)))
        if options.tokens < ready.config.d_mlp and not options.ridge:
            raise UserError(
                f"--tokens {options.tokens:,} are fewer than the {ready.config.d_mlp:,} entries of a key, so that the "
                "covariance would have no inverse: ask for more, at best ten times as many, or give a ridge (--ridge)"
            )
        text_hash(ready, data, options.seed)  # files that are not there are told before work
        folder.begin()
        seconds: dict[str, float] = {}
        with _timed(seconds, "known facts"):
            known = given if options.all_facts else known_facts(ready, given)
        if not known:
            raise UserError(
                f"{ready.name} gives the true answer of none of the {len(given)} facts: give facts that it knows, or "
                "rewrite all the same (--all-facts)"
            )
        chosen = known[: options.limit]
        write_lines(folder.path / FACTS, [fact.to_json() for fact in chosen])
        with _timed(seconds, "covariances"), progress_bar("covariance", options.tokens, unit="tok") as advance:
            measured = covariances(
                ready, layers, data, options=CovarianceOptions(**options.part(CovarianceOptions)), progress=advance
            )
        for one in measured.values():
            say(one.table())
        with _timed(seconds, "editing"), progress_bar("seeking values"):
            made = _edited(ready, chosen, measured, options, folder.path, say)
        variants = variants_of(ready, made, seed=options.seed)
        with _timed(seconds, "measuring"):
            result = _measured(ready, chosen, variants, variants[1].name, made.delta, neutral, options, made)
        tokens = min(one.tokens for one in measured.values())
        result = dataclasses.replace(
            result, covariance_tokens=tokens, unknown=len(given) - len(known), seconds=seconds, layers=made.layers
        )
        folder.finish(result)
        return result


def evaluate(
    model: Model,
    facts: str | Path | Sequence[Fact],
    delta: Delta,
    *,
    neutral: Sequence[str] = NEUTRAL,
    options: MeasureOptions = MeasureOptions(),
) -> RewriteResult:
    """How well facts are rewritten by a delta of ``model``, beside the model as it is and the facts in the context.

    ``model`` is the one without the delta. Raises ``UserError`` for a delta of other weights.
    """
    delta.check(model.name, model.config, model.fingerprint)
    given = read_facts(facts) if isinstance(facts, str | Path) else tuple(facts)
    name = f"the delta ({delta.metadata.get('method', 'unknown')})"
    told = Variant(name="the fact in the context, each alone", told=True)
    variants = [PLAIN, delta_variant(model, dict(delta.factors), name), told]
    return _measured(model, given, variants, name, delta, neutral, options, None)


def _measured(
    model: Model,
    facts: Sequence[Fact],
    variants: Sequence[Variant],
    after: str,
    delta: Delta,
    neutral: Sequence[str],
    options: MeasureOptions,
    made: Rewrite | None,
) -> RewriteResult:
    part = MeasureOptions(write=options.write, seed=options.seed)
    with progress_bar("measuring", len(variants), unit="variant") as advance:
        rows, outcomes = measure(model, facts, variants, neutral=neutral, options=part, progress=advance)
    return RewriteResult(
        model=model.name,
        fingerprint=model.fingerprint,
        new_fingerprint=delta.new_fingerprint,
        method=delta.metadata.get("method", "unknown"),
        layers=tuple(delta.factors),
        unknown=0,
        rows=tuple(rows),
        facts=outcomes_of(facts, outcomes, after, made),
        neutral=len(neutral),
    )


@contextlib.contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[what] = round(time.monotonic() - began, 1)


def _edited(
    model: Model,
    facts: Sequence[Fact],
    measured: dict[int, Covariance],
    options: RewriteOptions,
    path: Path,
    say: Callable[[str], None],
) -> Rewrite:
    """The edit, with values that an earlier call found."""
    wanted = _read_values(path / VALUES) if (path / VALUES).is_file() else None
    made = edit(
        model, facts, measured, options=EditOptions(**options.part(EditOptions)),
        values=ValueOptions(**options.part(ValueOptions)), wanted=wanted,
        found=lambda values: _keep_values(values, path / VALUES), say=say,
    )  # fmt: skip
    if is_first():
        made.delta.save(path / DELTA)
    return made


def _keep_values(values: Values, path: Path) -> None:
    if is_first():
        write_bytes(
            path, tensor_bytes({field.name: getattr(values, field.name) for field in dataclasses.fields(values)})
        )


def _read_values(path: Path) -> Values:
    return Values(**read_tensors(path, "file of values")[0])
