"""Train a tuned lens on text, with the released settings or any Optax optimiser; resumable, and measured on held-out
texts beside the logit lens."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsteer.display import aligned, decimals
from jaxsteer.errors import UserError
from jaxsteer.files.npz import read_npz, write_npz
from jaxsteer.files.records import Record
from jaxsteer.lens.logit_lens import LensRows, read, step_of
from jaxsteer.lens.result import over_texts, spread, text_means
from jaxsteer.lens.tuned_lens import Translators, TunedLens, untrained
from jaxsteer.lens.tuned_lens_files import PARAMS, TRAINED, load_lens, save_lens
from jaxsteer.lens.tuning_steps import add_gradients, advance, no_sums
from jaxsteer.models.model import Model
from jaxsteer.models.sharding import put, shard_rows
from jaxsteer.processes import from_first, is_first, to_host
from jaxsteer.ranges import Interval, Large, Positive, Seed, Weight, check_ranges
from jaxsteer.runs.bars import progress_bar
from jaxsteer.runs.files import PROGRESS, append_line, resumed_lines, write_lines
from jaxsteer.runs.folder import RunFolder, opened
from jaxsteer.runs.result import Result
from jaxsteer.sae.harvest import rows_of
from jaxsteer.sae.texts import Documents

STATE = "state.npz"
"""What goes on a training that was cut off, in its directory."""
WARM_UP = 1000
"""Steps of Adam's warm-up, at most; a fifth of all, if that is less."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """How a lens is trained; the defaults are those of AlignmentResearch/tuned-lens."""

    steps: int = 250
    batch_tokens: Large = 1 << 18
    """Tokens of a step, at least."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """SGD with Nesterov momentum, or AMSGrad with a warm-up."""
    lr_scale: Positive = 1.0
    """Times 1 - momentum for SGD, times 0.001 for Adam; it falls linearly to 0."""
    momentum: Weight = 0.9
    weight_decay: Weight = 1e-3
    clip: Positive = 1.0
    """Largest norm of the gradient of all layers together."""
    context: int = 128
    """Tokens of a row; longer documents are cut into several."""
    rows: int = 16
    """Rows at once."""
    held: int = 32
    """Documents that are held out, for the comparison with the logit lens."""
    save_minutes: Positive = 5.0
    """Between two savings of the training."""
    seed: Seed = 0
    """Of the order of documents."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_ranges(self)
        if self.held < 2:
            raise UserError(f"--held must be at least 2, got {self.held}: an interval over texts needs two")

    def transformation(self) -> optax.GradientTransformation:
        """The optimiser."""
        if self.optimizer == "sgd":
            rate = optax.linear_schedule(self.lr_scale * (1 - self.momentum), 0.0, self.steps)
            moved = optax.sgd(rate, momentum=self.momentum, nesterov=True)
        else:
            warm = min(WARM_UP, self.steps // 5)
            most = 1e-3 * self.lr_scale
            rate = optax.join_schedules(
                [optax.linear_schedule(0.0, most, warm), optax.linear_schedule(most, 0.0, max(1, self.steps - warm))],
                [warm],
            )
            moved = optax.amsgrad(rate, b1=self.momentum)
        return optax.chain(optax.clip_by_global_norm(self.clip), optax.add_decayed_weights(self.weight_decay), moved)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKL(Record):
    """KL(output || lens) of one place on held-out texts, in the mean over texts; nats."""

    place: str
    logit: float
    tuned: float
    change: float
    """Tuned minus logit lens."""
    change_ci95: Interval | None = None
    """Over texts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunedResult(Result):
    """A trained lens on held-out texts, beside the logit lens."""

    model: str
    steps: int
    tokens: int
    """Tokens trained on."""
    texts: int
    """Held-out texts."""
    layers: tuple[LayerKL, ...]

    def to_rows(self) -> list[dict[str, Any]]:
        """One entry for every place."""
        return [one.to_json() for one in self.layers]

    def table(self) -> str:
        """KL of both lenses at every place."""
        rows = [
            [
                one.place,
                decimals(one.logit, 3),
                decimals(one.tuned, 3),
                decimals(one.change, 3),
                spread(one.change_ci95),
            ]
            for one in self.layers
        ]
        note = (
            f"KL to the output of {self.model}, nats, on {self.texts} texts that were held out; {self.steps} steps on "
            f"{self.tokens:,} tokens."
        )
        return aligned([["place", "logit lens", "tuned lens", "change", "95 %"], *rows], note=note)


def tune(
    model: Model,
    documents: Documents,
    out: str | Path,
    tuning: Tuning = Tuning(),
    *,
    count: int | None = None,
    data: Any = None,
    optimizer: optax.GradientTransformation | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[TunedLens, TunedResult]:
    """Train a lens into the directory ``out``, where ``load_lens`` finds it; what was cut off goes on.

    All layers are trained in one program, on the model's mesh: rows over "prompts", matrices over "model".

    Args:
        documents: numbered texts as ids (``sae.texts.documents_of``). The first ``tuning.held`` are held out.
        count: documents that there are, which come round again; None for any number of them.
        data: what says which texts these are, for JSON: another directory's training is refused.
        optimizer: in place of the one that ``tuning`` names.
        say: gets lines about speed and progress.

    Raises ``UserError`` for too few documents, and for a directory that holds other work.
    """
    if count is not None and count < tuning.held + 2:
        raise UserError(f"{count} documents are too few: {tuning.held} are held out, and some must be left to train on")
    config = {
        "kind": "tuned lens", "model": model.name, "fingerprint": model.fingerprint, "data": data,
        "tuning": dataclasses.asdict(tuning), "own optimizer": optimizer is not None,
    }  # fmt: skip
    with opened(Path(out), config, say) as folder:
        if folder.finished is not None and (folder.path / TRAINED / PARAMS).is_file():
            result = TunedResult.from_json(folder.finished)
            return load_lens(folder.path / TRAINED, model), result
        folder.begin()
        moved = tuning.transformation() if optimizer is None else optimizer
        translators, tokens = _train(model, documents, count, folder, tuning, moved, say)
        lens = dataclasses.replace(untrained(model), translators=translators, name=folder.path.name)
        save_lens(lens, folder.path / TRAINED, model)
        result = measured(model, lens, [_held(model, documents(i), tuning) for i in range(tuning.held)], tuning, tokens)
        folder.finish(result)
        if is_first():
            (folder.path / STATE).unlink(missing_ok=True)
        return lens, result


def measured(model: Model, lens: TunedLens, texts: Sequence[np.ndarray], tuning: Tuning, tokens: int) -> TunedResult:
    """Both lenses on texts as ids."""
    plain, tuned = (read(model, list(texts), lens=each, top=1) for each in (None, lens))
    before, after = (text_means(one.cells.kl, one.cells.text) for one in (plain, tuned))
    layers = []
    for s, name in enumerate(plain.places[:-1]):
        change, ends = over_texts(after[s] - before[s])
        layers.append(
            LayerKL(
                place=name, logit=float(before[s].mean()), tuned=float(after[s].mean()), change=change, change_ci95=ends
            )
        )
    return TunedResult(model=model.name, steps=tuning.steps, tokens=tokens, texts=len(texts), layers=tuple(layers))


def _held(model: Model, ids: Sequence[int], tuning: Tuning) -> np.ndarray:
    return np.asarray(ids, np.int32)[: min(tuning.context, model.config.max_positions)]


def _train(
    model: Model,
    documents: Documents,
    count: int | None,
    folder: RunFolder,
    tuning: Tuning,
    optimizer: optax.GradientTransformation,
    say: Callable[[str], None],
) -> tuple[Translators, int]:
    """The translators after all steps, and the tokens that they saw."""

    def others(i: int) -> Sequence[int]:
        return documents(tuning.held + (i if count is None else i % (count - tuning.held)))

    translators = untrained(model).translators
    state, done, position, tokens = optimizer.init(translators), 0, (0, 0), 0
    kept = folder.path / STATE
    if from_first(kept.is_file):
        translators, state, done, position, tokens = _restored(kept, translators, state)
        say(f"going on after step {done} of {tuning.steps}")
    texts, _ = rows_of(model, others, rows=tuning.rows, context=tuning.context, position=position)
    lines = resumed_lines(folder.path / PROGRESS)[:done]
    write_lines(folder.path / PROGRESS, lines)
    left = tuning.steps - done
    say(f"{left} steps of {tuning.batch_tokens:,} tokens (--batch-tokens); how long is known after the first")
    begun, saved, first = time.monotonic(), time.monotonic(), tokens
    with progress_bar("tuning", tuning.steps, unit="step") as bar:
        for step in range(done, tuning.steps):
            sums, seen = no_sums(translators), 0
            while seen < tuning.batch_tokens:
                ids, mask, position = texts.next()
                rows = LensRows(shard_rows(model.mesh, ids), shard_rows(model.mesh, mask))
                sums = add_gradients(
                    model.params, model.config, translators, rows, sums, step=step_of(model.config, ids.shape)
                )
                seen += int(mask.sum())
            translators, state = advance(optimizer, translators, state, sums)
            kl = to_host(sums.kl) / float(to_host(sums.tokens))
            if not np.isfinite(kl).all():
                raise UserError(f"the loss is not finite at step {step + 1}: lower --lr-scale, or use --dtype float32")
            tokens += seen
            speed = (tokens - first) / (time.monotonic() - begun)
            append_line(folder.path / PROGRESS, {"step": step + 1, "tokens": tokens, "kl": kl.tolist()})
            bar(step + 1, kl=f"{kl.mean():.3f}", tokens_s=f"{speed:.0f}")
            if step in (done, done + 4):
                rest = (tuning.steps - step - 1) * (time.monotonic() - begun) / (step - done + 1)
                say(f"step {step + 1}: KL {kl.mean():.3f} nats, {speed:.0f} tokens/s, about {rest / 60:.1f} min to go")
            due = time.monotonic() - saved >= 60 * tuning.save_minutes
            if step + 1 < tuning.steps and from_first(lambda due=due: due):  # type: ignore[misc]
                _save(kept, translators, state, step + 1, position, tokens)
                saved = time.monotonic()
    say(f"{tokens - first:,} tokens in {time.monotonic() - begun:.0f} s, compilation included")
    return translators, tokens


def _save(path: Path, translators: Translators, state: Any, done: int, position: tuple[int, int], tokens: int) -> None:
    leaves = to_host(jax.tree.leaves((translators, state)))
    numbers = np.asarray([done, *position, tokens], np.int64)
    if is_first():
        write_npz(path, {"numbers": numbers} | {f"leaf{i:03d}": leaf for i, leaf in enumerate(leaves)})


def _restored(path: Path, translators: Translators, state: Any) -> tuple[Translators, Any, int, tuple[int, int], int]:
    """What ``_save`` wrote, laid out as the given trees. Raises ``UserError`` for another training's state."""
    found = read_npz(path)
    leaves, tree = jax.tree.flatten((translators, state))
    arrays = [found[name] for i in range(len(leaves)) if (name := f"leaf{i:03d}") in found]
    same = len(arrays) == len(leaves) and all(new.shape == np.shape(old) for new, old in zip(arrays, leaves))
    if not same or "numbers" not in found:
        raise UserError(f"{path} is not the state of this training: remove it, or train into another directory")
    placed = [
        put(new, old.sharding) if isinstance(old, jax.Array) and old.ndim else jnp.asarray(new, np.asarray(old).dtype)
        for new, old in zip(arrays, leaves, strict=True)
    ]
    moved, own = jax.tree.unflatten(tree, placed)
    done, document, row, tokens = (int(n) for n in found["numbers"])
    return moved, own, done, (document, row), tokens
