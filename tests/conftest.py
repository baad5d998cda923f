"""What every test relies on: eight CPU devices, no network, a cache of its own, and a count of compilations."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before anything imports jax or huggingface_hub: both read the environment once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.pop("COLUMNS", None)  # xdist sets 80 for its workers: tables are tested without a terminal
# Nearly all of the suite's time is compiling small programs once: half of it is saved without LLVM's optimisations, and
# a third of the rest without the MLIR emitters, which later releases cannot do without (an unknown flag is fatal).
# Programs are not split for other threads, which have tests of their own to run.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 "
    f"{'--xla_cpu_use_fusion_emitters=false' if version('jaxlib').startswith('0.10.') else ''}"
).strip()

import flax.struct
import jax
import jax.monitoring
import psutil
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)

# Annotations of our packages are checked in every call. As for a static checker, an int is a float.
install_import_hook(
    ["jaxsteer", "checkpoints_convert"], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)


def _leaves_unchecked(make: Callable[..., Any]) -> Callable[..., Any]:
    """``flax.struct.dataclass`` whose constructor jaxtyping leaves alone.

    Under a transformation the leaves of a pytree are not always arrays of the annotated shape (shardings, structs,
    a batch axis of vmap), so only functions are checked against annotations.
    """

    def dataclass(cls: type | None = None, **options: Any) -> Any:
        if cls is None:
            return lambda later: dataclass(later, **options)
        made = make(cls, **options)
        made.__no_type_check__ = True
        return made

    return dataclass


flax.struct.dataclass = _leaves_unchecked(flax.struct.dataclass)  # before any module of ours is imported


def pytest_configure(config: pytest.Config) -> None:
    """Import all modules of ours where tests run: with xdist not in the process that waits for its workers.

    CPython 3.11 now and then fails to compile one that a test imports first ("AST constructor recursion depth
    mismatch", when garbage is collected meanwhile).
    """
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        return
    for module in pkgutil.walk_packages([str(Path(__file__).parents[1] / "jaxsteer")], "jaxsteer."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if not module.name.startswith("jaxsteer.serve."):  # whose extra need not be installed
                raise error


_HELD = 2.5e9
"""Bytes of a process from which its compiled programs are let go between two files."""


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """A file's programs are rarely those of the next: of a whole session they would fill the machine's memory."""
    if nextitem is not None and nextitem.path != item.path and psutil.Process().memory_info().rss > _HELD:
        jax.clear_caches()


_COMPILED: list[str] = []


def _record(event: str, duration: float, **details: object) -> None:
    """Note the name of a function that XLA has just compiled; JAX offers no way to take a listener back."""
    if event == "/jax/core/compile/backend_compile_duration":
        _COMPILED.append(str(details.get("fun_name", "")).removeprefix("jit(").removesuffix(")"))


jax.monitoring.register_event_duration_secs_listener(_record)


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One cache directory for the whole session: converted models are shared, the user's own cache is not touched."""
    path = str(tmp_path_factory.mktemp("jaxsteer-cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXSTEER_CACHE", path)
        yield path


class CompileCounter:
    """Names of the functions compiled inside the block (or so far): ``count["step"]``, ``count.total()``."""

    def __enter__(self) -> CompileCounter:
        self.start, self.stop = len(_COMPILED), None
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop = len(_COMPILED)

    def names(self) -> Counter[str]:
        return Counter(_COMPILED[self.start : self.stop])

    def __getitem__(self, name: str) -> int:
        return self.names()[name]

    def total(self) -> int:
        return sum(self.names().values())


@pytest.fixture
def compile_counter() -> type[CompileCounter]:
    """``with compile_counter() as count: ...; assert count["step"] == 1``: XLA compilations inside the block."""
    return CompileCounter
