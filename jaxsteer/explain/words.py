"""Words for every latent at once, by mutual information (2502.15576), without text and without a judge.

With S = g e^T the logits of words w for latents c,

    p(w|c) = softmax over w of S,    p(c|w) = p(w|c) / sum over c' of p(w|c')        (uniform prior over latents)
    score(w, c) = p(w|c) [log p(c|w) + log C]

and the words of a latent are those of the largest scores. Their sum over w and mean over c is the mutual information of
words and latents: between 0 and log min(C, V). A constant that is added to all logits of a latent changes nothing.
The paper normalises S over c by itself instead (``posterior="softmax"``), which is no joint distribution: latents of
large norm win every word; and it leaves log C out, which ranks the least related words first.

g is a decoder row (what the latent writes) or an encoder column (what it reads), through the final norm; e the mean of
the unembedding's rows of a word's tokens. Sums over c run over chunks of latents; what is of size [C, V] is kept
between the two passes only where it is small (``KEPT``).

Letters: C latents, V words, D width, K words of a latent, c latents of a chunk.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.explain.explanations import Explanations, digest_of
from jaxsteer.explain.vocabulary import Vocabulary, word_vectors
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.model import Model
from jaxsteer.models.params import Params
from jaxsteer.models.sharding import place, put
from jaxsteer.models.transformer import centred, norm_weight
from jaxsteer.objectives.terms import check_choice
from jaxsteer.processes import to_host
from jaxsteer.sae.dictionary import SAE

CHUNK = 1024
"""Latents at a time."""
KEPT = 2 << 30
"""Bytes of logits on all devices up to which they are kept for the second pass; beyond, they are computed again."""


def explain_words(
    model: Model,
    sae: SAE,
    vocabulary: Vocabulary,
    *,
    top: int = 50,
    side: str = "decoder",
    posterior: str = "bayes",
    temperature: float = 1.0,
    name: str = "",
) -> Explanations:
    """The ``top`` words of every latent of ``sae``, with scores in nats, and the mutual information of all.

    ``side`` says which of a latent's vectors speaks; ``temperature`` divides the logits (the paper's alpha and beta).
    ``name`` is what the SAE is called. Latents and words are the same whatever the chunks and devices.

    Raises ``UserError`` for an SAE that does not read or write in a stream of the model's width, and for values out of
    range.
    """
    check_choice("side", side, ("decoder", "encoder"))
    check_choice("posterior", posterior, ("bayes", "softmax"))
    if not (math.isfinite(temperature) and temperature > 0):
        raise UserError(f"temperature must be a positive number, got {temperature}")
    vectors = latent_vectors(model, sae, side)
    words = jnp.asarray(word_vectors(model, vocabulary) / np.float32(temperature))
    found = mutual_words(vectors, words, top=min(top, len(vocabulary)), posterior=posterior)
    indices, scores, information = (np.asarray(part) for part in to_host(found))
    return Explanations(
        words=indices,
        scores=scores,
        information=information,
        vocabulary=vocabulary,
        model=model.name,
        fingerprint=model.fingerprint,
        sae=name,
        digest=digest_of(sae),
        site=sae.config.site_in or "",
        side=side,
        posterior=posterior,
        temperature=temperature,
    )


def dot_words(
    model: Model, sae: SAE, vocabulary: Vocabulary, *, top: int = 50, side: str = "decoder"
) -> Int[np.ndarray, "C K"]:
    """The words of every latent by the plain dot product of its vector with theirs: a baseline."""
    vectors, words = latent_vectors(model, sae, side), jnp.asarray(word_vectors(model, vocabulary))
    chunk = min(CHUNK, len(vectors))
    blocks = jnp.pad(vectors, ((0, -len(vectors) % chunk), (0, 0))).reshape(-1, chunk, vectors.shape[1])
    found = np.asarray(to_host(_largest(blocks, words, top=min(top, len(vocabulary)))))
    return found.reshape(-1, found.shape[-1])[: len(vectors)]


@partial(jax.jit, static_argnames="top")
def _largest(blocks: Float[Array, "n c D"], words: Float[Array, "V D"], *, top: int) -> Int[Array, "n c K"]:
    return lax.map(lambda block: lax.top_k(block @ words.T, top)[1], blocks)


def latent_vectors(model: Model, sae: SAE, side: str = "decoder") -> Float[Array, "C D"]:
    """Decoder rows or encoder columns through the model's final norm, float32; rows of zeros stay zeros.

    Raises ``UserError`` for an SAE whose vectors are not of the stream's width.
    """
    width = sae.d_out if side == "decoder" else sae.d_in
    if width != model.config.d_model:
        other = "writes" if side == "decoder" else "reads"
        raise UserError(
            f"The SAE {other} vectors of width {width}, and the stream of {model.name} has {model.config.d_model}: its "
            "latents cannot be compared with words."
        )
    return normed(model.params, model.config, sae.W_dec if side == "decoder" else sae.W_enc.T)


@partial(jax.jit, static_argnames="config")
def normed(params: Params, config: ModelConfig, vectors: Float[Array, "C D"]) -> Float[Array, "C D"]:
    """Vectors through the final norm: divided by their root mean square, times the norm's weight; float32."""
    weight = norm_weight(params.final_norm, config)
    wide = centred(vectors.astype(jnp.float32), config)
    size = jnp.sqrt(jnp.mean(jnp.square(wide), -1, keepdims=True))
    return wide / jnp.maximum(size, 1e-12) * weight


