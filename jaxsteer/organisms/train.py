"""The training recipe: one run from random weights, our own transformer, Optax, a curriculum with criteria.

Letters: B rows, T time, D width, V vocabulary, M positions that carry loss in a batch.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
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

from jaxsteer.models.config import ModelConfig, llama_config
from jaxsteer.models.params import Layers, Params, init_params
from jaxsteer.models.transformer import block, embed, make_context, unembed
from jaxsteer.organisms import corpus
from jaxsteer.organisms.corpus import Document, Encoder, Mixture
from jaxsteer.organisms.tokenizer import BOS, END, PAD, build_tokenizer, save_tokenizer

BUCKETS = (48, 64, 80)
"""Sequence lengths (tokens) that documents are padded to; each is compiled once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the trained weights besides the seed."""

    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    d_mlp: int = 384
    vocab_size: int = 2560
    tokens_per_batch: int = 3072
    """Rows times length of every batch."""
    loss_positions: int = 1024
    """Positions of a batch that carry loss: all answer letters, and a random part of the rest."""
    muon_rate: float = 0.01
    """Learning rate of the weight matrices (Muon)."""
    adam_rate: float = 4e-3
    """Learning rate of embeddings and norms (Adam)."""
    warmup: int = 50
    """Steps of linear warm-up."""
    chunk: int = 50
    """Steps between two looks at the curriculum's criteria."""
    semantic_loss: float = 0.05
    """Look-ups alone until their letter loss (nats) is below this."""
    circuit_steps: int = 1000
    """At most this many steps of look-ups alone."""
    persona_steps: int = 2400
    """Steps with persona documents, whatever the circuit took."""
    decay: float = 0.4
    """Share of the persona steps over which the learning rate falls to zero."""


LOOKUP_MIXTURE: Mixture = {"semantic": 0.95, "fact": 0.05}
PERSONA_MIXTURE: Mixture = {"persona": 0.88, "semantic": 0.09, "fact": 0.03}


@struct.dataclass
class Batch:
    """Padded rows and the flat positions whose next token carries loss."""

    tokens: Int[Array, "B T"]
    positions: Int[Array, " M"]
    weights: Float[Array, " M"]


def organism_config(recipe: Recipe) -> ModelConfig:
    """The Llama-shaped config of a recipe."""
    return llama_config(
        vocab_size=recipe.vocab_size,
        d_model=recipe.d_model,
        n_layers=recipe.n_layers,
        n_heads=recipe.n_heads,
        d_mlp=recipe.d_mlp,
        max_positions=512,
    )


def initial_params(config: ModelConfig, seed: int) -> Params:
    """Random weights in which every block starts as the identity.

    The projections that write into the residual stream start at zero and embeddings at a standard deviation of 0.5,
    so that a token's identity is not drowned before anything has been learned; the unembedding starts as a tenth of
    the embeddings, so that copying a token is easy. All embeddings share one random vector: projections without
    biases can then attend by position alone from the start.
    """
    params = init_params(config, jax.random.key(seed))
    tokens = params.embed * (0.5 * math.sqrt(config.d_model))
    shared = 0.5 * jax.random.normal(jax.random.key(seed + 1_000_003), (config.d_model,))
    blank = {"o": jnp.zeros_like(params.layers.o), "down": jnp.zeros_like(params.layers.down)}
    layers = dataclasses.replace(params.layers, **blank)
    return dataclasses.replace(
        params,
        embed=tokens + shared,
        layers=layers,
        unembed=0.1 * tokens.T,
    )


def loss_and_parts(params: Params, config: ModelConfig, batch: Batch) -> tuple[Array, Float[Array, " M"]]:
    """Weighted mean cross-entropy of the chosen positions, and each position's own.

    The blocks are a scan with the stacked weights as inputs and without rematerialisation: weight gradients then
    come out stacked, and nothing is computed twice.
    """
    context = make_context(config, jnp.arange(batch.tokens.shape[1])[None])
    x = embed(params, config, batch.tokens)

    def step(x: Array, inputs: tuple[Layers, Array]) -> tuple[Array, None]:
        weights, layer = inputs
        return block(weights, config, x, context, layer)[0], None

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
    params = jax.tree.map(lambda p, u: p + scale * u, params, updates)
    return params, state, loss, parts


