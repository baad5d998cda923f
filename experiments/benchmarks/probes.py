"""How fast are logit attribution and probes? Beside TransformerLens' cache and a loop over scikit-learn.

python experiments/benchmarks/probes.py [--parts attribution probes] [--texts 1000] [--rounds 3] [--json FILE]

A random Llama of 15M parameters (that of generate.py) and texts of 64 random tokens, float32, the same weights, as many
threads on both sides as there are cores. Rounds alternate and one side computes at a time; compiling stands apart.

attribution  what embedding, attentions, MLPs and all heads add to the logit of the next token, at every token of every
             text. Theirs: TransformerLens' ``run_with_cache``, ``decompose_resid`` and ``stack_head_results``, then
             ``logit_attrs``, 32 texts at a time, where it is installed. The parts are compared.
probes       logistic probes of a label at the embedding and all blocks: 5 folds, 6 penalties chosen on the next fold,
             the fit on all texts at the end. Theirs: the same loops over scikit-learn's ``LogisticRegression``, on the
             states that we read, standardised. The pass that reads them is told by itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.linear_model import LogisticRegression

from experiments.benchmarks.circuits import LENGTH, make_model, timed
from experiments.benchmarks.generate import VOCAB, machine
from jaxsteer.lens.attribution import Attributed, LogitParts, attribute_logits
from jaxsteer.lens.probe_options import ProbeOptions
from jaxsteer.lens.probes import fit_all
from jaxsteer.models.model import Model
from jaxsteer.models.reading import read_rows
from jaxsteer.models.sites import find_sites

BATCH, FOLDS = 32, 5


def texts(count: int) -> list[np.ndarray]:
    """Random tokens."""
    return list(np.random.default_rng(0).integers(3, VOCAB, (count, LENGTH)).astype(np.int32))


def hooked(model: Model) -> Any:
    """The model in TransformerLens, with nothing folded or centred."""
    import torch

    from experiments.benchmarks.transformer_lens_peer import build_hooked

    torch.set_grad_enabled(False)
    return build_hooked(model)


def cached(net: Any, rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Parts [R, 2 L + 1] and heads [R, L N] of the logits of all next tokens, from TransformerLens' cache."""
    import torch

    found: list[list[np.ndarray]] = [[], []]
    for start in range(0, len(rows), BATCH):
        tokens = torch.tensor(np.stack(rows[start : start + BATCH]).astype(np.int64))
        _, cache = net.run_with_cache(tokens)
        for place, stack in enumerate((cache.decompose_resid(mode="all"), cache.stack_head_results())):
            attrs = cache.logit_attrs(stack[:, :, :-1], tokens[:, 1:], pos_slice=slice(0, -1))
            found[place].append(attrs.flatten(1).T.numpy())
    parts, heads = (np.concatenate(each) for each in found)
    return parts, heads


