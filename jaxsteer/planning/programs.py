"""The programs that plans compile: those that searches, SAEs and decoding run, on shapes in place of arrays.

Letters: R problems, P population, S prompt length, C contexts, B rows, T tokens, D width, F latents, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsteer.circuits.attribution import along_inputs
from jaxsteer.circuits.patching import Patch, begin_walk, walk_on
from jaxsteer.circuits.rows import Rows
from jaxsteer.explain.options import ExplainOptions
from jaxsteer.explain.vocabulary import mean_rows
from jaxsteer.explain.words import CHUNK, keeps, mutual_blocks, normed
from jaxsteer.files.sae_form import SAEConfig
from jaxsteer.models import decoding
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import run_layers
from jaxsteer.models.padding import bucket
from jaxsteer.models.params import Layers, Params, layer_shapes, top_shapes
from jaxsteer.models.reading import read_batch
from jaxsteer.models.sampling import plain_sampling
from jaxsteer.models.sharding import place, stack_shardings, top_shardings
from jaxsteer.models.sites import parse_site, resid_site
from jaxsteer.models.transformer import embed, make_context
from jaxsteer.objectives import LogitDifference, Projection, Standardised, needs
from jaxsteer.prompt_search.algorithms import ALGORITHMS
from jaxsteer.prompt_search.compiling import WAVE, programs
from jaxsteer.prompt_search.contexts import make_task
from jaxsteer.prompt_search.problem import abstract as abstract_problems
from jaxsteer.prompt_search.problem import make_problem
from jaxsteer.prompts.slots import Slots
from jaxsteer.ranges import check_ranges
from jaxsteer.sae.dictionary import SAE, SPECS, encode
from jaxsteer.steer import add

What = Literal[
    "search", "sae", "explain", "generate", "states", "axis", "attribution", "patching", "circuits", "convert"
]
_REPLICATED = P()
_PREFIX_SPEC = P(None, None, "model", None, None)
_TAIL = 8
"""Tokens of a context between the prompt and where the objective reads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What is to be done, and how large it is."""

    what: What = "search"
    """A search step; the latents of an SAE on text; words for all its latents (explain); one decoded token of steered
    answers; mean states of rows at every block; rollouts of characters, written and read; the edges of a push, or its
    patched heads, or both (circuits); conversion and loading."""
    problems: int = 64
    """Searches at once, each with its own population (elsewhere: rows of text)."""
    algorithm: Literal["epo", "gcg", "mutation", "pez", "gbda", "soft"] = "epo"
    """How the search makes candidates."""
    population: int = 16
    """Prompts of each search that have children."""
    children: int = 32
    """Candidates per prompt and step."""
    prompt_length: int = 20
    """Tokens of a searched prompt."""
    contexts: int = 16
    """Conversations that every candidate is scored in."""
    context_length: int = 128
    """Tokens of each before the prompt (generate, axis: of a row's prompt; elsewhere: of a row)."""
    new_tokens: int = 128
    """generate, axis: longest answer."""
    roles: int = 275
    """axis: characters, the Assistant not counted."""
    rollouts: int = 1200
    """axis: of each character."""
    latents: int = 65_536
    """sae, explain: width of the dictionary."""
    words: int = 5000
    """explain: words that latents are explained by."""
    site: str | None = None
    """Where the objective reads, the SAE encodes or the answer is steered (default: after the middle block)."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Of the weights."""

    def __post_init__(self) -> None:
        """Raise ``UserError`` for sizes that cannot be."""
        check_ranges(self)

    def depth(self, config: ModelConfig) -> int:
        """Layers that run before the site."""
        return parse_site(self.read_site(config), config.n_layers).depth(config.n_layers)

    def read_site(self, config: ModelConfig) -> str:
        """The site, or the one in the middle."""
        return self.site or f"blocks.{(config.n_layers - 1) // 2}.hook_resid_post"


class Program(NamedTuple):
    """One program on shapes, ready to be compiled."""

    compile: Callable[[], Any]
    """Gives the compiled program; raises what the compiler raises."""
    weights: int
    """Bytes of weights on each device."""
    caches: int
    """Bytes on each device of what lives from step to step: keys and values, and the state of the work."""
    trips: tuple[int, ...]
    """Trip counts of loops whose length is data, outermost first: problems of a device; then one, for one step."""
    per_step: int
    """What one step makes (candidates, tokens), on all devices together."""
    unit: str


def build(work: Workload, config: ModelConfig, mesh: Mesh, *, batch: int | None = None) -> Program:
    """The program of ``work`` for a model of ``config`` on ``mesh``.

    ``batch`` is the micro-batch of a search, candidates scored at once (default: as ``make_task`` chooses).
    """
    if work.what in ("attribution", "patching"):
        return circuit_program(work, config, mesh)
    builder = {"search": _search, "sae": _sae, "explain": _explain, "generate": _generate, "states": _states}[work.what]
    return builder(work, config, mesh, batch)


def abstract(mesh: Mesh, tree: Any, spec: P = _REPLICATED) -> Any:
    """Shapes of the leaves of ``tree`` (arrays or shapes), placed on ``mesh`` as ``spec`` says where it fits."""

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        where = place(mesh, P(*spec[: len(leaf.shape)]), leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(one, tree)


def abstract_params(config: ModelConfig, mesh: Mesh, dtype: str) -> Params:
    """The parameters as ``load`` places them, as shapes."""

    def leaf(shape: tuple[int, ...], sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    stacks, top = stack_shardings(config, mesh), top_shardings(config, mesh)
    layers = {name: leaf((config.n_layers, *shape), stacks[name]) for name, shape in layer_shapes(config).items()}
    outer = {name: leaf(shape, top[name]) for name, shape in top_shapes(config).items()}
    return Params(layers=Layers(**layers), **outer)


def per_device(tree: Any) -> int:
    """Bytes that placed shapes take on each device."""

    def one(leaf: Any) -> int:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
            return int(math.prod(leaf.shape) * leaf.dtype.itemsize)
        return int(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize)

    return sum(map(one, jax.tree.leaves(tree)))


def _compiler(mesh: Mesh, traced: Callable[[], Any]) -> Callable[[], Any]:
    """A function that traces, lowers for the platform of the mesh, and compiles."""
    platform = mesh.devices.flat[0].platform
    platform = platform if platform in ("tpu", "cpu") else "cuda" if platform in ("gpu", "cuda") else platform
    return lambda: traced().lower(lowering_platforms=(platform,)).compile()


def _search(work: Workload, config: ModelConfig, mesh: Mesh, batch: int | None) -> Program:
    """One step of all problems, by the function that ``run_search`` runs."""
    kind, make_search = ALGORITHMS[work.algorithm]
    known = {field.name for field in dataclasses.fields(kind)}
    sizes = {"population": work.population, "children": work.children}
    hyper = kind(**{name: size for name, size in sizes.items() if name in known})
    search = make_search(hyper)
    params = abstract_params(config, mesh, work.dtype)
    site = work.read_site(config)
    projection = Projection(delta=np.zeros(config.d_model, np.float32), site=site)  # type: ignore[arg-type]
    objective = Standardised(objective=projection, offset=jnp.float32(0), scale=jnp.float32(1))
    slots = Slots(
        # They differ: what contexts have in common is computed once.
        before=[np.full(work.context_length, c % config.vocab_size, np.int32) for c in range(work.contexts)],
        after=[np.ones(_TAIL, np.int32)] * work.contexts,
        read_index=np.full(work.contexts, work.prompt_length + _TAIL - 1, np.int32),
        closing=[np.ones(_TAIL, np.int32)] * work.contexts,
        conversations=(),
        length=work.prompt_length,
        surroundings=(),
    )
    reads, allowed = needs(objective, config), np.ones(config.vocab_size, bool)
    task = jax.eval_shape(lambda p: make_task(p, config, slots, needs=reads, allowed=allowed, batch=batch), params)
    prefix = dataclasses.replace(
        abstract(mesh, task.prefix),
        k=abstract(mesh, task.prefix.k, _PREFIX_SPEC),
        v=abstract(mesh, task.prefix.v, _PREFIX_SPEC),
    )
    task = dataclasses.replace(abstract(mesh, task), prefix=prefix)
    shards, every = mesh.shape["prompts"], P("prompts")
    each = -(-work.problems // shards)  # problems of a device; more than WAVE wait on the host
    problem = make_problem(objective, hyper.population)
    problems = abstract(mesh, abstract_problems(problem, shards * min(each, WAVE)), every)
    counts = abstract(mesh, jax.ShapeDtypeStruct((shards,), jnp.int32), every)
    start, advance = programs(search, mesh)
    state = abstract(mesh, jax.eval_shape(start, params, task, problems, counts), every)
    stop = abstract(mesh, jax.ShapeDtypeStruct((), jnp.int32))
    return Program(
        compile=_compiler(mesh, lambda: advance.trace(params, task, problems, state, counts, stop)),
        weights=per_device(params),
        caches=per_device((task, problems, state)),
        trips=(each, 1),
        per_step=search.candidates * work.problems,
        unit="candidates",
    )


def _abstract_sae(latents: int, width: int, mesh: Mesh) -> SAE:
    shapes = {"W_enc": (width, latents), "W_dec": (latents, width), "b_enc": (latents,)}
    shapes |= {"b_dec": (width,), "threshold": (latents,)}
    leaves = {
        name: abstract(mesh, jax.ShapeDtypeStruct(shape, jnp.float32), SPECS[name]) for name, shape in shapes.items()
    }
    return SAE(**leaves, config=SAEConfig(activation="jumprelu"))


def _explain(work: Workload, config: ModelConfig, mesh: Mesh, batch: int | None) -> Program:
    """The words of all latents by mutual information, with model and SAE in memory: ``explain_words``."""
    params, sae = abstract_params(config, mesh, work.dtype), _abstract_sae(work.latents, config.d_model, mesh)
    ids = abstract(mesh, jax.ShapeDtypeStruct((work.words, 1), jnp.int32))
    lengths = abstract(mesh, jax.ShapeDtypeStruct((work.words,), jnp.int32))
    held = min(CHUNK, -(-work.latents // mesh.size)) * mesh.size

    @functools.partial(jax.jit, keep_unused=True)  # what is in memory counts, read or not
    def words(params: Params, sae: SAE, ids: jax.Array, lengths: jax.Array) -> Any:
        vectors = jnp.pad(normed(params, config, sae.W_dec), ((0, -work.latents % held), (0, 0)))
        blocks = vectors.reshape(-1, held, config.d_model)
        blocks = jax.lax.with_sharding_constraint(blocks, place(mesh, P(None, tuple(mesh.axis_names)), blocks.shape))
        top = min(ExplainOptions().top, work.words)
        keep = keeps(work.latents, work.words)
        return mutual_blocks(blocks, mean_rows(params, ids, lengths), work.latents, top=top, bayes=True, keep=keep)

    return Program(
        compile=_compiler(mesh, lambda: words.trace(params, sae, ids, lengths)),
        weights=per_device((params, sae)),
        caches=0,
        trips=(),
        per_step=work.latents,
        unit="latents",
    )


def _sae(work: Workload, config: ModelConfig, mesh: Mesh, batch: int | None) -> Program:
    """Latents of every token of some rows of text, from the embeddings on."""
    params = abstract_params(config, mesh, work.dtype)
    tokens = abstract(mesh, jax.ShapeDtypeStruct((work.problems, work.context_length), jnp.int32), P("prompts"))
    sae = _abstract_sae(work.latents, config.d_model, mesh)

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, P("prompts", None, "model")))
    def latents(params: Params, sae: SAE, tokens: jax.Array) -> jax.Array:
        context = make_context(config, jnp.arange(tokens.shape[1])[None])
        x = embed(params, config, tokens, context.positions)
        x = run_layers(params, config, x, context, 0, work.depth(config))
        return encode(sae, x)

    return Program(
        compile=_compiler(mesh, lambda: latents.trace(params, sae, tokens)),
        weights=per_device((params, sae)),
        caches=0,
        trips=(),
        per_step=work.problems * work.context_length,
        unit="tokens",
    )


def _states(work: Workload, config: ModelConfig, mesh: Mesh, batch: int | None) -> Program:
    """The mean of the stream over some tokens of every row, at the output of every block."""
    params = abstract_params(config, mesh, work.dtype)
    shape = (work.problems, work.context_length)
    tokens = abstract(mesh, jax.ShapeDtypeStruct(shape, jnp.int32), P("prompts"))
    weights = abstract(mesh, jax.ShapeDtypeStruct(shape, jnp.float32), P("prompts"))
    sites = tuple(parse_site(resid_site(layer), config.n_layers).as_stream() for layer in range(config.n_layers))
    return Program(
        compile=_compiler(mesh, lambda: read_batch.trace(params, config, tokens, weights, sites=sites)),
        weights=per_device(params),
        caches=0,
        trips=(),
        per_step=work.problems * work.context_length,
        unit="tokens",
    )


def circuit_program(work: Workload, config: ModelConfig, mesh: Mesh) -> Program:
    """EAP-IG of all edges above a vector at the site ("attribution"), or one walk through the blocks above it with a
    head patched ("patching"), of rows that are read at their last token."""
    params, metric = (
        abstract_params(config, mesh, work.dtype),
        LogitDifference(plus=jnp.zeros(1, int), minus=jnp.ones(1, int)),
    )
    start = min(config.n_layers - 1, work.depth(config))
    count, length, every = work.problems, work.context_length, P("prompts")
    shape: Any = lambda dtype, *sizes: jax.ShapeDtypeStruct((count, *sizes), dtype)  # noqa: E731
    numbers = {name: shape(jnp.int32, 1) for name in ("read", "context")}
    rows = Rows(
        tokens=shape(jnp.int32, length), mask=shape(jnp.bool_, length), weight=shape(jnp.float32, 1), **numbers,
        prompt_length=shape(jnp.int32),
    )  # fmt: skip
    rows = abstract(mesh, rows, every)
    edits = abstract(mesh, jax.tree.map(np.asarray, add(work.read_site(config), np.ones(config.d_model, np.float32))))
    reads, objective = needs(metric, config), abstract(mesh, jax.tree.map(np.asarray, metric))
    known: dict[str, Any] = dict(weights=per_device(params), per_step=count * length, unit="tokens")
    if work.what == "attribution":
        stream = abstract(mesh, shape(jnp.dtype(work.dtype), length, config.d_model), every)
        weight, alphas = (
            abstract(mesh, shape(jnp.float32), every),
            abstract(mesh, jax.ShapeDtypeStruct((10,), jnp.float32)),
        )
        call = functools.partial(
            along_inputs.trace, params, config, rows, stream, stream, None, objective, weight, alphas
        )
        return Program(
            compile=_compiler(mesh, lambda: call(needs=reads, start=start, per="head")), caches=per_device(stream) * 2,
            trips=(), **known,
        )  # fmt: skip
    kind = "attn.hook_z"
    walk = jax.eval_shape(lambda p, r, e: begin_walk(p, config, r, e, needs=reads, kind=kind), params, rows, edits)
    walk = abstract(mesh, walk, every)
    put = Patch(
        kind=kind, layer=abstract(mesh, jax.ShapeDtypeStruct((), jnp.int32)), value=walk.value,
        positions=abstract(mesh, shape(jnp.bool_, length), every), head=abstract(mesh, shape(jnp.int32), every),
    )  # fmt: skip
    ends = (abstract(mesh, jax.ShapeDtypeStruct((), jnp.int32)),) * 2
    return Program(
        compile=_compiler(
            mesh, lambda: walk_on.trace(params, config, rows, walk, put, edits, objective, ends, needs=reads)
        ),
        caches=per_device((walk, put)), trips=(max(1, (config.n_layers - start + 1) // 2),), **known,
    )  # fmt: skip


def _generate(work: Workload, config: ModelConfig, mesh: Mesh, batch: int | None) -> Program:
    """One more token of rows that each have a prompt of their own, with a vector added at the site."""
    params = abstract_params(config, mesh, work.dtype)
    rows, room = work.problems, bucket(work.new_tokens)
    shape: Any = jax.ShapeDtypeStruct((rows, work.context_length), jnp.int32)
    numbers: Any = jax.ShapeDtypeStruct((rows,), jnp.int32)
    sampling = jax.eval_shape(lambda: plain_sampling(config.vocab_size))
    steering = add(work.read_site(config), np.ones(config.d_model, np.float32), positions="response")
    edits = abstract(mesh, jax.tree.map(np.asarray, steering))
    mask: Any = jax.ShapeDtypeStruct(shape.shape, jnp.bool_)
    prompts = decoding.Batch(tokens=shape, mask=mask, groups=numbers, rows=numbers, limit=numbers)
    begin = functools.partial(decoding.start, slots=room, mesh=mesh)
    _, made = jax.eval_shape(lambda params, *rest: begin(params, config, *rest), params, prompts, sampling, edits)
    state = abstract(mesh, made, P("prompts"))
    cache = dataclasses.replace(
        state.cache,
        k=abstract(mesh, made.cache.k, decoding.CACHE_SPEC),
        v=abstract(mesh, made.cache.v, decoding.CACHE_SPEC),
    )
    state = dataclasses.replace(state, cache=cache)
    steps = abstract(mesh, jax.ShapeDtypeStruct((), jnp.int32))
    return Program(
        compile=_compiler(mesh, lambda: decoding.decode.trace(params, config, None, state, edits, steps)),
        weights=per_device(params),
        caches=per_device(state),
        trips=(1,),
        per_step=rows,
        unit="tokens",
    )