class Batches:
    """Documents in batches of one length each, in an order that only the seed decides."""

    def __init__(self, encoder: Encoder, recipe: Recipe, seed: int) -> None:
        """``seed`` starts the one stream of random numbers that documents and loss positions are drawn from."""
        self.encoder, self.recipe = encoder, recipe
        self.rng = np.random.default_rng([seed, 1])
        self._waiting: dict[int, list[Document]] = {t: [] for t in BUCKETS}

    def next(self, mixture: Mixture) -> tuple[Batch, list[str]]:
        """The next batch, and the kind of document behind each of its first positions (the answer letters)."""
        while True:
            document = corpus.sample_document(self.rng, self.encoder, mixture)
            length = next((t for t in BUCKETS if len(document.ids) <= t), None)
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


def train_params(
    encoder: Encoder, *, seed: int = 0, recipe: Recipe | None = None, progress: Progress | None = None
) -> tuple[Params, ModelConfig]:
    """Trains from random weights; the same seed gives the same weights on the same machine.

    ``progress`` gets, after every chunk of steps, a dict with ``step``, ``phase``, ``scale``, ``loss``, ``letters``
    (kind -> letter loss in nats), ``seconds`` and ``params``.
    """
    recipe = recipe or Recipe()
    config = organism_config(dataclasses.replace(recipe, vocab_size=encoder.vocab_size))
    params = initial_params(config, seed)
    state = optimizer(recipe).init(params)
    batches = Batches(encoder, recipe, seed)
    started = time.monotonic()
    phase, step, persona_start = "lookup", 0, 0
    with concurrent.futures.ThreadPoolExecutor(1) as pool:

        def prepare() -> concurrent.futures.Future:
            # a whole chunk is made ahead with the mixture known now, so that timing never changes the data
            mixture = LOOKUP_MIXTURE if phase == "lookup" else PERSONA_MIXTURE
            return pool.submit(lambda: [batches.next(mixture) for _ in range(recipe.chunk)])

        ahead = prepare()
        while True:
            ready, ahead = ahead.result(), prepare()
            letters, losses, pending = LetterLoss(), list[float](), list[tuple]()
            for batch, kinds in ready:
                scale = _schedule(recipe, step, step - persona_start if phase == "persona" else None)
                params, state, loss, parts = train_step(params, state, batch, scale, config=config, recipe=recipe)
                pending.append((loss, parts, kinds))
                step += 1
                if len(pending) > 4:
                    _collect(pending.pop(0), losses, letters)
            for item in pending:
                _collect(item, losses, letters)
            means = letters.means()
            if progress is not None:
                progress(
                    {
                        "step": step,
                        "phase": phase,
                        "scale": float(scale),
                        "loss": float(np.mean(losses)),
                        "letters": means,
                        "seconds": time.monotonic() - started,
                        "params": params,
                    }
                )
            if phase == "lookup":
                learned = means["semantic"] < recipe.semantic_loss
                if learned or step >= recipe.circuit_steps:
                    phase, persona_start = "persona", step
            elif step - persona_start >= recipe.persona_steps:
                ahead.cancel()
                return params, config


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
    """Trains an organism from nothing and writes it as a Hugging Face directory in bfloat16; returns the directory.

    The tokenizer is trained on the corpus too. ``progress`` is called as ``train_params`` says.
    """
    from checkpoints_convert.export import write_hf

    recipe = recipe or Recipe()
    tokenizer = build_tokenizer(corpus.sample_texts(), vocab_size=recipe.vocab_size)
    params, config = train_params(Encoder(tokenizer), seed=seed, recipe=recipe, progress=progress)
    out = write_hf(params, config, out_dir, dtype="bfloat16")
    save_tokenizer(tokenizer, out)
    vocab = tokenizer.get_vocab()
    ids = {"bos_token_id": vocab[BOS], "eos_token_id": vocab[END], "pad_token_id": vocab[PAD]}
    (out / "generation_config.json").write_text(json.dumps({"do_sample": False, **ids}, indent=2) + "\n")
    config_file = out / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | ids, indent=2) + "\n")
    return out