def alternated(sides: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Seconds of every side: the first call (with compiling), then the median, least and most of the rounds."""
    first = {name: timed(call) for name, call in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            seconds[name].append(timed(call)[0])
    table = {
        name: {"first": first[name][0], "median": statistics.median(s), "least": min(s), "most": max(s)}
        for name, s in seconds.items()
    }
    return table, {name: found for name, (_, found) in first.items()}


def attribution(model: Model, count: int, rounds: int) -> dict[str, Any]:
    """All next tokens of all texts."""
    rows = texts(count)
    options = Attributed(positions="all", neurons=0, controls=0, batch=BATCH)
    sides: dict[str, Callable[[], Any]] = {"jaxsteer": lambda: attribute_logits(model, rows, options=options)}
    if importlib.util.find_spec("transformer_lens") is not None:
        net = hooked(model)
        sides["TransformerLens"] = lambda: cached(net, rows)
    table, found = alternated(sides, rounds)
    out: dict[str, Any] = {"texts": count, "tokens": count * (LENGTH - 1), "seconds": table}
    if "TransformerLens" in found:
        ours: LogitParts = found["jaxsteer"]
        layers = [np.stack([ours.attention, ours.mlp], -1).reshape(len(ours.logit), -1)]
        mine = np.concatenate([ours.embedding[:, None], *layers], 1)
        parts, heads = found["TransformerLens"]
        assert ours.heads is not None
        apart = np.abs(mine - parts).max(), np.abs(ours.heads.reshape(len(heads), -1) - heads).max()
        out["largest difference of parts and heads"] = [float(x) for x in apart]
        out["ratio"] = table["TransformerLens"]["median"] / table["jaxsteer"]["median"]
    return out


def probes(model: Model, count: int, rounds: int) -> dict[str, Any]:
    """A label at all sites."""
    rows, sites = texts(count), tuple(find_sites(ProbeOptions().sites, model.config).values())
    last = np.asarray([len(row) - 1 for row in rows])

    def states() -> np.ndarray:
        found = np.zeros((len(sites), count, model.config.d_model), np.float32)
        for chunk, read in read_rows(model, rows, last, sites):
            found[:, chunk] = read
        return found

    states()
    reading, x = timed(states)
    rng = np.random.default_rng(1)
    along = x[3] @ rng.standard_normal(x.shape[-1])
    labels = along + 0.5 * along.std() * rng.standard_normal(count) > np.median(along)
    fold, penalties = rng.permutation(count) % FOLDS, ProbeOptions().penalties
    y = np.broadcast_to(labels[None, :, None], (len(sites), count, 1)).astype(np.float32)

    def ours() -> np.ndarray:
        given = (jnp.asarray(a) for a in (x, y, fold.astype(np.int32), np.asarray(penalties, np.float32)))
        return np.asarray(jax.block_until_ready(fit_all(*given, kind="logistic", folds=FOLDS))["w"])

    def theirs() -> np.ndarray:
        return np.stack([loop(states, labels, fold, penalties) for states in x])

    table, found = alternated({"jaxsteer": ours, "scikit-learn": theirs}, rounds)
    a, b = found["jaxsteer"].astype(np.float64), found["scikit-learn"]
    apart = np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)
    return {
        "texts": count, "sites": len(sites), "fits": len(sites) * (FOLDS * (len(penalties) + 1) + 1),
        "reading": reading, "seconds": table, "largest relative difference of weights": float(apart.max()),
        "ratio": table["scikit-learn"]["median"] / table["jaxsteer"]["median"],
    }  # fmt: skip


def loop(x: np.ndarray, labels: np.ndarray, fold: np.ndarray, penalties: tuple[float, ...]) -> np.ndarray:
    """Weights [D] of the probe that validation chooses, for states as they are."""

    def fitted(inside: np.ndarray, penalty: float) -> tuple[Any, np.ndarray, np.ndarray]:
        mean, std = x[inside].mean(0), x[inside].std(0)
        z = (x - mean) / std
        return LogisticRegression(C=1 / penalty, max_iter=1000).fit(z[inside], labels[inside]), z, std

    losses = np.zeros((FOLDS, len(penalties)))
    for number in range(FOLDS):
        test, chooses = fold == number, fold == (number + 1) % FOLDS
        for at, penalty in enumerate(penalties):
            probe, z, _ = fitted(~test & ~chooses, penalty)
            p = probe.predict_log_proba(z[chooses])
            losses[number, at] = -p[np.arange(len(p)), labels[chooses].astype(int)].mean()
        probe, z, _ = fitted(~test, penalties[int(losses[number].argmin())])
        probe.decision_function(z[test])
    probe, _, std = fitted(np.ones(len(x), bool), penalties[int(losses.mean(0).argmin())])
    found: np.ndarray = probe.coef_[0] / std
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["attribution", "probes"], choices=["attribution", "probes"])
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model, parts = make_model(), {"attribution": attribution, "probes": probes}
    found: dict[str, Any] = {"machine": machine()}
    for part in given.parts:
        found[part] = parts[part](model, given.texts, given.rounds)
        print(json.dumps({part: found[part]}, indent=1))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
