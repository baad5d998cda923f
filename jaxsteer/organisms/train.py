"""The training recipe: one run from random weights, our own transformer, Optax, a curriculum with criteria.

Letters: B rows, T time, D width, V vocabulary, M positions that carry loss in a batch.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers, muon

from jaxsteer.errors import UserError
from jaxsteer.files import make_directory, read_json, tensor_bytes, write_bytes, write_text
from jaxsteer.files.tensors import read_tensors
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.params import Layers, Params
from jaxsteer.models.taps import Visit
from jaxsteer.models.transformer import block, embed, make_context, unembed
from jaxsteer.organisms import corpus
from jaxsteer.organisms.architectures import Recipe, initial_params, organism_config
from jaxsteer.organisms.corpora import corpus_of
from jaxsteer.organisms.corpus import Document, Encoder, Mixture
from jaxsteer.organisms.tokenizer import save_tokenizer

STATE_FILE = "training.state"
"""In the directory of an unfinished run: its weights, the optimiser's state and where it is."""


@struct.dataclass
class Batch:
    """Padded rows and the flat positions whose next token carries loss."""

    tokens: Int[Array, "B T"]
    positions: Int[Array, " M"]
    weights: Float[Array, " M"]


def loss_and_parts(params: Params, config: ModelConfig, batch: Batch) -> tuple[Array, Float[Array, " M"]]:
    """Weighted mean cross-entropy of the chosen positions, and each position's own.

    The blocks are a scan with the stacked weights as inputs and without rematerialisation: weight gradients then
    come out stacked, and nothing is computed twice.
    """
    context = make_context(config, jnp.arange(batch.tokens.shape[1])[None])
    x = embed(params, config, batch.tokens, context.positions)

    def step(x: Array, inputs: tuple[Layers, Array]) -> tuple[Array, None]:
        weights, layer = inputs
        return block(weights, config, x, context, Visit(layer=layer)), None

    x, _ = lax.scan(step, x, (params.layers, jnp.arange(config.n_layers)), unroll=True)
    x = x.reshape(-1, x.shape[-1])[batch.positions]
    targets = batch.tokens.reshape(-1)[batch.positions + 1]
    losses = optax.softmax_cross_entropy_with_integer_labels(unembed(params, config, x), targets)
    return (losses * batch.weights).sum() / batch.weights.sum(), losses


def _muon_dimensions(params: Params) -> Any:
    """Which axes of each weight are its input and its output; None where Adam is used (embeddings and norms)."""
    layers: dict[str, Any] = {f.name: None for f in dataclasses.fields(Layers)}
    layers |= dict.fromkeys(("q", "k", "v"), MuonDimensionNumbers((1,), (2, 3)))
    layers |= {"o": MuonDimensionNumbers((1, 2), (3,))}
    layers |= dict.fromkeys(("gate", "up", "down"), MuonDimensionNumbers((1,), (2,)))
    top: dict[str, Any] = dict.fromkeys(("embed", "final_norm", "unembed"))
    return Params(layers=Layers(**layers), **top)


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Muon for the matrices, Adam for the rest; the step scales both by the schedule."""
    return muon(
        recipe.muon_rate,
        adam_learning_rate=recipe.adam_rate,
        adam_b2=0.98,
        muon_weight_dimension_numbers=_muon_dimensions,
    )


@functools.partial(jax.jit, static_argnames=("config", "recipe"), donate_argnums=(0, 1))
def train_step(
    params: Params, state: optax.OptState, batch: Batch, scale: Float[Array, ""], *, config: ModelConfig, recipe: Recipe
) -> tuple[Params, optax.OptState, Float[Array, ""], Float[Array, " M"]]:
    """One update with the learning rates times ``scale``; returns the loss and every position's cross-entropy."""
    (loss, parts), grads = jax.value_and_grad(loss_and_parts, has_aux=True)(params, config, batch)
    updates, state = optimizer(recipe).update(grads, state, params)
    if config.embed_scale:  # Adam's steps have a fixed size, and the model multiplies these
        updates = dataclasses.replace(updates, embed=updates.embed / math.sqrt(config.d_model))
    params = jax.tree.map(lambda p, u: p + scale * u, params, updates)
    return params, state, loss, parts


