"""Direct logit attribution: what every component of the network adds to a logit by itself, with the norm held.

The last stream is a sum of what the embedding, every attention and every MLP wrote, and behind it stands one norm. With
the scale of that norm as it is in the run (frozen), the logit of token v is linear in the parts:

    logit_v = sum over parts of (part / scale) * weight . U_v

An attention is the sum of its heads and an MLP that of its neurons; where a norm follows them (Gemma 2 and 3), its
scale is frozen too. In GPT-2 the embedding is that of token and position; the mean that the last norm takes away is
linear in the parts, its bias is a part of its own, and attention and MLP hold biases beside heads and neurons. Logits
are those *before* a soft-cap (Gemma 2), which is no sum. It is the direct path only: what a part does by way of later
layers counts as theirs. (Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.)

Letters: L layers, N query heads, R readings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from jaxsteer.errors import UserError
from jaxsteer.lens.attribution_result import LogitAttribution, summarised
from jaxsteer.lens.logit_parts import AVERAGE, NONE, Asked, Found, attribute_batch, best_token, mean_column
from jaxsteer.lens.texts import Text, first_token, known_tokens, row_mask, rows_of_texts
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.model import Model
from jaxsteer.models.reading import BATCH, batches
from jaxsteer.models.roles import Rendered
from jaxsteer.models.sharding import shard_rows
from jaxsteer.models.sites import parse_site, resid_site
from jaxsteer.models.taps import Intervention, checked
from jaxsteer.processes import to_host
from jaxsteer.ranges import CountFrom0, Seed, check_ranges
from jaxsteer.sae.dictionary import SAE
from jaxsteer.sae.loading import check_sae

MEAN = "mean"
"""In place of a token that another is compared with: the mean over the vocabulary."""
_HELD = 1 << 26
"""Numbers of neurons that are held at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attributed:
    """What is told of every reading, and how it is measured."""

    positions: Literal["last", "all"] = "last"
    """The last token of every text, or all that have a next one, whose logit is then attributed."""
    heads: bool = True
    """Every head by itself."""
    neurons: CountFrom0 = 10
    """The neurons that matter most in the mean over texts; 0 reads none."""
    latents: CountFrom0 = 10
    """Latents, likewise, where there is an SAE."""
    controls: CountFrom0 = 32
    """Random tokens of the vocabulary in the target's place (pairs of them, where two are compared)."""
    seed: Seed = 0
    """Of the random tokens."""
    batch: int = BATCH
    """Rows at once."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LogitParts:
    """The parts of the logit of every reading, float32; a reading is a token whose next one is asked for."""

    result: LogitAttribution
    """Means over texts with intervals, beside random tokens."""
    text: Int[np.ndarray, " R"]
    """Number of the text."""
    position: Int[np.ndarray, " R"]
    """Number of the token in the text."""
    target: Int[np.ndarray, " R"]
    """The token that is asked for."""
    logit: Float[np.ndarray, " R"]
    """Its logit before a soft-cap, minus that of the other token where two are compared."""
    embedding: Float[np.ndarray, " R"]
    attention: Float[np.ndarray, "R L"]
    mlp: Float[np.ndarray, "R L"]
    rest: Float[np.ndarray, " R"]
    """What is left of the logit: what edits of the stream added, and rounding in half precision."""
    stream: Float[np.ndarray, "R L"]
    """What all parts up to a block sum up to: the stream behind it, read with the last norm's scale."""
    heads: Float[np.ndarray, "R L N"] | None
    """They sum to ``attention`` (less ``attention_bias``), unless what attention writes is edited."""
    bias: Float[np.ndarray, " R"] | None
    """What the last norm's bias adds (GPT-2); None where it has none."""
    attention_bias: Float[np.ndarray, "R L"] | None
    """What the biases behind the heads add (GPT-2), a share of ``attention``."""


