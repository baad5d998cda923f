"""The parts of search_speed.py that go beyond a step: time to a target, compilation, many problems."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from search_speed import LENGTH, here, organism, projection, seconds_of, shown, slots_of, task_of

from jaxsteer.checkpoints.loading import load
from jaxsteer.models.config import ModelConfig, llama_config
from jaxsteer.models.params import init_params
from jaxsteer.models.sharding import make_mesh
from jaxsteer.models.sites import parse_site
from jaxsteer.personas import load_persona
from jaxsteer.prompt_search import FLUENCY, EpoConfig, Fluency, Resources, make_problem, run_search, standardise
from jaxsteer.prompt_search.algorithms import epo
from jaxsteer.prompts import build_slots, question_conversation
from jaxsteer.study import SearchOptions, choose_objective, persona_setting

SEEDS = (0, 1, 2)
REFERENCE_SEEDS, REFERENCE_STEPS = (90, 91, 92, 93, 94), 15
"""The goal is the median, over these seeds, of what a search of ours reaches in so many steps."""
MOST_S = 60
"""Seconds after which a run has not reached it."""
BATCHES = (64, 128, 512)
"""Rows in a forward call of the peer."""
SITE = "blocks.2.hook_resid_post"


def target(quick: bool) -> list[dict[str, Any]]:
    """Seconds until a prompt of the organism reaches a given projection; the same function, sizes and fluency weights.

    The direction is that of sycophancy, read at the last prompt token, in standard deviations over random prompts; BOS
    stands before the prompt. Compilation and the peer's warm-up are left out.
    """
    model = load("organism:llama")
    options = SearchOptions.of(out="unused", persona="sycophancy", site=SITE, probe=240).resolved()
    setting = persona_setting(options, model=model)
    chosen = choose_objective(setting, options.objective, seed=options.algorithm.seed)
    bos = slots_of(0, model.config.vocab_size)
    task = task_of(model.params, model.config, chosen.objective, bos)
    objective, units = standardise(model.params, task, chosen.objective)
    direction = np.asarray(chosen.objective.delta) / units["scale"]  # type: ignore[attr-defined]
    search = epo(EpoConfig())
    weights = FLUENCY["loose"]
    step = jax.jit(search.step)

    def run(seed: int, goal: float, most: float) -> tuple[float, float, int]:
        problem = make_problem(objective, 16, fluency=weights, seed=seed)
        state = jax.jit(search.init)(model.params, task, problem)
        jax.block_until_ready(step(model.params, task, problem, state))
        started = time.perf_counter()
        done, best = 0, -np.inf
        while done < most and best < goal and time.perf_counter() - started < MOST_S:
            state, _ = step(model.params, task, problem, state)
            done, best = done + 1, float(jnp.max(state.f))
        return time.perf_counter() - started, best, done

    goal = statistics.median(run(seed, np.inf, REFERENCE_STEPS)[1] for seed in REFERENCE_SEEDS)
    seeds = SEEDS[:1] if quick else SEEDS
    found = {"jaxsteer": [run(seed, goal, np.inf) for seed in seeds]}
    for batch in (2, 512) if here("torch") else ():
        found[f"torch, batch {batch}"] = [
            _torch_run(model, direction, weights, units, seed, goal, batch) for seed in seeds
        ]
    rows = []
    for name, runs in found.items():
        rows.append(
            {
                "who": name,
                "goal": goal,
                "seconds": [r[0] for r in runs],
                "best": [r[1] for r in runs],
                "steps": [r[2] for r in runs],
            }
        )
        middle = f"{statistics.median(r[0] for r in runs):8.2f} s"
        reached = sum(best >= goal for _, best, _ in runs)
        print(f"to {goal:.2f} deviations: {name:16} {middle}, reached by {reached} of {len(runs)}", flush=True)
    return rows


def _torch_run(
    model: Any, direction: np.ndarray, weights: Fluency, units: dict[str, float], seed: int, goal: float, batch: int
) -> tuple[float, float, int]:
    import torch
    import torch_peer

    search = torch_peer.Search(
        torch_peer.build(model.config, model.params),
        layer=parse_site(SITE, model.config.n_layers).layer,
        prompt_length=LENGTH,
        direction=torch.tensor(direction),
        fluency=torch.tensor(weights.weights(16)),
        contexts=[(torch.tensor([1]), torch.zeros(0, dtype=torch.long))],
        batch=batch,
        seed=seed,
    )
    offset = units["offset"] / units["scale"]
    started = time.perf_counter()
    done, best = 0, -np.inf
    while best < goal and time.perf_counter() - started < MOST_S:
        search.step()
        done, best = done + 1, float(search.target.max()) - offset
    return time.perf_counter() - started, best, done


def compile(quick: bool) -> list[dict[str, Any]]:
    """Seconds to trace and compile a step of EPO in 4 contexts, by depth."""
    rows = []
    for layers in (4, 80):
        config = llama_config(vocab_size=512, d_model=64, n_layers=layers, n_heads=4, d_mlp=128, max_positions=256)
        params = init_params(config, jax.random.key(0))
        objective = projection(config)
        task = task_of(params, config, objective, slots_of(4, config.vocab_size))
        search = epo(EpoConfig())
        problem = make_problem(objective, 16)
        state = jax.eval_shape(search.init, params, task, problem)
        started = time.perf_counter()
        jax.jit(search.step).lower(params, task, problem, state).compile()
        rows.append({"layers": layers, "seconds": time.perf_counter() - started})
        print(f"a step at {layers:2} layers compiles in {rows[-1]['seconds']:.1f} s", flush=True)
    return rows


def problems(quick: bool) -> list[dict[str, Any]]:
    """Candidates per second of ``run_search`` on the organism's shape: 4 parents and 32 children per problem."""
    rows = []
    for count, steps in ((1, 200), (16, 100), (256, 20), (4096, 3)):
        if quick and count > 16:
            break
        rate, compile_s = _searches(organism(), count, steps, EpoConfig(population=4, children=8))
        rows.append({"problems": count, "steps": steps, "candidates_per_s": rate, "compile_s": compile_s})
        print(f"{count:5} problems, {steps:3} steps: {rate:9,.0f} candidates/s", flush=True)
    return rows