def mutual_words(
    vectors: Float[Array | np.ndarray, "C D"],
    words: Float[Array | np.ndarray, "V D"],
    *,
    top: int,
    posterior: str = "bayes",
    chunk: int = CHUNK,
) -> tuple[Int[Array, "C K"], Float[Array, "C K"], Float[Array, " C"]]:
    """The ``top`` words of every latent, their scores in nats, the largest first, and the sum of all scores of each
    latent, whose mean over latents is the mutual information.

    All float32. Latents may lie on several devices (axis 0): sums over them are then the only thing that travels.
    """
    given = jnp.asarray(vectors)
    mesh = getattr(given.sharding, "mesh", None)
    count, devices = len(given), 1 if mesh is None else mesh.size
    held = min(chunk, -(-count // devices)) * devices
    padded = jnp.pad(given, ((0, -count % held), (0, 0)))
    blocks = padded.reshape(-1, held, given.shape[1])
    if mesh is not None and mesh.size > 1:
        blocks = put(blocks, place(mesh, P(None, tuple(mesh.axis_names)), blocks.shape))
    found = mutual_blocks(
        blocks, jnp.asarray(words), count, top=top, bayes=posterior == "bayes", keep=keeps(count, len(words))
    )
    indices, scores, information = (part.reshape(-1, *part.shape[2:])[:count] for part in found)
    return indices, scores, information


def keeps(latents: int, words: int) -> bool:
    """Whether logits of so many latents and words are kept between the passes."""
    return 4 * latents * words <= KEPT


@partial(jax.jit, static_argnames=("top", "bayes", "keep"))
def mutual_blocks(
    blocks: Float[Array, "n c D"],
    words: Float[Array, "V D"],
    count: Int[Array, ""] | int,
    *,
    top: int,
    bayes: bool,
    keep: bool,
) -> tuple[Int[Array, "n c K"], Float[Array, "n c K"], Float[Array, "n c"]]:
    """What ``mutual_words`` finds, of ``count`` latents in blocks that fill their last one with anything."""
    n, held, _ = blocks.shape
    inside = jnp.arange(n * held).reshape(n, held) < count

    def product(block: Float[Array, "c D"]) -> Float[Array, "c V"]:
        return jnp.matmul(block, words.T, precision=lax.Precision.HIGHEST)

    def likelihood(logits: Float[Array, "c V"]) -> tuple[Float[Array, "c V"], Float[Array, "c V"]]:
        """Log p(w|c), and what is normalised over latents to log p(c|w)."""
        given = jax.nn.log_softmax(logits, -1)
        return given, given if bayes else logits

    def add(total: Float[Array, " V"], at: tuple[Array, Array]) -> tuple[Array, Array | None]:
        block, real = at
        logits = product(block)
        part = jnp.where(real[:, None], likelihood(logits)[1], -jnp.inf)
        return jnp.logaddexp(total, jax.nn.logsumexp(part, 0)), logits if keep else None

    total, kept = lax.scan(add, jnp.full(len(words), -jnp.inf, jnp.float32), (blocks, inside))

    def best(block: Float[Array, "c X"]) -> tuple[Array, Array, Array]:
        given, over = likelihood(block if keep else product(block))
        score = jnp.exp(given) * (over - total + jnp.log(jnp.float32(count)))
        values, indices = lax.top_k(score, top)
        return indices, values, score.sum(-1)

    return lax.map(best, kept if keep else blocks)