def attribute_logits(
    model: Model,
    texts: Sequence[Text],
    target: str | Sequence[str] | None = None,
    *,
    minus: str | Sequence[str] | None = None,
    sae: SAE | None = None,
    edits: Intervention | None = None,
    options: Attributed = Attributed(),
    progress: Callable[[int, int], None] | None = None,
) -> LogitParts:
    """What every part of the model adds to the logit of a token after each text, in one pass over the layers.

    Args:
        texts: plain texts or conversations.
        target: the token whose logit is attributed, as text (" Paris"; of several tokens the first counts), one for all
            or one for each text. By default the one that the model likes best, and at all positions the one that
            follows.
        minus: another one whose logit is subtracted, likewise; "mean" subtracts the mean over the vocabulary, which
            changes no probability.
        sae: also tells the latents of this one, which must read the stream of one layer and write it back.
        edits: the run is one with these. All of a plain text counts as prompt.
        progress: called with (texts done, of how many).

    Raises ``UserError`` for texts, tokens and edits that do not fit the model, a target at all positions, and an SAE
    elsewhere or one that normalises every row.
    """
    check_ranges(options)
    rows = rows_of_texts(model, texts)
    edits = checked(edits, model.config, None)
    layer = None if sae is None else _sae_layer(sae, model)
    batch = _batch_rows(model.config, options, max(len(row.ids) for row in rows))
    plus, against = _targets(model, rows, target, minus, edits, options)
    asked = _asked_batches(model, [row.ids for row in rows], plus, against, options, batch)
    found: list[tuple[np.ndarray, Asked, Found]] = []
    for chunk, one in asked:
        out = attribute_batch(
            model.params, model.config, one, edits, sae, heads=options.heads, neurons=options.neurons > 0, layer=layer
        )
        found.append((chunk, *to_host((one, out))))
        if progress is not None:
            progress(sum(len(numbers) for numbers, *_ in found), len(rows))
    words = _words(target, minus, options)
    site = "" if layer is None else resid_site(layer)
    about = {"model": model.name, "target": words, "site": site, "edits": "" if edits is None else edits.label}
    return _collected(found, options, softcap=model.config.final_softcap, **about)


def _collected(found: Sequence[tuple[np.ndarray, Asked, Found]], options: Attributed, **about: Any) -> LogitParts:
    """The readings of all batches in the order of the texts, and their means."""
    columns: dict[str, list[Any]] = {}
    for chunk, asked, out in found:
        row, at = np.nonzero(asked.weight > 0)
        one = {"text": chunk[row], "position": asked.index[row, at], "target": asked.plus[row, at, 0]}
        names = ("logit", "embedding", "attention", "mlp", "stream", "heads", "bias", "attention_bias")
        one |= {name: values[row, at] for name in names if (values := getattr(out, name)) is not None}
        for name, values in one.items():
            columns.setdefault(name, []).append(values)
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    order = np.lexsort((joined["position"], joined["text"]))
    joined = {name: values[order] for name, values in joined.items()}
    joined["rest"] = joined["logit"] - joined["embedding"] - joined["attention"].sum(1) - joined["mlp"].sum(1)
    joined["rest"] -= joined.get("bias", 0.0)
    sums = {name: np.sum([np.asarray(out.sums[name], np.float64) for *_, out in found], 0) for name in found[0][2].sums}
    result = summarised(joined, sums, options.neurons, options.latents, **about)
    some: dict[str, Any] = {name: joined.pop(name, None) for name in ("heads", "bias", "attention_bias")}
    return LogitParts(result=result, **some, **joined)


def _targets(
    model: Model,
    rows: Sequence[Rendered],
    target: str | Sequence[str] | None,
    minus: str | Sequence[str] | None,
    edits: Intervention | None,
    options: Attributed,
) -> tuple[list[np.ndarray], list[int]]:
    """Of every row the targets of its readings, and what they are compared with."""
    if options.positions == "all":
        if target is not None:
            raise UserError("at all positions the target is the token that follows: leave it out, or read the last one")
        if short := next((i for i, row in enumerate(rows, 1) if len(row.ids) < 2), None):
            raise UserError(f"text {short} has one token, which no other follows")
        plus = [row.ids[1:] for row in rows]
    elif target is None:
        plus = list(_likeliest(model, [row.ids for row in rows], edits, options.batch)[:, None])
    else:
        plus = [np.asarray([first_token(model, text)]) for text in _each(target, len(rows), "target")]
    if minus is None or minus == MEAN:
        return plus, [NONE if minus is None else AVERAGE] * len(rows)
    against = [first_token(model, text) for text in _each(minus, len(rows), "minus")]
    if same := next((i for i, (a, b) in enumerate(zip(plus, against, strict=True), 1) if (a == b).all()), None):
        token = model.tokenizer.decode([against[same - 1]])
        raise UserError(f"text {same}: the target and the token that is subtracted are the same one, {token!r}")
    return plus, against


