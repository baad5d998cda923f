"""Train a sparse autoencoder on a model's activations: rounds of harvesting and training, checkpoints, the file.

Every round trains on a random half of the pool and then replaces it. A checkpoint holds the weights, the optimiser, the
pool and the position in the texts, which is all that later rounds depend on: a run that was killed and started again
gives the same SAE, bit by bit, as one that never stopped.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_convert.sae import CONFIG, WEIGHTS, write_sae
from jaxsteer.errors import UserError, first_line
from jaxsteer.files import append_text, read_json, read_text, write_text, writing
from jaxsteer.files.lock import in_use
from jaxsteer.files.sae_form import Dictionary, Matrix, SAEConfig, canonical, unit_decoder
from jaxsteer.models.model import Model
from jaxsteer.models.sharding import put, require_memory
from jaxsteer.models.sites import KINDS, parse_site
from jaxsteer.processes import PREEMPTED, from_first, is_first, preempted, to_host, wait_for_all
from jaxsteer.sae.dictionary import SAE
from jaxsteer.sae.harvest import batches_of, bos_of, empty_pool, fill, require_rows, rows_of
from jaxsteer.sae.loading import load_sae
from jaxsteer.sae.recipe import Metrics, Recipe, TrainState, inference_threshold, initial_state, shardings, trainer
from jaxsteer.sae.texts import Documents, Position

log = logging.getLogger(__name__)

OPTIONS, METRICS, STATE = "training.json", "metrics.jsonl", "checkpoints"
"""Files of a training's folder, beside those of the SAE."""

Progress = Callable[[dict[str, Any]], None]


@dataclasses.dataclass
class _Training:
    """Everything that a round changes."""

    state: TrainState
    pool: jax.Array
    position: Position
    rounds: int = 0


def train_sae(
    model: Model,
    documents: Documents,
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    data: Any = None,
    dtype: str = "float32",
    save_minutes: float = 10.0,
    progress: Progress | None = None,
) -> SAE:
    """Train an SAE into the folder ``out`` and return it; goes on where an earlier run of the same training stopped.

    ``model`` need not have more layers than the site (``load(..., layers=k)``); its mesh spreads rows and activations
    over "prompts" and latents over "model". ``documents`` are numbered texts (``documents_of``), ``data`` is anything
    JSON that says which: a folder in which another recipe, model or data was trained is refused.

    The folder gets ``training.json`` (what was asked for), ``metrics.jsonl`` (a line per round: loss, fraction of
    variance unexplained, L0, dead share) and the SAE in SAELens' layout, with matrices of ``dtype``; ``load_sae``
    reads it. Latents have unit decoder rows and are in units of the model's activations. ``progress`` gets every line.
    Raises ``UserError`` for options that do not fit the model and for texts without usable activations.
    """
    recipe.check()
    site = parse_site(recipe.site, model.config.n_layers)
    recipe = dataclasses.replace(recipe, site=site.name)
    width = KINDS[site.kind].width(model.config)
    out = Path(out)
    asked = {"model": model.name, "fingerprint": model.fingerprint, "data": data, "dtype": dtype}
    with in_use(out):
        room = partial(_shapes, model, recipe, width)
        if not from_first(lambda: _prepare_folder(out, asked | dataclasses.asdict(recipe), room)):
            with _Checkpoints(out / STATE, save_minutes) as checkpoints:
                training, batches = _begin(model, documents, recipe, width, checkpoints)
                _train(training, batches, recipe, model, checkpoints, out / METRICS, progress)
                found = to_dictionary(recipe, training.state, training.pool, model)
            wait_for_all()  # until nobody holds the checkpoints open
            from_first(lambda: _publish(found, out, dtype))
    return load_sae(out, mesh=model.mesh)


