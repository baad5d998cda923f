"""Plans on CPU devices: what the compiled search step needs, how it is split, and what is told of it."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxsteer.checkpoints.inspect import memory, parameters
from jaxsteer.cli import main
from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig, llama_config
from jaxsteer.models.params import init_params
from jaxsteer.models.sharding import shard_params
from jaxsteer.objectives import Projection, needs
from jaxsteer.planning import Chip, Plan, Topology, Workload, efficiency, make_plan, topology
from jaxsteer.planning import plan as planning
from jaxsteer.planning.chips import SLICES, chips_in, slices_up_to
from jaxsteer.planning.hlo import Costs
from jaxsteer.planning.plan import _bytes_needed, mesh_shapes
from jaxsteer.planning.programs import _TAIL as TAIL
from jaxsteer.planning.programs import build
from jaxsteer.prompt_search import make_task
from jaxsteer.prompts.slots import Slots

WORK = Workload(problems=8, population=2, children=3, prompt_length=3, contexts=2, context_length=6, dtype="float32")


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return llama_config(
        vocab_size=64, d_model=32, n_layers=4, n_heads=4, n_kv_heads=2, d_mlp=64, max_positions=64, tied_embeddings=True
    )


@pytest.fixture(scope="module")
def target() -> Topology:
    return topology("cpu:8")


@pytest.fixture(scope="module")
def plan(config: ModelConfig, target: Topology) -> Plan:
    return make_plan("tiny", config, target, WORK, mesh=(4, 2), micro_batch=2)


def search_flops(config: ModelConfig, work: Workload) -> float:
    """Matrix products of one step of one problem, by hand: children are scored, parents give a gradient as well.

    For the gradient, layers run forward, again when they are rematerialised, and backward with respect to activations
    alone (to both factors in attention): weights are constants.
    """
    d, n, k, h, i, v = config.d_model, config.n_heads, config.n_kv_heads, config.d_head, config.d_mlp, config.vocab_size
    s, c, depth, p = work.prompt_length, work.contexts, work.depth(config), work.population

    def layers(tokens: int, keys: int, count: int, products: int, pairs: int) -> float:
        weights = 2 * tokens * (d * (n + 2 * k) * h + n * h * d + 3 * d * i)
        return count * (products * weights + pairs * 2 * 2 * tokens * keys * n * h)

    def scored(candidates: int, products: int, pairs: int) -> float:
        t, rows = s + TAIL, candidates * c
        below = layers(rows * t, work.context_length + t, depth, products, pairs)
        above = layers(rows * (s - 1), work.context_length + s - 1, config.n_layers - depth, products, pairs)
        return below + above + products * 2 * rows * (s - 1) * d * v

    proposals = 2 * p * s * (c + 1) * d * v
    return scored(p * work.children, 1, 1) + scored(p, 3, 4) + proposals


def test_flops_are_those_counted_by_hand(config: ModelConfig, plan: Plan):
    assert plan.costs is not None
    by_hand = search_flops(config, WORK) * WORK.problems / 4 / 2  # a quarter of the problems, half of the weights
    assert plan.costs.flops == pytest.approx(by_hand, rel=0.05)


def test_nothing_crosses_prompts_and_weights_are_split(config: ModelConfig, plan: Plan):
    assert plan.costs is not None and {axis for _, axis in plan.costs.collectives} == {"model"}
    assert plan.weights == memory(config, "float32", model=2)["weights"]
    assert plan.weights == pytest.approx(parameters(config)["total"] * 4 / 2, rel=0.05)
    assert plan.fits and plan.temporaries is not None
    assert plan.total >= plan.weights + plan.caches + plan.temporaries


@pytest.mark.slow  # a second compilation
def test_more_problems_are_more_turns_of_the_same_loops(config: ModelConfig, target: Topology, plan: Plan):
    work = dataclasses.replace(WORK, problems=2 * WORK.problems)
    double = make_plan("tiny", config, target, work, mesh=(4, 2), micro_batch=2)
    assert double.costs is not None and plan.costs is not None
    assert double.costs.flops == pytest.approx(2 * plan.costs.flops, rel=0.01)
    assert set(double.costs.collectives) == set(plan.costs.collectives)
    assert double.per_step == 2 * plan.per_step


@pytest.mark.parametrize(
    ("problems", "mesh", "each"), [(8, (4, 2), 2), (16, (4, 2), 4), (9, (8, 1), 2), (3, (8, 1), 1)]
)
def test_problems_of_a_device(config: ModelConfig, target: Topology, problems: int, mesh: tuple[int, int], each: int):
    program = build(dataclasses.replace(WORK, problems=problems), config, planning.device_mesh(target, mesh), batch=2)
    assert program.trips == (each, 1) and program.per_step == problems * 6


def test_the_planned_layout_is_that_of_a_real_task(config: ModelConfig, target: Topology):
    mesh = planning.device_mesh(target, (4, 2))
    params = shard_params(init_params(config, jax.random.key(0)), config, mesh)
    one = np.ones(6, np.int32)
    slots = Slots(
        before=[one, one], after=[one[:2], one[:2]], read_index=np.asarray([4, 4], np.int32), closing=[one[:2]] * 2,
        conversations=(), length=3, surroundings=(),
    )  # fmt: skip
    objective = Projection(delta=np.ones(32, np.float32), site="blocks.1.hook_resid_post")
    task = make_task(params, config, slots, needs=needs(objective, config), allowed=np.ones(64, bool))
    assert task.prefix.k.sharding.shard_shape(task.prefix.k.shape)[2] == config.n_kv_heads // 2


@pytest.mark.parametrize("what", ["sae", "explain", "generate", "convert"])
def test_other_work(config: ModelConfig, target: Topology, what: str):
    work = dataclasses.replace(WORK, what=what, latents=128, new_tokens=4, words=40)
    plan = make_plan("tiny", config, target, work, mesh=(4, 2))
    assert plan.fits and plan.temporaries is not None and plan.weights >= memory(config, "float32", model=2)["weights"]
    if what == "sae":  # half of the layers, and the encoder
        assert plan.costs is not None
        encoder = 2 * 8 * 6 * 32 * 128 / 8
        assert plan.costs.flops > encoder
        assert not any("prompts" in axis for _, axis in plan.costs.collectives)
    if what == "explain":
        assert plan.costs is not None
        assert plan.costs.flops == pytest.approx(2 * 128 * 40 * config.d_model / 8, rel=0.1)
        assert plan.per_step == 128 and plan.unit == "latents"
    if what == "generate":
        tokens = 8 * 2 * parameters(config)["total"] / 8
        assert plan.costs is not None and plan.costs.flops == pytest.approx(tokens, rel=0.4)
        assert plan.caches > 0


# What does not need a compiler


class Refusing:
    """Stands in for compiling: a program of a given size, refused above what there is."""

    def __init__(self, fixed: int, each: int, hbm: int):
        self.fixed, self.each, self.hbm, self.tried = fixed, each, hbm, []

    def __call__(self, name, program, target, work, shape, batch) -> Plan:
        self.tried.append(batch)
        total = self.fixed + self.each * batch
        return Plan(
            model=name, work=work, topology="t", chip=target.chip, mesh={"prompts": shape[0], "model": shape[1]},
            micro_batch=batch, weights=self.fixed, caches=0, temporaries=self.each * batch, total=total,
            fits=total <= self.hbm, costs=Costs(flops=1.0), per_step=1, unit="candidates",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("each", "best"), [(1, 512), (2, 256), (4, 128), (17, 32), (400, 2), (800, 1), (901, None)], ids=lambda n: str(n)
)
def test_the_largest_micro_batch_that_fits(
    config: ModelConfig, target: Topology, monkeypatch: pytest.MonkeyPatch, each: int, best: int | None
):
    refusing = Refusing(fixed=100, each=each, hbm=1000)
    monkeypatch.setattr(planning, "_compile_plan", refusing)
    monkeypatch.setattr(planning, "build", lambda *args, **kwargs: None)
    chip = Chip(name="t", flops=None, hbm_bytes=1000, hbm_bandwidth=None, link_bandwidth=None, source="none")
    work = dataclasses.replace(WORK, population=16, children=32, contexts=16)
    plan = make_plan("t", config, Topology("t", chip, target.devices), work, mesh=(8, 1))
    assert plan.fits == (best is not None)
    assert plan.micro_batch == (best or 1)
    assert len(refusing.tried) <= 5 and len(set(refusing.tried)) == len(refusing.tried)


def test_a_refusal_about_memory_is_understood():
    used = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 44.08G of 15.75G hbm. Exceeded by 28.33G."
    assert _bytes_needed(used) == int(44.08 * 2**30)
    assert _bytes_needed("CompileTimeHbmOom: the program needs 44.08G exceeds available HBM 15.75G") == int(
        44.08 * 2**30
    )
    early = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (48.00G) "
    assert _bytes_needed(early + "exceeds available HBM (15.75G).") == 48 * 2**30
    assert _bytes_needed("INVALID_ARGUMENT: no such thing") is None


def test_other_refusals_go_on(config: ModelConfig, target: Topology):
    def broken():
        raise RuntimeError("INTERNAL: the compiler broke")

    program = build(WORK, config, planning.device_mesh(target, (8, 1)))._replace(compile=broken)
    with pytest.raises(RuntimeError, match="broke"):
        planning._compile_plan("t", program, target, WORK, (8, 1), 1)


def test_mesh_shapes_start_where_weights_fit(config: ModelConfig, target: Topology):
    weights = parameters(config)["total"] * 4
    chip = Chip(name="t", flops=None, hbm_bytes=weights, hbm_bandwidth=None, link_bandwidth=None, source="none")
    assert list(mesh_shapes(config, Topology("t", chip, target.devices), WORK)) == [(4, 2), (2, 4), (1, 8)]
    # Two problems cannot keep four shards busy.
    few = dataclasses.replace(WORK, problems=2)
    assert next(mesh_shapes(config, Topology("t", chip, target.devices), few)) == (2, 4)


def test_roofline_is_work_over_peaks(plan: Plan):
    chip = Chip(name="t", flops=2.0, hbm_bytes=10, hbm_bandwidth=4.0, link_bandwidth=1.0, source="none")
    costs = Costs(flops=10.0, bytes_accessed=8.0, collectives={("all-reduce", "model"): (1, 2.0, 3.0)})
    made = dataclasses.replace(plan, chip=chip, costs=costs, per_step=80)
    assert made.seconds == {"compute": 5.0, "memory": 2.0, "ring": 0.0, "network": 3.0} and made.roofline == 8.0
    beside = dataclasses.replace(costs, collectives={("collective-permute", "model"): (1, 7.0, 7.0)})
    assert dataclasses.replace(made, costs=beside).roofline == 7.0
    assert made.to_json()["candidates_per_second_estimate"] == 10.0
    larger = dataclasses.replace(made, mesh={"prompts": 8, "model": 2}, per_step=120)
    assert efficiency([made, larger]) == [1.0, 0.75]


def test_slices():
    assert all(4 <= chips_in(f"{kind}:{one}") <= 256 for kind, slices in SLICES.items() for one in slices)
    assert slices_up_to("v5e:8x8") == ["v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8"]
    assert slices_up_to("cpu:8") == ["cpu:1", "cpu:2", "cpu:4", "cpu:8"]


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "v5e:2y2", "cpu:0", "cpu:none", ""])
def test_no_topology(name: str):
    with pytest.raises(UserError, match="v5e:AxB"):
        topology(name)


@pytest.mark.parametrize("name", ["gpu:H100", "gpu:H100-80G:0", "gpu:H100-80G:9999", "gpu:H100-80G:2:2", "gpu:"])
def test_no_card(name: str):
    with pytest.raises(UserError, match=r"gpu:CARD.*H100-80G, H200-141G"):
        topology(name)


def test_a_card_that_is_not_here_has_published_sizes_and_says_what_is_rough(config: ModelConfig):
    eight = topology("gpu:H100-80G:8")
    assert len(eight.devices) == 8 and len(topology("gpu:L4-24G").devices) == 1
    plan, cpu = (make_plan("t", config, target, WORK, mesh=(4, 2)) for target in (eight, topology("cpu:8")))
    assert plan.costs == cpu.costs and plan.total == cpu.total  # one program
    assert plan.chip.hbm_bytes == 80 * 10**9 and "compiled for CPUs" in plan.chip.source
    assert plan.seconds is not None and plan.seconds["compute"] == plan.costs.flops / 989e12


def test_peaks_of_cards_that_are_here_are_those_of_their_memory(monkeypatch: pytest.MonkeyPatch):
    def kind_of(kind: str, memory: int) -> Chip:
        device = SimpleNamespace(device_kind=kind, platform="gpu", memory_stats=lambda: {"bytes_limit": memory})
        monkeypatch.setattr("jax.devices", lambda _: [device])
        return topology("gpu").chip

    assert kind_of("NVIDIA A100-SXM4-40GB", 30 * 2**30).hbm_bandwidth == 1555e9
    assert kind_of("NVIDIA A100-SXM4-80GB", 60 * 2**30).hbm_bandwidth == 2039e9
    assert kind_of("NVIDIA H200", 105 * 2**30).flops == 989e12
    assert kind_of("NVIDIA H100 PCIe", 60 * 2**30).flops is None and kind_of("NVIDIA V100", 2**34).flops is None


def test_more_devices_than_there_are():
    with pytest.raises(UserError, match="JAX_NUM_CPU_DEVICES=99"):
        topology("cpu:99")


def test_without_libtpu_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install libtpu"):
        topology("v5e:4x4")


def test_a_mesh_of_other_devices(config: ModelConfig, target: Topology):
    with pytest.raises(UserError, match="3x2 has 6 devices and cpu:8 has 8"):
        make_plan("t", config, target, WORK, mesh=(3, 2))


# The command


KEYS = {
    "model", "topology", "mesh", "fits", "hbm_bytes", "bytes_per_device", "flops_per_device",
    "bytes_accessed_per_device", "collectives", "roofline_seconds_per_step", "candidates_per_second_estimate",
    "micro_batch",
}  # fmt: skip


def test_command_prints_json_of_the_agreed_keys(capsys: pytest.CaptureFixture[str]):
    command = "plan --model qwen3-0.6b --topology cpu:8 --mesh 4x2 --what convert --json"
    assert main(command.split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() >= KEYS
    assert found["bytes_per_device"].keys() == {"weights", "caches", "temporaries", "total"}
    assert found["bytes_per_device"]["weights"] == pytest.approx(596_049_920 * 2 / 2, rel=0.05)
    assert found["mesh"] == {"prompts": 4, "model": 2}


def test_command_prints_what_fits(capsys: pytest.CaptureFixture[str]):
    command = (
        "plan --model organism:llama --topology cpu:8 --mesh 8x1 --what sae --problems 8 --latents 64 "
        "--context-length 8 --dtype float32"
    )
    assert main(command.split()) == 0
    told = capsys.readouterr()
    assert "fits" in told.out and "over prompts" in told.out and "no estimate of time" in told.out
    assert "compiling for cpu:8" in told.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("--mesh eight", "PROMPTSxMODEL"), ("--mesh 3x1", "product"), ("--contexts 0", "contexts must be at least 1")],
)
def test_command_refuses(arguments: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--model", "qwen3-0.6b", "--topology", "cpu:8", *arguments.split()]) == 2
    assert message in capsys.readouterr().err
