"""The recipe of training: options, losses and one step, as pure functions.

With x scaled to a mean norm of sqrt(D), f the latents and x^ = f W_dec + b_dec:

    p = (x - b_dec) W_enc + b_enc
    topk       f = relu(p) where it is among the k largest of its row         (2406.04093)
    batchtopk  f = relu(p) where it is among the k b largest of the batch     (2412.06410)
    jumprelu   f = relu(p) where it is above a learned threshold per latent   (2407.14435)
    loss       mean |x - x^|^2 / D  +  aux_weight * auxiliary  [+ l0_weight * (mean L0 / k - 1)^2 with jumprelu]

The penalty of jumprelu is ours: the paper's is a multiple of L0, whose value one has to search for. The auxiliary loss
(2406.04093, appendix A.2) gives dead latents something to do: with e = x - x^ held constant and e^
what the aux_k largest dead latents make of it, mean |e - e^|^2 / mean |e|^2.

Letters: b activations of a batch, D width, F latents, N activations of the pool.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.sharding import place
from jaxsteer.ranges import MOST, Large, Positive, Range, Seed, Share, Weight, check_ranges
from jaxsteer.sae.dictionary import SPECS
from jaxsteer.sae.sparsity import above, jump, keep_largest, kth_largest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides an SAE besides the model and the texts."""

    site: str
    """Name of the site, for example blocks.2.hook_resid_post."""
    latents: int
    """F: how many latents."""
    arch: Literal["topk", "batchtopk", "jumprelu"] = "batchtopk"
    """What makes latents sparse: the k largest per token, or on average per batch, or a learned threshold each."""
    k: int = 32
    """Latents that are active per token (batchtopk, jumprelu: on average)."""
    tokens: Large = 20_000_000
    """Activations to train on; rounded up to whole rounds of half the pool."""
    batch: int = 4096
    """Activations per step."""
    pool: Large = 1 << 18
    """Activations that are kept on the devices and drawn from in random order; half of them are replaced each round."""
    context: Annotated[int, Range(2, MOST)] = 128
    """Tokens of a row of text."""
    rows: int = 128
    """Rows of text that are run through the model at once."""
    rate: Positive | None = None
    """Adam's learning rate (default: 2e-4 * sqrt(2^14 / F); that it falls so with F is from 2406.04093)."""
    warmup: Share = 0.02
    """Share of the steps over which the rate rises from zero."""
    decay: Share = 0.2
    """Share of the steps, at the end, over which it falls to zero."""
    aux_weight: Weight = 1 / 32
    """Weight of the auxiliary loss of dead latents; 0 for none."""
    aux_k: int | None = None
    """Dead latents that take part in it per token (default: D / 2)."""
    dead_after: Large | None = None
    """Activations without firing after which a latent is dead (default: 10 million, at most 1/20 of all)."""
    l0_weight: Weight = 1.0
    """Of jumprelu: weight of the penalty that holds the mean number of active latents at k."""
    bandwidth: Positive = 0.03
    """Of jumprelu: width of the window in which thresholds feel a gradient, in mean norms of the activations
    (2407.14435 has 0.001, for billions of activations)."""
    seed: Seed = 0
    """Of initial weights, texts and order."""

    @property
    def steps_per_round(self) -> int:
        """Steps in one call of the device: half the pool."""
        return self.pool // (2 * self.batch)

    @property
    def rounds(self) -> int:
        """Rounds of training."""
        return max(1, math.ceil(self.tokens / (self.steps_per_round * self.batch)))

    @property
    def steps(self) -> int:
        """Steps of training."""
        return self.rounds * self.steps_per_round

    @property
    def patience(self) -> int:
        """Activations without firing after which a latent is dead."""
        return self.dead_after or max(self.batch, min(10_000_000, self.tokens // 20))

    @property
    def learning_rate(self) -> float:
        """Adam's learning rate."""
        return self.rate or 2e-4 * math.sqrt(2**14 / self.latents)

    @property
    def threshold_rate(self) -> float:
        """Adam's learning rate of jumprelu's log thresholds: at least so much that they can travel by a factor of e^10.

        At the common rate they would not come far from where they start in a short training, and L0 would stay wrong.
        """
        return max(self.learning_rate, 10 / self.steps)

    def check(self) -> None:
        """Raise ``UserError`` for numbers that cannot work."""
        check_ranges(self)
        if self.pool % (2 * self.batch) or self.pool < 2 * self.batch:
            raise UserError(f"pool={self.pool} must be a multiple of twice the batch (2 x {self.batch}).")
        if not 1 <= self.k <= self.latents:
            raise UserError(f"k={self.k} active latents do not go with {self.latents} latents.")


@struct.dataclass
class Weights:
    """What is trained."""

    W_enc: Float[Array, "D F"]
    W_dec: Float[Array, "F D"]
    """Rows of norm 1, always."""
    b_enc: Float[Array, " F"]
    b_dec: Float[Array, " D"]
    log_threshold: Float[Array, " F"] | None = None
    """Of jumprelu."""


@struct.dataclass
class TrainState:
    """Weights and everything else that the next step depends on."""

    weights: Weights
    optimizer: optax.OptState
    idle: Int[Array, " F"]
    """Activations since each latent fired."""
    scale: Float[Array, ""]
    """Factor on activations: their mean norm becomes sqrt(D)."""
    step: Int[Array, ""]


@struct.dataclass
class Metrics:
    """What a step tells."""

    loss: Float[Array, "*steps"]
    fvu: Float[Array, "*steps"]
    """Fraction of variance unexplained: squared error over squared distance from the batch's mean."""
    l0: Float[Array, "*steps"]
    """Mean number of active latents."""
    dead: Float[Array, "*steps"]
    """Share of latents that have not fired for ``Recipe.patience`` activations."""


def losses(
    recipe: Recipe, weights: Weights, x: Float[Array, "b D"], dead: Bool[Array, " F"] | None
) -> tuple[Float[Array, ""], tuple[Float[Array, "b F"], Float[Array, "b D"]]]:
    """The loss of scaled activations, and the latents and the error that it comes from.

    ``dead`` says which latents the auxiliary loss is for; without it there is none.
    """
    width = x.shape[-1]
    r = jax.nn.relu((x - weights.b_dec) @ weights.W_enc + weights.b_enc)
    penalty: Array | float = 0.0
    if recipe.arch == "topk":
        f = keep_largest(r, recipe.k, -1)
    elif recipe.arch == "batchtopk":
        f = keep_largest(r, recipe.k * len(x), None)
    else:
        assert weights.log_threshold is not None
        threshold, bandwidth = jnp.exp(weights.log_threshold), recipe.bandwidth * math.sqrt(width)
        f = jump(r, threshold, bandwidth)
        l0 = jnp.mean(jnp.sum(above(r, threshold, bandwidth), -1))
        penalty = recipe.l0_weight * (l0 / recipe.k - 1) ** 2
    error = x - (f @ weights.W_dec + weights.b_dec)
    loss = jnp.mean(error**2) + penalty
    if dead is not None and recipe.aux_weight:
        r = jnp.where(dead, r, 0.0)
        loss += recipe.aux_weight * _auxiliary(recipe, weights.W_dec, r, lax.stop_gradient(error))
    return loss, (f, error)


def _auxiliary(recipe: Recipe, W_dec: Array, r: Array, error: Array) -> Array:
    count = min(recipe.aux_k or max(1, error.shape[-1] // 2), recipe.latents)
    left = error - keep_largest(r, count, -1) @ W_dec
    return jnp.sum(left**2) / jnp.sum(error**2)


def schedule(recipe: Recipe) -> optax.Schedule:
    """Adam's learning rate by step: warm-up, plateau, decay to zero."""
    steps = recipe.steps
    warmup, decay = max(1, round(recipe.warmup * steps)), max(1, round(recipe.decay * steps))
    peak = recipe.learning_rate
    return optax.join_schedules(
        [optax.linear_schedule(peak / warmup, peak, warmup), optax.linear_schedule(peak, 0.0, decay)],
        [max(warmup, steps - decay)],
    )


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Adam after clipping to norm 1."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule(recipe)))


def train_step(recipe: Recipe, state: TrainState, x: Float[Array, "b D"]) -> tuple[TrainState, Metrics]:
    """One step on activations as they come from the pool."""
    x = x.astype(jnp.float32) * state.scale
    dead = state.idle > recipe.patience
    differentiate = jax.value_and_grad(losses, argnums=1, has_aux=True)
    # Two programs, so that the usual one, without dead latents, does not carry zeros for the auxiliary loss.
    (loss, (f, error)), grads = lax.cond(
        dead.any() & (recipe.aux_weight > 0),
        lambda: differentiate(recipe, state.weights, x, dead),
        lambda: differentiate(recipe, state.weights, x, None),
    )
    # The part of the gradient along a decoder row would only change its norm, which is held at 1.
    along = jnp.sum(grads.W_dec * state.weights.W_dec, -1, keepdims=True)
    grads = dataclasses.replace(grads, W_dec=grads.W_dec - along * state.weights.W_dec)
    updates, optimizer_state = optimizer(recipe).update(grads, state.optimizer, state.weights)
    if updates.log_threshold is not None:
        moved = updates.log_threshold * (recipe.threshold_rate / recipe.learning_rate)
        # What is dead feels no gradient: its threshold falls at the full rate.
        fall = schedule(recipe)(state.step) * (recipe.threshold_rate / recipe.learning_rate)
        moved = jnp.where(dead, -fall, moved)
        updates = dataclasses.replace(updates, log_threshold=moved)
    weights = optax.apply_updates(state.weights, updates)
    weights = dataclasses.replace(weights, W_dec=unit_rows(weights.W_dec))
    active = f > 0
    metrics = Metrics(
        loss=loss,
        fvu=jnp.sum(error**2) / jnp.sum((x - x.mean(0)) ** 2),
        l0=jnp.mean(jnp.sum(active, -1, dtype=jnp.float32)),
        dead=jnp.mean(dead, dtype=jnp.float32),
    )
    state = TrainState(
        weights=weights,
        optimizer=optimizer_state,
        idle=jnp.where(active.any(0), 0, state.idle + len(x)),
        scale=state.scale,
        step=state.step + 1,
    )
    return state, metrics


@functools.partial(jax.jit, static_argnames="recipe")
def inference_threshold(recipe: Recipe, state: TrainState, pool: Float[Array, "N D"]) -> Float[Array, ""]:
    """BatchTopK's threshold when there is no batch: the mean over batches of the smallest latent that is kept.

    As 2412.06410 defines it (an expectation over batches), with the weights as they are, over the pool.
    """
    weights = state.weights

    def least(x: Array) -> Array:
        x = x.astype(jnp.float32) * state.scale
        r = jax.nn.relu((x - weights.b_dec) @ weights.W_enc + weights.b_enc)
        return kth_largest(r, recipe.k * len(x), None)[0, 0]

    return jnp.mean(lax.map(least, pool.reshape(-1, recipe.batch, pool.shape[1])))


def unit_rows(W: Float[Array, "F D"]) -> Float[Array, "F D"]:
    """Rows scaled to norm 1."""
    return W / jnp.linalg.norm(W, axis=-1, keepdims=True)


def shardings(tree: Any, mesh: Mesh | None) -> Any:
    """Where the leaves of a ``TrainState`` lie: latents are split over "model", in the optimiser's moments too."""
    specs = SPECS | {"log_threshold": P("model"), "idle": P("model")}

    def of(path: tuple[Any, ...], leaf: Any) -> jax.sharding.Sharding:
        return place(mesh, specs.get(getattr(path[-1], "name", ""), P()), leaf.shape)

    return jax.tree_util.tree_map_with_path(of, tree)


def initial_state(recipe: Recipe, pool: Float[Array, "N D"]) -> TrainState:
    """The state before the first step: decoder rows in random directions, the encoder their transpose.

    The scale and b_dec (the mean) are those of the pool. The thresholds of jumprelu all start where k latents are
    active per activation.
    """
    width = pool.shape[1]

    def scale_and_mean(pool: Array) -> tuple[Array, Array]:
        x = pool.astype(jnp.float32)
        scale = math.sqrt(width) / jnp.mean(jnp.linalg.norm(x, axis=-1))
        return scale, x.mean(0) * scale

    scale, mean = jax.jit(scale_and_mean)(pool)
    rows = unit_rows(jax.random.normal(jax.random.key(recipe.seed), (recipe.latents, width)))
    weights = Weights(W_enc=rows.T, W_dec=rows, b_enc=jnp.zeros(recipe.latents), b_dec=mean)
    if recipe.arch == "jumprelu":
        x = pool[: recipe.batch].astype(jnp.float32) * scale
        start = kth_largest(jax.nn.relu((x - mean) @ weights.W_enc), recipe.k * len(x), None)[0, 0]
        start = jnp.log(jnp.maximum(start, 1e-3))
        weights = dataclasses.replace(weights, log_threshold=jnp.full(recipe.latents, start))
    return TrainState(
        weights=weights,
        optimizer=optimizer(recipe).init(weights),
        idle=jnp.zeros(recipe.latents, jnp.int32),
        scale=scale,
        step=jnp.int32(0),
    )


@functools.lru_cache(maxsize=8)
def trainer(recipe: Recipe, width: int, mesh: Mesh | None) -> Any:
    """``advance(state, pool, round) -> (state, metrics of every step, rows of the pool that were used up)``, compiled.

    One call is a scan over the steps that half the pool is good for. ``state`` is donated.
    """
    shapes = jax.eval_shape(lambda: initial_state(recipe, jnp.zeros((recipe.pool, width))))
    out, everywhere = shardings(shapes, mesh), place(mesh, P(), ())
    # From columns to rows by way of rows over all devices: one exchange between all, then one along "model".
    layouts = [place(mesh, spec, (recipe.batch, width)) for spec in (P(("prompts", "model"), None), P("prompts", None))]

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(out, everywhere, everywhere))
    def advance(state: TrainState, pool: Array, round: Array) -> tuple[TrainState, Metrics, Array]:
        key = jax.random.fold_in(jax.random.key(recipe.seed), round + 1)
        used = jax.random.permutation(key, recipe.pool)[: recipe.pool // 2]

        def one_step(state: TrainState, chosen: Array) -> tuple[TrainState, Metrics]:
            x = pool[chosen]
            for layout in layouts:
                x = lax.with_sharding_constraint(x, layout)
            return train_step(recipe, state, x)

        state, metrics = lax.scan(one_step, state, used.reshape(-1, recipe.batch))
        return state, metrics, used

    return advance