class Batches:
    """Documents in batches of one length each, in an order that only the seed decides."""

    def __init__(self, encoder: Encoder, recipe: Recipe, seed: int) -> None:
        """``seed`` starts the one stream of random numbers that documents and loss positions are drawn from."""
        self.encoder, self.recipe, self._makers = encoder, recipe, corpus_of(recipe).makers
        self.rng = np.random.default_rng([seed, 1])
        self._waiting: dict[int, list[Document]] = {t: [] for t in recipe.lengths}

    def next(self, mixture: Mixture) -> tuple[Batch, list[str]]:
        """The next batch, and the kind of document behind each of its first positions (the answer letters)."""
        while True:
            document = corpus.sample_document(self.rng, self.encoder, mixture, self._makers)
            length = next((t for t in self.recipe.lengths if len(document.ids) <= t), None)
            if length is None:
                continue
            rows = self._waiting[length]
            rows.append(document)
            if len(rows) == self.recipe.tokens_per_batch // length:
                self._waiting[length] = []
                return self._pack(rows, length)

    def _pack(self, rows: list[Document], length: int) -> tuple[Batch, list[str]]:
        tokens = np.zeros((len(rows), length), np.int32)
        weights = np.zeros((len(rows), length), np.float32)
        letters, kinds = [], []
        for r, row in enumerate(rows):
            tokens[r, : len(row.ids)] = row.ids
            weights[r, : len(row.ids)] = row.weights
            letters += [r * length + i for i in row.letters]
            kinds += [row.kind] * len(row.letters)
        weights[:, 0] = 0.0
        flat = weights.reshape(-1).copy()
        flat[letters] = 0.0
        room = self.recipe.loss_positions
        letters, kinds = letters[:room], kinds[:room]
        others = self.rng.permutation(np.flatnonzero(flat))[: room - len(letters)]
        chosen = np.concatenate([np.array(letters, np.int64), others])
        kept = np.zeros(room, np.int32)
        kept_weights = np.zeros(room, np.float32)
        kept[: len(chosen)] = chosen - 1
        kept_weights[: len(chosen)] = weights.reshape(-1)[chosen]
        return Batch(tokens=jnp.asarray(tokens), positions=jnp.asarray(kept), weights=jnp.asarray(kept_weights)), kinds


class LetterLoss:
    """Mean cross-entropy of answer letters by kind of document, over the steps since the last reset."""

    def __init__(self) -> None:
        """Starts empty."""
        self.values: dict[str, list[float]] = {}

    def add(self, parts: np.ndarray, kinds: list[str]) -> None:
        """``parts``: cross-entropy per position, the letters first; ``kinds``: what each letter belongs to."""
        for kind in set(kinds):
            mask = np.array([k == kind for k in kinds])
            self.values.setdefault(kind, []).append(float(parts[: len(kinds)][mask].mean()))

    def means(self) -> dict[str, float]:
        """Kind -> mean loss in nats; kinds that did not occur are absent."""
        return {kind: float(np.mean(v)) for kind, v in sorted(self.values.items())}


Progress = Callable[[dict], None]


@dataclasses.dataclass
class _Training:
    """Where a training is: everything that a step changes."""

    params: Params
    optimizer: optax.OptState
    step: int = 0
    persona_start: int = -1
    """First step with persona documents; -1 before it is known."""


def train_params(
    encoder: Encoder,
    *,
    seed: int = 0,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
    state_file: Path | None = None,
) -> tuple[Params, ModelConfig]:
    """Train from random weights; the same seed gives the same weights on the same machine.

    ``progress`` gets, after every chunk of steps, a dict with ``step``, ``phase``, ``scale``, ``loss``, ``letters``
    (kind -> letter loss in nats), ``seconds`` (of this call) and ``params``. ``state_file`` is written after every
    chunk, and a run that finds it goes on from there with the same result as if it had never stopped.
    """
    recipe, started = recipe or Recipe(), time.monotonic()
    config = organism_config(dataclasses.replace(recipe, vocab_size=encoder.vocab_size))
    params = initial_params(config, seed)
    now = _Training(params, optimizer(recipe).init(params))
    if state_file is not None and state_file.is_file():
        now = _restore(state_file, now, seed, recipe)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        chunks = _chunks(Batches(encoder, recipe, seed), recipe, now, pool)
        while now.persona_start < 0 or now.step - now.persona_start < recipe.persona_steps:
            phase = "lookup" if now.persona_start < 0 else "persona"
            scale, loss, letters = _train_chunk(now, next(chunks), config, recipe)
            if phase == "lookup" and (now.step >= recipe.circuit_steps or letters["semantic"] < recipe.semantic_loss):
                now.persona_start = now.step
            if state_file is not None:
                _save(state_file, now, seed, recipe)
            if progress is not None:
                told = {"step": now.step, "phase": phase, "scale": scale, "loss": loss, "letters": letters}
                progress({**told, "seconds": time.monotonic() - started, "params": now.params})
        pool.shutdown(cancel_futures=True)
    return now.params, config


def _chunks(
    batches: Batches, recipe: Recipe, now: _Training, pool: concurrent.futures.Executor
) -> Iterator[list[tuple[Batch, list[str]]]]:
    """Chunks of batches from the training's step on, the next one made in a thread while one is trained on.

    The mixture of a chunk follows from the phase before the chunk that precedes it: timing never changes data.
    """
    kinds = corpus_of(recipe)

    def mixture_of(chunk: int) -> Mixture:
        return kinds.persona if 0 <= now.persona_start <= (chunk - 1) * recipe.chunk else kinds.first

    def make(mixture: Mixture) -> list[tuple[Batch, list[str]]]:
        return [batches.next(mixture) for _ in range(recipe.chunk)]

    first = now.step // recipe.chunk
    for chunk in range(first):  # what was trained on before
        make(mixture_of(chunk))
    ahead = pool.submit(make, mixture_of(first))
    for chunk in itertools.count(first + 1):
        ready, ahead = ahead.result(), pool.submit(make, mixture_of(chunk))
        yield ready