def _train(
    training: _Training,
    batches: Iterator[Any],
    recipe: Recipe,
    model: Model,
    checkpoints: _Checkpoints,
    lines: Path,
    progress: Progress | None,
) -> None:
    """All rounds that are left, with their lines and checkpoints."""
    advance = trainer(recipe, training.pool.shape[-1], model.mesh)
    started, first = time.perf_counter(), training.rounds
    if is_first():  # without those of rounds that will be done again
        kept = read_text(lines).split("\n")[: training.rounds] if lines.is_file() else []
        write_text(lines, "".join(f"{line}\n" for line in kept if line))
    while training.rounds < recipe.rounds:
        training.state, metrics, used = advance(training.state, training.pool, jnp.int32(training.rounds))
        training.rounds += 1
        if training.rounds < recipe.rounds:
            training.pool, training.position = fill(training.pool, used, model, recipe.site, batches)
        line = _metrics_line(recipe, training.rounds, metrics)
        speed = (training.rounds - first) * recipe.steps_per_round * recipe.batch / (time.perf_counter() - started)
        if is_first():
            append_text(lines, json.dumps(line) + "\n")
        last, ending = training.rounds == recipe.rounds, preempted()
        checkpoints.save_if_due(training, last=last, now=ending)
        if ending and not last:
            log.warning("told to end after round %d, which is saved", training.rounds)
            raise SystemExit(PREEMPTED)
        if progress is not None:
            progress({**line, "rounds": recipe.rounds, "tokens_per_s": speed})


def to_dictionary(recipe: Recipe, state: TrainState, pool: jax.Array, model: Model) -> Dictionary:
    """The SAE of a state on the host, canonical, in units of the model's activations and with unit decoder rows."""
    weights, scale = to_host(state.weights), float(state.scale)
    threshold = None
    if recipe.arch == "batchtopk":
        threshold = np.full(recipe.latents, float(inference_threshold(recipe, state, pool)))
    elif recipe.arch == "jumprelu":
        threshold = np.exp(weights.log_threshold.astype(np.float64))
    notes = (f"trained by jaxsteer ({recipe.arch}, k={recipe.k}) on {recipe.steps * recipe.batch:,} activations",)
    config = SAEConfig(
        activation="topk" if recipe.arch == "topk" else "jumprelu",
        k=recipe.k if recipe.arch == "topk" else None,
        input_scale=scale,
        output_scale=scale,
        subtract_b_dec=True,
        model=model.name,
        site_in=recipe.site,
        site_out=recipe.site,
        trained_with_bos=bos_of(model) >= 0,
        notes=notes,
    )
    d = Dictionary(
        config=config,
        W_enc=Matrix(weights.W_enc),
        W_dec=Matrix(weights.W_dec),
        b_enc=weights.b_enc.astype(np.float64),
        b_dec=weights.b_dec.astype(np.float64),
        threshold=threshold,
    )
    return unit_decoder(canonical(d), selects_by_norm=True)  # all rows have one norm: the order of latents stays


def _begin(
    model: Model, documents: Documents, recipe: Recipe, width: int, checkpoints: _Checkpoints
) -> tuple[_Training, Any]:
    """The training as the last checkpoint has it, or at its first round, and the batches of text that come next."""
    shapes = _shapes(model, recipe, width)
    pool = empty_pool(model.mesh, recipe.pool, width, model.params.embed.dtype)
    layout = shardings(shapes, model.mesh)
    training = checkpoints.load(shapes, layout, pool)
    position = (0, 0) if training is None else training.position
    rows, _ = rows_of(model, documents, rows=recipe.rows, context=recipe.context, position=position)
    batches = batches_of(rows)
    if training is None:
        pool, position = fill(pool, jnp.arange(recipe.pool), model, recipe.site, batches)
        training = _Training(jax.tree.map(put, initial_state(recipe, pool), layout), pool, position)
    return training, batches


def _shapes(model: Model, recipe: Recipe, width: int) -> Any:
    """What the state looks like. Raises ``UserError`` where it, the pool or a batch does not fit in memory."""
    dtype = model.params.embed.dtype  # activations of a bfloat16 model are bfloat16 numbers already
    wanted = jax.ShapeDtypeStruct((recipe.pool, width), dtype)
    shapes = jax.eval_shape(lambda pool: initial_state(recipe, pool), wanted)
    held = (wanted, shapes, jax.ShapeDtypeStruct((recipe.batch, recipe.latents), jnp.float32))
    needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(held))
    require_memory("Training", needed, model.mesh, "choose a smaller pool or batch, or fewer latents.")
    require_rows(model, recipe.rows, recipe.context)
    return shapes


def _metrics_line(recipe: Recipe, rounds: int, metrics: Metrics) -> dict[str, Any]:
    """A line of metrics: means over the steps of a round, and the dead share at its end."""
    found = to_host(metrics)
    step = rounds * recipe.steps_per_round
    line = {"round": rounds, "step": step, "tokens": step * recipe.batch}
    means = {name: float(np.mean(getattr(found, name))) for name in ("loss", "fvu", "l0")}
    if not all(map(np.isfinite, means.values())):
        raise UserError(f"training became unstable in round {rounds} ({means}): try a lower rate, or a larger batch")
    return {**line, **means, "dead": float(found.dead[-1])}


