"""What the fuzz test feeds: every reader of files with a small right example that is then changed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoints_convert import convert, verify
from checkpoints_convert.hf import config_from_hf, stop_tokens
from checkpoints_convert.sae import read_sae, write_sae
from checkpoints_convert.sae_files import Overrides
from jaxsteer.checkpoints.inspect import describe
from jaxsteer.checkpoints.loading import load
from jaxsteer.files import read_log
from jaxsteer.personas import load_persona, load_signature, save_signature
from jaxsteer.personas.signatures import Signature
from jaxsteer.prompts.conversation import load_conversations
from jaxsteer.prompts.soft import SoftPrompt, load_soft, save_soft
from jaxsteer.steer.gguf import write_control_vector
from jaxsteer.steer.imports import import_vectors
from jaxsteer.steer.vectors import Vectors, load_vectors, save_vectors
from tests.helpers import torchzip
from tests.helpers.checkpoints import family_config, hf_directory
from tests.sae import layouts

SITES = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
ROWS = np.arange(12, dtype=np.float32).reshape(2, 6) + 1


@dataclasses.dataclass(frozen=True)
class Reader:
    """Something that reads a folder."""

    make: Callable[[Path], object]
    """Writes a right example into a folder."""
    read: Callable[[Path], object]
    often: tuple[str, ...] = ()
    """Endings of the files that are changed half of the time."""
    examples: int = 60


def _config(family: str) -> Reader:
    def read(folder: Path) -> None:
        config_from_hf(folder)
        stop_tokens(folder)
        describe(str(folder))

    def make(folder: Path) -> None:
        hf_directory(folder, family_config(family, n_layers=2))
        (folder / "model.safetensors").unlink()
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "do_sample": True}))

    return Reader(make, read, ("config.json",))


def _checkpoint(folder: Path) -> None:
    hf_directory(folder / "hf", family_config("qwen3", n_layers=2, vocab_size=20))
    convert(folder / "hf", folder / "out", progress=False)


def _source(folder: Path) -> None:
    convert(folder, folder / "converted", progress=False)


def _sharded(folder: Path) -> None:
    from tests.checkpoints_convert.test_convert import shard

    shard(hf_directory(folder, family_config("llama", n_layers=1, vocab_size=20)), 2)


def _converted(folder: Path) -> None:
    jax.block_until_ready(load(folder / "out").params)
    verify(folder / "out", progress=False)


def _sae(case: Callable[[Path], layouts.Case]) -> Reader:
    made: dict[str, Any] = {}

    def make(folder: Path) -> None:
        found = case(folder)
        made.update(path=found.path.relative_to(folder), overrides=Overrides(**found.arguments))

    def read(folder: Path) -> None:
        write_sae(read_sae(folder / made["path"], overrides=made["overrides"]), folder / "written")

    return Reader(make, read, ("cfg.json", "config.json", "hyperparams.json"), 25)


def _vectors() -> Vectors:
    return Vectors(
        arrays=dict(zip(SITES, ROWS, strict=True)), mean_resid_norm=dict.fromkeys(SITES, 3.0), sign="x",
        metadata={"n_pairs": "3", "diagnostics": "{}"},
    )  # fmt: skip


def _imported(file: str, write: Callable[[Path], object], **asked: Any) -> Reader:
    return Reader(lambda folder: write(folder / file), lambda folder: import_vectors(folder / file, **asked), (), 40)


def _capping(path: Path) -> None:
    vectors = {f"layer_{i}/a": {"layer": i, "vector": row} for i, row in enumerate(ROWS)}
    interventions = [{"vector": name, "cap": -1.0} for name in vectors]
    torchzip.write(path, {"vectors": vectors, "experiments": [{"id": "a", "interventions": interventions}]})


def _svec(path: Path) -> None:
    directions = {str(i): row.tolist() for i, row in enumerate(ROWS)}
    path.write_text(json.dumps({"model_type": "llama", "directions": directions, "explained_variances": {"0": 0.5}}))


def _signature(folder: Path) -> None:
    save_signature(
        Signature(
            indices=np.arange(3), weights=np.ones(3, np.float32), delta=np.ones(5, np.float32), site=SITES[0],
            read_position="last", n=4, l0_good=1.0, l0_bad=2.0, fvu=0.5, metadata={},
        ),
        folder / "signature.safetensors",
    )  # fmt: skip


def _soft(folder: Path) -> None:
    save_soft(SoftPrompt(embeddings=ROWS, model="m", fingerprint="f"), folder / "soft.safetensors")


QUESTION = "Which?\n\nChoices:\n (A) now\n (B) later"
ITEMS = [
    {"question": f"{i} {QUESTION}", "answer_matching_behavior": " (A)", "answer_not_matching_behavior": " (B)"}
    for i in range(4)
]
CONVERSATIONS: list[Any] = [
    {"messages": [{"role": "user", "content": "Is it? {prompt}"}], "alternatives": ["(A)", "(B)"]},
    {"text": "A text {prompt} that goes on", "answer": "yes"},
    "Only a text {prompt}",
]


def _lines(name: str, rows: list[Any]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


READERS: dict[str, Reader] = {
    **{f"config-{family}": _config(family) for family in ("llama", "qwen2", "qwen3", "gemma2", "gemma3")},
    "safetensors": Reader(
        lambda folder: hf_directory(folder, family_config("llama", n_layers=1, vocab_size=20)), _source,
        (".safetensors",), 40,
    ),
    "shards": Reader(_sharded, _source, (".index.json",), 30),
    "checkpoint": Reader(_checkpoint, _converted, ("jaxsteer.json", "index.json", ".zarray"), 40),
    **{f"sae-{case.__name__}": _sae(case) for case in layouts.CASES},
    "vectors": Reader(
        lambda folder: save_vectors(_vectors(), folder / "v.safetensors"),
        lambda folder: load_vectors(folder / "v.safetensors").edits(),
    ),
    "gguf": _imported("v.gguf", lambda path: write_control_vector(_vectors(), path, model_hint="llama")),
    "npy": _imported("v.npy", lambda path: np.save(path, ROWS[0]), site=SITES[0]),
    "persona_vectors": _imported("t_prompt_avg_diff.pt", lambda path: torchzip.write(path, ROWS)),
    "capping": _imported("capping_config.pt", _capping, name="a"),
    "svec": _imported("v.svec", _svec),
    "signature": Reader(_signature, lambda folder: load_signature(folder / "signature.safetensors")),
    "soft": Reader(_soft, lambda folder: load_soft(folder / "soft.safetensors")),
    "persona-jsonl": Reader(_lines("d.jsonl", ITEMS), lambda folder: load_persona(str(folder / "d.jsonl"))),
    "persona-json": Reader(
        lambda folder: (folder / "d.json").write_text(json.dumps(ITEMS, indent=1)),
        lambda folder: load_persona(str(folder / "d.json")),
    ),
    "conversations": Reader(_lines("c.jsonl", CONVERSATIONS), lambda folder: load_conversations(folder / "c.jsonl")),
    "log": Reader(_lines("p.jsonl", [{"step": i, "target": 0.5} for i in range(4)]), lambda f: read_log(f / "p.jsonl")),
}  # fmt: skip
"""By name; what is read by rooms above stands at the end."""