def real(path: str, steps: int) -> dict[str, Any]:
    """A step of EPO of a real model and of the published loop: the same weights, conversations, sizes and read site.

    The published loop judges a candidate in one conversation, drawn for every forward call, ours in all four.
    """
    model = load(path)
    config, children = model.config, 16
    asked = [question_conversation(text) for text in load_persona("characters/pirate").ask[:4]]
    slots = build_slots(model.tokenizer, asked, LENGTH)
    objective = projection(config)
    task = task_of(model.params, config, objective, slots)
    search = epo(EpoConfig(population=8, children=children))
    problem = make_problem(objective, 8, seed=2)
    state = jax.jit(search.init)(model.params, task, problem)
    step = jax.jit(search.step)

    def one() -> Any:
        nonlocal state
        state, summary = step(model.params, task, problem, state)
        return summary

    ours = 8 * children / statistics.median(seconds_of(one, steps))
    found: dict[str, Any] = {"model": model.name, "candidates_per_s": ours, "torch": []}
    print(f"{model.name}: {ours:.1f} candidates/s, each in {len(asked)} conversations", flush=True)
    if here("torch"):
        import torch_peer

        theirs = torch_peer.build(config, model.params)
        for batch in (2, 16, 128):
            peer = torch_peer.measure(
                config, model=theirs, prompt_length=LENGTH, population=8, children=children, steps=min(steps, 3),
                batch=batch, contexts=torch_peer.contexts_of(slots.before, slots.closing),
            )  # fmt: skip
            found["torch"].append(peer)
            rate = peer["candidates_per_s"]
            print(
                f"published loop, batch {batch}: {rate:.1f} candidates/s, each in one conversation: {ours / rate:.1f} "
                f"times by candidate, {len(asked) * ours / rate:.1f} by candidate and conversation",
                flush=True,
            )
    return found


def restarts(name: str, config: ModelConfig, steps: int) -> dict[str, Any]:
    """Independent searches of 16 x 32 candidates, four per core: ours side by side, and the published loop one after
    the other with all threads and in a process per core, each at its best batch."""
    cores = sorted(os.sched_getaffinity(0))
    rate, _ = _searches(config, 4 * len(cores), steps, EpoConfig(population=16, children=32))
    found: dict[str, Any] = {"model": name, "searches": 4 * len(cores), "jaxsteer": rate}
    if here("torch"):
        found["torch"] = max(_loop_rate(config, steps, batch, [set(cores)]) for batch in BATCHES)
        found["torch_per_core"] = max(_loop_rate(config, steps, batch, [{core} for core in cores]) for batch in BATCHES)
    columns = []
    for peer in ("torch", "torch_per_core"):
        columns += [shown(found.get(peer)), shown(rate / found[peer] if peer in found else None, 1)]
    print(f"{name:12} {4 * len(cores):8} {rate:9,.0f} {' '.join(columns)}", flush=True)
    return found


def _loop_rate(config: ModelConfig, steps: int, batch: int, shares: list[set[int]]) -> float:
    """Candidates per second of the published loop, in a process for each share of the cores, all together."""
    context = multiprocessing.get_context("spawn")  # without the threads of JAX
    free: Any = context.Queue()
    for share in shares:
        free.put(share)
    with ProcessPoolExecutor(len(shares), mp_context=context, initializer=_pin, initargs=(free,)) as pool:
        done = [pool.submit(_loop, config, steps, batch, len(share)) for share in shares]
        return sum(one.result() for one in done)


def _loop(config: ModelConfig, steps: int, batch: int, threads: int) -> float:
    import torch_peer

    sizes = {"prompt_length": LENGTH, "population": 16, "children": 32}
    return torch_peer.measure(config, **sizes, steps=steps, batch=batch, threads=threads)["candidates_per_s"]


def _pin(free: Any) -> None:
    os.sched_setaffinity(0, free.get())


def _searches(config: ModelConfig, count: int, steps: int, sizes: EpoConfig) -> tuple[float, float]:
    """Candidates per second, and seconds to compile, of so many searches over the devices that there are."""
    mesh = make_mesh() if jax.device_count() > 1 else None
    params = init_params(config, jax.random.key(0))
    objective = projection(config)
    task = task_of(params, config, objective, slots_of(0, config.vocab_size))
    if mesh is not None:
        params, task = jax.device_put((params, task), NamedSharding(mesh, PartitionSpec()))
    some = [
        make_problem(
            dataclasses.replace(objective, delta=(1 + i / count) * objective.delta), sizes.population, restart=i
        )
        for i in range(count)
    ]
    result = run_search(params, task, some, epo(sizes), steps=steps, resources=Resources(mesh=mesh))
    return result.candidates / result.search_s, result.compile_s