# The folder


def _prepare_folder(out: Path, asked: dict[str, Any], check: Callable[[], Any]) -> bool:
    """Make the folder ready, a new one after ``check``; True if the same training is finished in it. Raises
    ``UserError`` for another one's."""
    asked = json.loads(json.dumps(asked))
    record = out / OPTIONS
    if record.is_file():
        there = read_json(record)
        other = sorted(name for name in asked.keys() | there.keys() if asked.get(name) != there.get(name))
        if other:
            differences = "; ".join(f"{name}: {there.get(name)!r} there, {asked.get(name)!r} now" for name in other)
            raise UserError(f"{out} holds another training ({differences}). Give another --out, or the same options.")
        return (out / CONFIG).is_file()
    if any(not path.name.startswith(".") for path in out.iterdir()):
        raise UserError(f"{out} exists and holds no training: give a new folder")
    check()
    write_text(record, json.dumps(asked, indent=1) + "\n")
    return False


def _publish(d: Dictionary, out: Path, dtype: str) -> None:
    """Write the SAE into the folder, its cfg.json, without which there is no SAE, at the end; and remove the state."""
    whole = out / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    write_sae(d, whole, dtype=dtype)
    with writing(out):
        for name in (WEIGHTS, CONFIG):
            os.replace(whole / name, out / name)
        whole.rmdir()
    shutil.rmtree(out / STATE, ignore_errors=True)


class _Checkpoints:
    """Orbax checkpoints of a training; the last one is kept."""

    def __init__(self, folder: Path, minutes: float) -> None:
        from orbax.checkpoint import v1 as ocp

        self._ocp, self._every, self._saved, self._folder = ocp, 60 * minutes, time.monotonic(), folder
        self._checkpointer = ocp.training.Checkpointer(
            folder.absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(1),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> _Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self._checkpointer.close()

    def save_if_due(self, training: _Training, *, last: bool, now: bool) -> None:
        """Write a checkpoint if the last one is old, or ``now``; none after the last round."""
        if last or not (now or from_first(lambda: time.monotonic() - self._saved >= self._every)):
            return
        try:
            self._checkpointer.save(
                training.rounds, _leaves(training.state, training.pool, np.asarray(training.position, np.int64))
            )
        except Exception as error:  # Orbax and TensorStore raise many types for a disk that cannot be written
            raise UserError(
                f"the training cannot be saved in {self._folder} ({first_line(error)}). What was saved before is "
                f"whole: make room, then run the same command again"
            ) from error
        self._saved = time.monotonic()

    def load(self, shapes: Any, layout: Any, pool: jax.Array) -> _Training | None:
        """The training of the last whole checkpoint, or None.

        ``shapes`` and ``layout`` are those of the state; ``pool`` is one as it shall be.
        """
        latest = self._checkpointer.latest
        if latest is None:
            return None
        struct = jax.ShapeDtypeStruct
        state = jax.tree.map(lambda leaf, sharding: struct(leaf.shape, leaf.dtype, sharding=sharding), shapes, layout)
        wanted = _leaves(state, struct(pool.shape, pool.dtype, sharding=pool.sharding), np.zeros(2, np.int64))
        try:
            found = self._checkpointer.load(latest.step, wanted)
        except Exception as error:  # Orbax and TensorStore raise many types for a damaged checkpoint
            reason = first_line(error)
            raise UserError(
                f"The checkpoint {latest.path} cannot be read ({reason}). Remove it, or train into another folder."
            ) from error
        leaves, tree = jax.tree.flatten(shapes)
        state = jax.tree.unflatten(tree, [found[f"state{i:03d}"] for i in range(len(leaves))])
        document, row = (int(n) for n in found["position"])
        log.info("going on after round %d of %s", latest.step, latest.path)
        return _Training(state, found["pool"], (document, row), latest.step)


def _leaves(state: Any, pool: Any, position: Any) -> dict[str, Any]:
    """Under names that do not depend on the optimiser's own types."""
    leaves = {f"state{i:03d}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}
    return {**leaves, "pool": pool, "position": position}
