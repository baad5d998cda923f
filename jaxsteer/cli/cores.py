"""Many searches on the cores of a CPU: XLA is given a device per core, so that they run side by side."""

from __future__ import annotations

import contextlib
import os

from jaxsteer.study.options import ModelOptions

SHARE = 1 / 8
"""Of the free memory, that copies of the weights may take: larger models keep all cores busy with one search."""


def use_cores(searches: int, options: ModelOptions) -> None:
    """Make as many CPU devices as there are cores, searches and copies of the weights that fit.

    Nothing is done where the user has said how many there are (``JAX_NUM_CPU_DEVICES``, ``XLA_FLAGS``), where several
    processes work together, or once JAX has begun. It changes nothing where there is an accelerator.
    """
    import jax

    from jaxsteer.checkpoints.inspect import describe, parameters
    from jaxsteer.models.sharding import free_memory

    given = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if (
        given
        or getattr(jax.config, "jax_num_cpu_devices", -1) >= 0
        or jax.distributed.is_initialized()
        or options.mesh_model > 1
    ):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = min(searches, cores)
    if devices > 1:
        each = parameters(describe(options.model).config)["total"] * (2 if options.dtype == "bfloat16" else 4)
        devices = min(devices, int(SHARE * free_memory() / each))
    if devices > 1:
        with contextlib.suppress(RuntimeError):  # devices are in use already
            jax.config.update("jax_num_cpu_devices", devices)