def _each(given: str | Sequence[str], count: int, what: str) -> list[str]:
    if isinstance(given, str):
        return [given] * count
    if len(given) != count:
        raise UserError(f"{len(given)} texts were given as {what} of {count}: give one, or one for each")
    return list(given)


def _asked_batches(
    model: Model,
    rows: Sequence[np.ndarray],
    plus: Sequence[np.ndarray],
    minus: Sequence[int],
    options: Attributed,
    batch: int,
) -> Iterator[tuple[np.ndarray, Asked]]:
    """The rows of every batch with their readings, targets and random tokens, on the devices."""
    known = known_tokens(model)
    rng = np.random.default_rng([options.seed, 1])
    drawn = rng.choice(known, (2, min(options.controls, known // 2)), replace=False).astype(np.int32)
    mean = mean_column(model.params, known=known)
    for chunk, tokens in batches(model, rows, batch):
        reads = tokens.shape[1] if options.positions == "all" else 1
        index, weight = np.zeros((batch, reads), np.int32), np.zeros((batch, reads), np.float32)
        targets = np.zeros((batch, reads, 1 + drawn.shape[1]), np.int32)
        others = np.zeros_like(targets)
        targets[..., 1:] = drawn[0]
        for at, number in enumerate(chunk):
            count = len(plus[number])
            index[at, :count] = np.arange(count) if options.positions == "all" else len(rows[number]) - 1
            weight[at, :count], targets[at, :count, 0] = 1 / count, plus[number]
            others[at] = minus[number] if minus[number] < 0 else np.append(minus[number], drawn[1])
        place = partial(shard_rows, model.mesh)
        mask = row_mask(tokens, [rows[number] for number in chunk])
        placed = [place(array) for array in (tokens, mask, index, weight, targets, others)]
        yield chunk, Asked(*placed, mean)  # type: ignore[arg-type, call-arg]


def _batch_rows(config: ModelConfig, options: Attributed, longest: int) -> int:
    """Rows at once: fewer where the neurons of many readings are held."""
    if not options.neurons:
        return options.batch
    reads = longest if options.positions == "all" else 1
    return max(1, min(options.batch, _HELD // (2 * reads * config.n_layers * config.d_mlp)))


def _sae_layer(sae: SAE, model: Model) -> int:
    check_sae(sae, model, None)
    source = parse_site(sae.config.site_in or "", model.config.n_layers)
    target = parse_site(sae.config.site_out or source.name, model.config.n_layers)
    if source != target or source.kind != "hook_resid_post":
        raise UserError(
            f"latents' parts are told of an SAE that reads the stream after a block and writes it back, and this one "
            f"reads {source.name} and writes {target.name}"
        )
    if sae.config.input_norm != "none" and sae.config.restore_norm:
        raise UserError("this SAE normalises every row, so that its latents add no fixed vectors to the stream")
    return source.layer


def _words(target: str | Sequence[str] | None, minus: str | Sequence[str] | None, options: Attributed) -> str:
    """Whose logit, in words."""
    if target is None:
        words = "the token that follows" if options.positions == "all" else "the likeliest token"
    else:
        words = repr(target) if isinstance(target, str) else "each text's own token"
    if minus is None:
        return words
    other = "the mean over the vocabulary" if minus == MEAN else repr(minus) if isinstance(minus, str) else "its other"
    return f"{words} minus {other}"


def _likeliest(
    model: Model, rows: Sequence[np.ndarray], edits: Intervention | None, batch: int
) -> Int[np.ndarray, " n"]:
    """The token that the model likes best after each row."""
    found = np.zeros(len(rows), np.int32)
    for chunk, tokens in batches(model, rows, batch):
        mask = row_mask(tokens, [rows[number] for number in chunk])
        place = partial(shard_rows, model.mesh)
        best = best_token(model.params, model.config, place(tokens), place(mask), edits, known=known_tokens(model))
        found[chunk] = to_host(best)[: len(chunk)]
    return found