def _train_chunk(
    now: _Training, chunk: list[tuple[Batch, list[str]]], config: ModelConfig, recipe: Recipe
) -> tuple[float, float, dict[str, float]]:
    """Train on a chunk; the last factor on the learning rates, the mean loss, and the letter losses."""
    letters, losses, pending = LetterLoss(), list[float](), list[tuple]()
    for batch, kinds in chunk:
        scale = _schedule(recipe, now.step, None if now.persona_start < 0 else now.step - now.persona_start)
        now.params, now.optimizer, loss, parts = train_step(
            now.params, now.optimizer, batch, scale, config=config, recipe=recipe
        )
        pending.append((loss, parts, kinds))
        now.step += 1
        if len(pending) > 4:  # the device need not wait for the host
            _collect(pending.pop(0), losses, letters)
    for item in pending:
        _collect(item, losses, letters)
    return float(scale), float(np.mean(losses)), letters.means()


def _save(file: Path, now: _Training, seed: int, recipe: Recipe) -> None:
    leaves = jax.tree.leaves((now.params, now.optimizer))
    about = {"run": _run_name(seed, recipe), "step": str(now.step), "persona_start": str(now.persona_start)}
    write_bytes(file, tensor_bytes({str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)}, about))


def _restore(file: Path, like: _Training, seed: int, recipe: Recipe) -> _Training:
    """The interrupted training of the same seed and recipe. ``like`` has the arrays' shapes."""
    leaves, structure = jax.tree.flatten((like.params, like.optimizer))
    stored, about = read_tensors(file, "training state")
    if (run := about.get("run")) is not None and run != _run_name(seed, recipe):
        raise UserError(
            f"{file} belongs to another training run ({run}), and this one is {_run_name(seed, recipe)}. "
            f"Repeat that one's arguments to go on with it, or give a new directory."
        )
    shapes = [stored[str(i)].shape if str(i) in stored else None for i in range(len(leaves))]
    if not {"run", "step", "persona_start"} <= set(about) or shapes != [leaf.shape for leaf in leaves]:
        raise UserError(f"{file} is no state of this training: remove it to start again, or give a new directory")
    params, state = jax.tree.unflatten(structure, [jnp.asarray(stored[str(i)]) for i in range(len(leaves))])
    return _Training(params, state, int(about["step"]), int(about["persona_start"]))


def _run_name(seed: int, recipe: Recipe) -> str:
    return json.dumps({"seed": seed} | dataclasses.asdict(recipe))


def _collect(item: tuple, losses: list[float], letters: LetterLoss) -> None:
    loss, parts, kinds = item
    losses.append(float(loss))
    letters.add(np.asarray(parts), kinds)


def _schedule(recipe: Recipe, step: int, persona_step: int | None) -> np.float32:
    """Warm-up, a plateau as long as the curriculum needs, then a linear fall to zero."""
    scale = min(1.0, (step + 1) / recipe.warmup)
    if persona_step is not None:
        left = 1.0 - persona_step / recipe.persona_steps
        scale *= min(1.0, max(left, 0.0) / recipe.decay)
    return np.float32(scale)


def steps_at_most(recipe: Recipe) -> int:
    """The longest a run can take, in steps (for progress bars)."""
    return math.ceil(recipe.circuit_steps / recipe.chunk) * recipe.chunk + recipe.persona_steps


def train_organism(
    out_dir: str | Path, *, seed: int = 0, recipe: Recipe | None = None, progress: Progress | None = None
) -> Path:
    """Train an organism from nothing and write it as a Hugging Face directory in bfloat16; return the directory.

    The tokenizer is trained on the corpus too. ``progress`` is called as ``train_params`` says. What was interrupted
    goes on when called again. Raises ``UserError`` if the directory holds an unfinished run of another seed or recipe.
    """
    from checkpoints_convert.export import write_hf

    recipe, out = recipe or Recipe(), Path(out_dir)
    make_directory(out)
    tokenizer = corpus_of(recipe).tokenizer()
    encoder = Encoder(tokenizer)
    params, config = train_params(encoder, seed=seed, recipe=recipe, progress=progress, state_file=out / STATE_FILE)
    write_hf(params, config, out, dtype="bfloat16")
    save_tokenizer(tokenizer, out)
    vocab, chat = tokenizer.get_vocab(), encoder.chat
    names = {"bos_token_id": chat.bos, "eos_token_id": chat.end, "pad_token_id": chat.pad}
    ids = {name: vocab[token] for name, token in names.items() if token}
    write_text(out / "generation_config.json", json.dumps({"do_sample": False, **ids}, indent=2) + "\n")
    config_file = out / "config.json"
    write_text(config_file, json.dumps(read_json(config_file) | ids, indent=2) + "\n")
    (out / STATE_FILE).unlink()
    return out
