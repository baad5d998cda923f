"""What several processes do together in tests: functions of a folder they share, returning arrays to compare."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsteer.checkpoints.loading import load
from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.models.sharding import make_mesh, shard_params
from jaxsteer.processes import from_first, is_first, to_host
from tests.helpers.tiny import CORPUS, tiny_model

DEVICES = 4
LONG = 400


def search(out: Path, algorithm: str = "epo", *, steps: int = 4, store: Any = None) -> dict[str, np.ndarray]:
    """Five problems spread over four devices; some of their prompts are rejected on the way."""
    from jaxsteer.prompt_search import make_problem, make_search, make_task
    from tests.prompt_search.setting import search_with, setting

    s, mesh = setting(contexts=2, length=3), make_mesh(prompts=min(DEVICES, jax.device_count()))
    sizes = {"population": 2, "children": 4, "restart_every": 3, "archive": 8}
    params = shard_params(s.model.params, s.model.config, mesh)
    task = make_task(params, s.model.config, s.slots, needs=s.needs, allowed=s.allowed, batch=8)
    losses: list[np.ndarray] = []

    def report(progress: Any) -> None:
        losses.append(progress.loss)
        if is_first():
            (out / "step").write_text(str(progress.step))

    result = search_with(
        params,
        task,
        [make_problem(s.objective, 2, restart=i) for i in range(5)],
        make_search(algorithm, sizes),
        steps=steps,
        steps_per_call=2,
        mesh=mesh,
        valid=lambda ids: ids[:, -1] % 2 == 0,
        callback=report,
        store=store,
    )
    return {
        "ids": np.asarray([f.ids for f in result.prompts]),
        "scores": np.asarray([[f.target, f.cross_entropy] for f in result.prompts]),
        "origins": np.asarray([[f.step, f.problem, f.retokenises] for f in result.prompts]),
        "loss": losses[-1],
    }


def long(out: Path) -> dict[str, np.ndarray]:
    """A search that is saved every now and then, and goes on where it was."""
    from jaxsteer.prompt_search.resume import Store

    with Store(out / "store", every_s=0.5, resume=True) as store:
        return search(out, "mutation", steps=LONG, store=store)


def mutation(out: Path) -> dict[str, np.ndarray]:
    """The search without a gradient, which compiles sooner."""
    return search(out, "mutation")


def restore(out: Path) -> dict[str, np.ndarray]:
    """Convert ``out``/model and load it on two meshes; bytes that TensorStore read for each, and the parameters."""
    from jaxsteer.models import sharding

    os.environ["JAXSTEER_CACHE"] = str(out / "cache")
    sharding._PIECE = 100  # so that small leaves are cut as large ones are
    load(str(out / "model"))  # converts
    found: dict[str, np.ndarray] = {}
    for name, mesh in (("replicas", make_mesh(prompts=2, model=2)), ("split", make_mesh(prompts=1, model=4))):
        before = bytes_read()
        params = load(str(out / "model"), mesh=mesh).params
        found[f"{name} bytes"] = np.asarray(bytes_read() - before)
        found |= {f"{name} {i}": leaf for i, leaf in enumerate(to_host(jax.tree.leaves(params)))}
    return found


def bytes_read() -> int:
    import tensorstore as ts

    (metric,) = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return metric["values"][0]["value"]


def told(out: Path) -> dict[str, np.ndarray]:
    """What the first process alone knows, or refuses, comes to all."""

    def work() -> dict[str, object]:
        assert is_first()
        return {"name": "é" * 3000, "none": None}

    def refuse() -> None:
        raise UserError("this is no run")

    known = from_first(work)
    try:
        from_first(refuse)
        raise AssertionError("nothing was refused")
    except UserError as error:
        message = str(error)
    return {"name": np.asarray(known["name"]), "none": np.asarray(known["none"] is None), "error": np.asarray(message)}


def sae(out: Path) -> dict[str, np.ndarray]:
    """Training on two devices, and what the evaluation says of the result."""
    from jaxsteer.sae.evaluation import evaluate_sae
    from jaxsteer.sae.recipe import Recipe
    from jaxsteer.sae.texts import FileDocuments, Sample
    from jaxsteer.sae.training import train_sae

    whole, mesh = tiny_model("llama3"), make_mesh(prompts=2)
    model = Model(**{**vars(whole), "params": shard_params(whole.params, whole.config, mesh), "mesh": mesh})
    documents = FileDocuments([out / "texts.txt"], model.tokenizer)
    recipe = Recipe(
        site="blocks.1.hook_resid_post", latents=48, k=4, batch=32, pool=256, tokens=640, context=16, rows=8
    )
    sae = train_sae(model, documents, recipe, out / "sae")
    found = evaluate_sae(sae, model, documents, sample=Sample(tokens=200, context=16, rows=8))
    return {
        "W_enc": to_host(sae.W_enc),
        "threshold": to_host(sae.threshold),
        "evaluation": np.asarray([found.fvu, found.l0, found.cross_entropy, found.cross_entropy_patched]),
    }


def write_texts(out: Path) -> None:
    (out / "texts.txt").write_text("\n".join(line.replace("\n", " ") for line in CORPUS * 3), encoding="utf-8")


def evaluation(out: Path) -> dict[str, np.ndarray]:
    """Choices of a model whose rows are spread over four devices."""
    from jaxsteer.evals.choice import choice_eval
    from jaxsteer.personas import Item

    whole, mesh = tiny_model("organism"), make_mesh(prompts=DEVICES)
    model = Model(**{**vars(whole), "params": shard_params(whole.params, whole.config, mesh), "mesh": mesh})
    words = ("river", "town", "money", "year", "mill")
    items = [
        Item(
            id=word,
            group=word,
            question=f"The {word}?\n (A) a small {word}\n (B) a large {word}",
            matching=" (A)",
            not_matching=" (B)",
        )
        for word in words
    ]
    results = choice_eval(model, items, ["", "please be patient"])
    return {"log_probs": np.stack([result.log_probs for result in results])}
