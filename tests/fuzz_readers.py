"""What the fuzz test feeds: every reader of files with a small right example that is then changed."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from checkpoints_convert import convert, verify
from checkpoints_convert.hf import config_from_hf, stop_tokens
from checkpoints_convert.sae import read_sae, write_sae
from checkpoints_convert.sae_files import Overrides
from jaxsteer.checkpoints.inspect import describe
from jaxsteer.checkpoints.loading import load, load_tokenizer
from jaxsteer.cli.report import Report
from jaxsteer.explain.explanations import load_explanations
from jaxsteer.explain.other_tools import read_labels, write_neuronpedia
from jaxsteer.files import read_log
from jaxsteer.personas import load_persona, load_requests, load_signature, read_templates, save_signature
from jaxsteer.personas.signatures import Signature
from jaxsteer.personas.traits import EXTRACT, Rollout, Trait, load_trait, read_rollouts, save_trait, write_rollouts
from jaxsteer.prompt_search import Store
from jaxsteer.prompt_search.driver import Progress
from jaxsteer.prompts import Placement, allowed_tokens, encode_texts
from jaxsteer.prompts.conversation import load_conversations
from jaxsteer.prompts.roles import encode_turns
from jaxsteer.prompts.soft import SoftPrompt, load_soft, save_soft
from jaxsteer.steer.gguf import write_control_vector
from jaxsteer.steer.imports import import_vectors
from jaxsteer.steer.vectors import Vectors, load_vectors, save_vectors
from jaxsteer.study.config_file import config_text, read_config
from jaxsteer.study.probe import Extent, _Behaviour
from tests.explain.test_other_tools import explained, write_results
from tests.helpers import torchzip
from tests.helpers.checkpoints import family_config, hf_directory
from tests.helpers.gguf_files import write_gguf_model
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from tests.prompt_search import test_resume as resumed
from tests.report import synthetic
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


PERSONA = {
    "name": "p", "description": "d", "behaviour": "b", "role": "You are p.", "goal": "elicit",
    "fractions": [0.6, 0.2, 0.2], "recipe": {"steps": "2"}, "counter_cues": ["Be good."], "pro_cues": ["Be bad."],
    "neutral_cues": ["Be."],
}  # fmt: skip
ROW_FORMS: list[Any] = [
    {"question": "What?", "answer_matching_behavior": "This", "answer_not_matching_behavior": "That"},
    {"prompt": "How?", "chosen": "So.", "rejected": "Thus."},
    {"messages": [{"role": "user", "content": "Why?"}], "positive": "Yes", "negative": ["No", "Never"]},
    {"chosen": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "You"}], "rejected": "Me"},
]


def _persona(folder: Path) -> None:
    (folder / "in.json").write_text(json.dumps(PERSONA | {"data": ITEMS}))
    (folder / "beside.json").write_text(json.dumps(PERSONA | {"data": "rows.jsonl"}))
    (folder / "asks.json").write_text(json.dumps(PERSONA | {"questions": "questions.json"}))
    (folder / "questions.json").write_text(json.dumps(["How are you?", "And now?"]))
    _lines("rows.jsonl", ROW_FORMS)(folder)


def _personas(folder: Path) -> None:
    for name in ("in", "beside", "asks"):
        load_persona(str(folder / f"{name}.json"))


def _gguf_model(folder: Path) -> None:
    from tests.checkpoints_convert.test_gguf import config_of

    source = hf_directory(folder.with_name("gguf-source"), config_of("llama"))
    write_gguf_model(source, folder / "m.gguf")


def _converted_gguf(folder: Path) -> None:
    convert(folder / "m.gguf", folder / "converted", progress=False)
    _tokenize(folder / "converted")


def _tokenize(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return
    encode_texts(tokenizer, ["I think the answer is clear. \u2028 \U0001f600"])
    allowed_tokens(tokenizer, len(tokenizer) + 3)
    if tokenizer.chat_template:
        encode_turns(tokenizer, [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Which?"}])


@functools.cache
def _search() -> SimpleNamespace:
    return resumed.setting()


def _search_state(folder: Path) -> None:
    """The state of a search that ended in its second wave."""

    def end(progress: Progress) -> None:
        if progress.first == 2 and progress.step == 4:
            raise resumed.Lost

    try:
        resumed.search(_search(), Store(folder, every_s=0.0), callback=end)
    except resumed.Lost:
        return
    raise AssertionError("the search ended too early")


def _probe_state(folder: Path) -> _Behaviour:
    made = _Behaviour(tiny_model(), [], ["", "a", "b"], Placement(), Extent(folder=folder, quiet=True))
    if made.file is not None and not made.file.exists():
        made.file.parent.mkdir(parents=True)
        made.file.write_text(json.dumps({"probability": [0.5, 0.25]}))
    return made


def _configs(folder: Path) -> None:
    for toml in (False, True):
        (folder / f"c.{'toml' if toml else 'yaml'}").write_text(config_text(toml=toml))


def _requests(folder: Path) -> None:
    rows = [{"request": "Bend a spoon", "kind": "harmful"}, {"prompt": "Wash it", "kind": "border", "response": "Yes"}]
    _lines("r.jsonl", rows)(folder)
    (folder / "x.csv").write_text('goal,target\n"Bend, it","Sure"\n')
    (folder / "t.json").write_text('{"polite": "Please, {request}"}')


def _trait(folder: Path) -> None:
    trait = Trait(name="haste", instructions=(("Hurry.", "Wait."),), questions=("Now?",), rubric="{question} {answer}")
    save_trait(dataclasses.replace(trait, test_questions=("When?",)), folder)
    rollout = Rollout(id="0", question="Now?", prompt="<u>", answer="Yes,\n now", trait=80.0, coherence=90.5)
    write_rollouts(folder / "r.csv", "haste", [rollout])


def _exports(folder: Path) -> None:
    table, labels = explained()
    for ending in ("jsonl", "jsonl.gz", "csv"):
        write_neuronpedia(table, labels, folder / f"e.{ending}")
    table.save(folder / "e.safetensors")


def _read_exports(folder: Path) -> None:
    load_explanations(folder / "e.safetensors").table()
    for ending in ("jsonl", "jsonl.gz", "csv"):
        read_labels(folder / f"e.{ending}").labels.table()


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
    "explanations": Reader(_exports, _read_exports, (), 60),
    "delphi": Reader(lambda folder: write_results(folder / "run"), lambda folder: read_labels(folder / "run")),
    "soft": Reader(_soft, lambda folder: load_soft(folder / "soft.safetensors")),
    "persona-jsonl": Reader(_lines("d.jsonl", ITEMS), lambda folder: load_persona(str(folder / "d.jsonl"))),
    "persona-json": Reader(
        lambda folder: (folder / "d.json").write_text(json.dumps(ITEMS, indent=1)),
        lambda folder: load_persona(str(folder / "d.json")),
    ),
    "conversations": Reader(_lines("c.jsonl", CONVERSATIONS), lambda folder: load_conversations(folder / "c.jsonl")),
    "personas": Reader(_persona, _personas, (), 80),
    "gguf-model": Reader(_gguf_model, _converted_gguf, (), 40),
    "tokenizer": Reader(
        lambda folder: tiny_tokenizer("llama3").save_pretrained(folder), _tokenize, ("_config.json", ".jinja"), 40
    ),
    "search": Reader(
        _search_state, lambda folder: resumed.search(_search(), Store(folder, resume=True)), (".json", ".npz"), 15
    ),
    "probe": Reader(_probe_state, _probe_state, (), 25),
    "configs": Reader(_configs, lambda f: (read_config(f / "c.yaml"), read_config(f / "c.toml")), (), 60),
    "report": Reader(
        lambda folder: synthetic.write_run(folder / "run"),
        lambda folder: Report(directory=folder / "run").run(), (), 25,
    ),
    "report-study": Reader(
        lambda folder: synthetic.write_many(folder / "runs", seeds=2, personas=("myopic",)),
        lambda folder: Report(directory=folder / "runs").run(), (), 12,
    ),
    "requests": Reader(
        _requests,
        lambda f: (load_requests(f / "r.jsonl"), load_requests(f"{f}/x.csv=harmful"), read_templates(f / "t.json")),
    ),
    "trait": Reader(_trait, lambda f: (load_trait(f / EXTRACT / "haste.json"), read_rollouts(f / "r.csv", "haste"))),
    "log": Reader(_lines("p.jsonl", [{"step": i, "target": 0.5} for i in range(4)]), lambda f: read_log(f / "p.jsonl")),
}  # fmt: skip
"""By name; what is read by rooms above stands at the end."""
