"""How many CPU devices a search of many problems gets, decided before JAX begins (so in a process of its own)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, os, sys
import jax
from jaxsteer.cli.cores import use_cores
from jaxsteer.models import sharding
from jaxsteer.study import SearchOptions
from jaxsteer.study.problem_table import number_of_searches

os.sched_getaffinity = lambda _: {0, 1, 2, 3}

def devices(**options):
    jax.config.update("jax_num_cpu_devices", -1)
    chosen = SearchOptions.of(out="unused", model=sys.argv[1], **options)
    use_cores(number_of_searches(chosen), chosen.model)
    return jax.config.jax_num_cpu_devices

found = {
    "one": devices(),
    "three": devices(restarts=3),
    "many": devices(vary=("seed=0:100",)),
    "two varied": devices(vary=("seed=0:2",)),
    "split weights": devices(restarts=3, mesh_model=2),
}
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
found["flags"] = devices(restarts=3)
del os.environ["XLA_FLAGS"]
sharding.free_memory = lambda: 8 * 3 * int(sys.argv[2])
found["memory for three"] = devices(restarts=4)
sharding.free_memory = lambda: 8 * int(sys.argv[2])
found["memory for one"] = devices(restarts=4)
jax.config.update("jax_num_cpu_devices", 2)
use_cores(3, SearchOptions.of(out="unused", model=sys.argv[1]).model)
found["given"] = jax.device_count()
print(json.dumps(found))
"""


def test_a_device_per_core_search_and_copy_of_the_weights(model_dir: Path) -> None:
    from jaxsteer.checkpoints.inspect import describe, parameters

    size = 4 * parameters(describe(str(model_dir)).config)["total"]
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    command = [sys.executable, "-c", SCRIPT, str(model_dir), str(size)]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "one": -1,
        "three": 3,
        "many": 4,
        "two varied": 2,
        "split weights": -1,
        "flags": -1,
        "memory for three": 3,
        "memory for one": -1,
        "given": 2,
    }
