"""Learned steering vectors: trained until steering by them makes given completions likely, or preferred.

* ``ntp``: the cross-entropy of the wanted completion under the steered model.
* ``po`` (preference optimisation, RePS in 2505.20809, with the form of 2604.08524): -log sigmoid(beta / n_w log p_w -
  1 / n_l log p_l), p of the wanted and the unwanted completion of n tokens under the steered model, beta =
  max(kappa (log q_l - log q_w), 1), q of the unsteered one.

The edit is h + a f u v: a is an example's sign, f a factor drawn for it at every step, u the mean norm of the stream
over 20 sqrt(D), so that a vector of unit root mean square moves by one mean norm at f = 20 in every model. Gradients
reach the vector alone, through the blocks from its site on.

Every vector is a problem of its own: sites and seeds lie side by side on the first axis of one program, and what one
learns does not depend on the others.

Letters: P problems, b examples of a step, F entries of a vector.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.files import read_tensors, tensor_bytes, write_bytes
from jaxsteer.files.paths import user_path
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.log_probs import LOGITS_NOT_FINITE
from jaxsteer.models.model import Model
from jaxsteer.models.params import Params
from jaxsteer.models.sharding import place, put
from jaxsteer.models.sites import KINDS, Site, find_sites
from jaxsteer.processes import to_host
from jaxsteer.ranges import Positive, Range, Seed, Weight, as_tuple, check_ranges, must_be
from jaxsteer.steer.completions import (
    Completions,
    Example,
    check_examples,
    completion_log_probs,
    completions_of,
    digest,
    room,
    take,
)
from jaxsteer.steer.edits import Edit
from jaxsteer.steer.norms import mean_norms
from jaxsteer.steer.selectors import Selector, select
from jaxsteer.steer.vectors import Vectors

CHUNK = 10
"""Steps of one call, between which progress is told and the state is kept."""
LONGEST_FACTOR = 20
SIGN = "what the examples of sign 1 want"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learning:
    """How vectors are trained.

    Defaults are those of 2604.08524, but for po's rate, which is 0.04 there, in the model's own units.
    """

    method: Literal["ntp", "po"] = "po"
    """Cross-entropy of the wanted completion, or preference of it over the unwanted one."""
    epochs: int = 10
    """Times that every example is seen; batches that it does not fill take some once more."""
    batch: int | None = None
    """Examples of a step (default: 6, po 12)."""
    rate: Positive = 0.01
    """Learning rate of AdamW, which falls to 0 in a line."""
    factors: tuple[Positive, ...] = tuple(range(2, LONGEST_FACTOR + 1, 2))
    """Strengths that are drawn from, in twentieths of a mean norm of the stream for a vector of unit entries."""
    tokens: Annotated[int, Range(1, 4096)] = 64
    """Of a completion; what is longer is cut."""
    decay: Weight = 0.0
    """Weight decay of AdamW."""
    kappa: Weight = 0.02
    """How much more a preferred completion counts that the model holds less likely (po)."""

    def __post_init__(self) -> None:
        """Refuse what no vector could be trained with."""
        object.__setattr__(self, "factors", tuple(self.factors))
        if not self.factors:
            raise UserError("Learning has no factors: give at least one strength to train at")

    @property
    def both(self) -> bool:
        """Whether unwanted completions are learned from, too."""
        return self.method == "po"

    @property
    def examples(self) -> int:
        """Of a step."""
        return self.batch or {"ntp": 6, "po": 12}[self.method]

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """AdamW behind a clip to norm 1."""
        rate = optax.linear_schedule(self.rate, 0.0, steps)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=self.decay))


@struct.dataclass
class _Problem:
    """What one vector is trained on, the same for all steps; leading axes are groups and their problems."""

    layer: Int[Array, "*p"]
    unit: Float[Array, "*p"]
    order: Int[Array, "*p steps b"]
    """Numbers of the examples of every step."""
    factor: Float[Array, "*p steps b"]


@dataclasses.dataclass(frozen=True)
class _Program:
    """What is compiled for."""

    config: ModelConfig
    learning: Learning
    kind: str
    start: int
    """The first layer that any of the problems touches."""
    steps: int
    """Of a training; the schedule ends there."""


def learn_vectors(
    model: Model,
    examples: Sequence[Example],
    sites: str | Sequence[str],
    *,
    learning: Learning = Learning(),
    seeds: Sequence[Seed] = (0,),
    positions: str = "all",
    state: str | Path | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> list[Vectors]:
    """One vector for every site and seed (all seeds of the first site first), each trained from its own random start.

    A vector comes as the mean push of its training, and its coefficient is that in mean norms of the stream: choose the
    strength on questions that it was not trained on. ``positions`` names the tokens that are steered (``select``).
    ``state`` is a file in which a training that was cut off goes on, to the same result; it is removed when all is
    done. ``progress(done, total, loss)`` counts steps, each of all vectors. Metadata hold the mean loss of the first
    and of the last tenth of the steps.

    Raises ``UserError`` for sites that are not in blocks or not of one kind, for ``po`` without unwanted completions,
    for texts longer than the model's positions, and where the loss stops being finite.
    """
    must_be(model, Model, "learn_vectors' model")
    must_be(state, (str, Path, type(None)), "state, a file,")
    state, seeds = None if state is None else user_path(state), as_tuple(seeds)
    found, selector = _checked(model, examples, sites, learning, seeds), select(positions)
    data = completions_of(model, examples, learning.both, learning.tokens)
    mean_norm = mean_norms(model, np.asarray(data.tokens[0, :64]), list(found), np.asarray(data.mask[0, :64]))
    problems = [(name, seed) for name in found for seed in seeds]
    shape = KINDS[found[problems[0][0]].kind].token_shape(model.config)
    size, steps = math.prod(shape), math.ceil(len(examples) / learning.examples) * learning.epochs
    group = _side_by_side(model, data, learning, len(problems))
    padded = problems + problems[-1:] * (-len(problems) % group)
    placed = functools.partial(_place, model, group)
    units = [mean_norm[name] / (LONGEST_FACTOR * math.sqrt(size)) for name, _ in padded]
    together = placed(_problems(found, padded, units, len(examples), steps, learning))
    begin = np.stack([0.01 * np.random.default_rng([seed, 0]).standard_normal(size) for _, seed in padded])
    vector = jnp.asarray(begin, jnp.float32)
    now: Any = placed((vector, jax.vmap(learning.optimizer(steps).init)(vector)))
    program = _Program(
        model.config, learning, found[problems[0][0]].kind, min(site.layer for site in found.values()), steps
    )
    about = {"model": model.fingerprint, "positions": repr(positions), "problems": problems, "data": digest(data)}
    asked = json.dumps(about | dataclasses.asdict(learning))
    begun, losses = 0, np.zeros((len(padded), 0), np.float32)
    if state is not None and state.is_file():
        begun, losses, now = _restored(state, asked, now)
    for step in range(begun, steps, CHUNK):
        now, new = _advance(model.params, data, selector, together, now, jnp.asarray(step), program=program)
        losses = np.concatenate([losses, to_host(new).reshape(len(padded), -1)], axis=1)[:, :steps]
        if not np.isfinite(losses).all():
            raise UserError(f"Learning steering vectors failed at step {step + CHUNK}: {LOGITS_NOT_FINITE}")
        if state is not None:
            _keep(state, asked, losses, now)
        if progress is not None:
            progress(losses.shape[1], steps, float(losses[:, -CHUNK:].mean()))
    if state is not None:
        state.unlink(missing_ok=True)
    pushes = to_host(now[0]).reshape(len(padded), size) * np.asarray(units)[:, None] * np.mean(learning.factors)
    tenth = max(1, steps // 10)
    return [
        Vectors(
            arrays={name: push.reshape(shape).astype(np.float32)},
            coefficient=float(np.linalg.norm(push) / mean_norm[name]),
            coefficient_units="mean_resid_norm",
            mean_resid_norm={name: mean_norm[name]},
            sign=SIGN,
            model=model.name,
            fingerprint=model.fingerprint,
            positions=positions,
            metadata={
                "estimator": learning.method,
                "seed": str(seed),
                "learning": json.dumps(dataclasses.asdict(learning)),
                "n_examples": str(len(examples)),
                "loss_first": repr(float(loss[:tenth].mean())),
                "loss_last": repr(float(loss[-tenth:].mean())),
            },
        )
        for (name, seed), push, loss in zip(problems, pushes, losses, strict=False)
    ]


def _checked(
    model: Model,
    examples: Sequence[Example],
    sites: str | Sequence[str],
    learning: Learning,
    seeds: Sequence[int],
) -> dict[str, Site]:
    """Sites by name."""
    must_be(learning, Learning, "learning")
    check_ranges(learning)
    for number, example in enumerate(examples):
        must_be(example, Example, f"example {number}")
    bad = [seed for seed in seeds if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0]
    if bad or not len(seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds must be different whole numbers from 0, at least one; got {list(seeds)}")
    bos = getattr(model.tokenizer, "bos_token_id", None)
    completions = [c for e in examples for c in (e.wanted, e.unwanted) if c is not None and len(c)]
    if bos is not None and any(c[0] == bos for c in completions):
        raise UserError(
            "a completion begins with BOS, which stands at the beginning of a text alone: encode completions with "
            "add_special_tokens=False"
        )
    check_examples(examples, learning.both, model.config.max_positions, learning.tokens)
    named = find_sites([sites] if isinstance(sites, str) else sites, model.config).values()
    found = {site.name: site for site in named}
    kinds = {site.kind for site in named}
    if len(kinds) != 1 or not all(KINDS[kind].in_block and not KINDS[kind].over_keys for kind in kinds):
        raise UserError(
            f"vectors are learned side by side at one kind of site in blocks, got {', '.join(found) or 'none'}: call "
            f"learn_vectors once for each kind"
        )
    return found


def _side_by_side(model: Model, data: Completions, learning: Learning, problems: int) -> int:
    """Problems of one pass: a multiple of the mesh's rows."""
    shards = 1 if model.mesh is None else model.mesh.shape["prompts"]
    one = learning.examples * data.tokens.shape[0] * data.tokens.shape[2]
    return shards * max(1, min(room() // one, -(-problems // shards)))


def _place(model: Model, group: int, tree: Any) -> Any:
    """Arrays [P, ...] as [groups, problems of a group, ...], these spread over "prompts"."""

    def one(array: Array) -> Array:
        array = array.reshape(-1, group, *array.shape[1:])
        if model.mesh is None:
            return array
        return put(array, place(model.mesh, P(None, "prompts"), array.shape))

    return jax.tree.map(one, tree)


def _problems(
    found: dict[str, Site],
    problems: Sequence[tuple[str, int]],
    units: Sequence[float],
    n: int,
    steps: int,
    learning: Learning,
) -> _Problem:
    """Arrays with a leading axis over problems. What is drawn depends on the seed alone."""
    per_epoch = steps // learning.epochs
    order, factor = [], []
    for _, seed in problems:
        rng = np.random.default_rng([seed, 1])
        epochs = [np.resize(rng.permutation(n), (per_epoch, learning.examples)) for _ in range(learning.epochs)]
        order.append(np.concatenate(epochs))
        factor.append(rng.choice(learning.factors, order[-1].shape))
    more = -steps % CHUNK  # steps behind the end, at a rate of 0
    return _Problem(
        layer=jnp.asarray([found[name].layer for name, _ in problems], jnp.int32),
        unit=jnp.asarray(units, jnp.float32),
        order=jnp.asarray(np.pad(np.stack(order), ((0, 0), (0, more), (0, 0))), jnp.int32),
        factor=jnp.asarray(np.pad(np.stack(factor), ((0, 0), (0, more), (0, 0)), "edge"), jnp.float32),
    )


@functools.partial(jax.jit, static_argnames="program", donate_argnums=4)
def _advance(
    params: Params,
    data: Completions,
    selector: Selector,
    problems: _Problem,
    now: Any,
    step: Int[Array, ""],
    *,
    program: _Program,
) -> tuple[Any, Float[Array, "groups problems chunk"]]:
    """``CHUNK`` steps of all vectors: (vector, state of the optimizer), and the losses."""
    optimizer = program.learning.optimizer(program.steps)

    def one(problem: _Problem, now: Any) -> tuple[Any, Float[Array, " chunk"]]:
        def update(now: Any, step: Array) -> tuple[Any, Array]:
            vector, kept = now
            chosen = problem.order[step]
            few = take(data, chosen)
            amount = problem.factor[step] * problem.unit * few.sign
            loss, slope = jax.value_and_grad(vector_loss)(
                vector, params, few, selector, problem.layer, amount, program=program
            )
            change, kept = optimizer.update(slope, kept, vector)
            return (optax.apply_updates(vector, change), kept), loss

        return lax.scan(update, now, step + jnp.arange(CHUNK))

    return lax.map(lambda group: jax.vmap(one)(*group), (problems, now))


def vector_loss(
    vector: Float[Array, " F"],
    params: Params,
    data: Completions,
    selector: Selector,
    layer: Int[Array, ""],
    amount: Float[Array, " b"],
    *,
    program: _Program,
) -> Float[Array, ""]:
    """Mean loss of a batch of examples (all of ``data``) when ``amount * vector`` is added."""
    k, b = data.tokens.shape[:2]
    edit = Edit(
        operation="add",
        kind=program.kind,
        layers=jnp.broadcast_to(layer, (1, 1)),
        amount=jnp.tile(amount, k)[:, None],
        vector=vector[None, None, None],
        head=jnp.full((1, 1), -1, jnp.int32),
        selector=selector,
    )
    log_p = completion_log_probs(params, data, edit, config=program.config, start=program.start)
    counts = (data.target >= 0).sum(-1)
    if program.learning.method == "ntp":
        return -(log_p[0] / counts[0]).mean()
    beta = jnp.maximum((data.reference[1] - data.reference[0]) * program.learning.kappa, 1.0)
    return -jax.nn.log_sigmoid(beta * log_p[0] / counts[0] - log_p[1] / counts[1]).mean()


def _keep(file: Path, asked: str, losses: np.ndarray, now: Any) -> None:
    leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(to_host(now)))}
    write_bytes(file, tensor_bytes({**leaves, "losses": losses}, {"asked": asked}))


def _restored(file: Path, asked: str, now: Any) -> tuple[int, np.ndarray, Any]:
    """Step, losses and state of a training that was cut off. Raises ``UserError`` for that of others."""
    tensors, about = read_tensors(file, "state of a training of vectors")
    leaves, structure = jax.tree.flatten(now)
    fits = set(tensors) == {"losses", *map(str, range(len(leaves)))} and all(
        tensors[str(i)].shape == leaf.shape and tensors[str(i)].dtype == leaf.dtype for i, leaf in enumerate(leaves)
    )
    if about.get("asked") != asked or not fits:
        raise UserError(
            f"{file} is the state of another training: of other examples, sites, options or another model. Remove it, "
            f"or repeat what it was begun with"
        )
    kept = [put(tensors[str(i)], leaf.sharding) for i, leaf in enumerate(leaves)]
    return tensors["losses"].shape[1], tensors["losses"], jax.tree.unflatten(structure, kept)
