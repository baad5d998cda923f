"""Names of the latents behind a SAEGA run, by explanations of its SAE, and whether the prompt that was found has them.

A prompt found by raising latents need not speak of what they mean. Beside the share of the run's latents of which the
prompt holds a word stands the same share of all latents of the SAE: what any latents would have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.explain.explanations import Explanations
from jaxsteer.files import read_json
from jaxsteer.runs import files
from jaxsteer.sae import load_sae
from jaxsteer.study.latent_explanation import LatentNames, NamedLatent
from jaxsteer.study.results import SearchRun

NAMED = 10
"""Words of a latent that name it, and that are looked for in the prompt."""
_WORD = re.compile(r"[^\W\d_]{2,}")


def name_latents(run_dir: Path, table: Explanations, *, name: str = "") -> LatentNames:
    """Name the latents of a finished SAEGA run by ``table`` and add the names to the run's metrics.

    Raises ``UserError`` for a directory without a finished SAEGA run or without a prompt, and for explanations of
    another SAE than the run's.
    """
    try:
        config, metrics = (read_json(run_dir / file) for file in (files.CONFIG, files.METRICS))
        found = SearchRun.from_json(metrics, str(run_dir / files.METRICS))
        if found.signature is None or not config.get("sae"):
            raise UserError("it raised no latents (--method saega)")
        if found.best is None:
            raise UserError("it selected no prompt")
    except UserError as error:
        raise UserError(f"{run_dir} holds no search whose latents could be named ({error})") from error
    table.check_sae(load_sae(config["sae"]))
    names = named(found.best.text, [row.latent for row in found.signature.rows], table, name=name)
    files.write_json(run_dir / files.METRICS, {**metrics, "latent_names": names.to_json()})
    return names


def named(prompt: str, latents: Iterable[int], table: Explanations, *, name: str = "") -> LatentNames:
    """The words of ``latents``, and which of them ``prompt`` holds (as whole words, whatever the case)."""
    spoken = {word.lower() for word in _WORD.findall(prompt)}
    held = np.asarray([word.lower() in spoken for word in table.vocabulary.words])
    hit = held[table.words[:, :NAMED]].any(1)
    rows = []
    for latent in latents:
        words = table.of(latent, NAMED)
        rows.append(NamedLatent(latent=latent, words=words, held=tuple(w for w in words if w.lower() in spoken)))
    return LatentNames(
        explanations=name,
        vocabulary=len(table.vocabulary),
        known=int(held.sum()),
        rows=tuple(rows),
        share=float(np.mean([bool(row.held) for row in rows])) if rows else 0.0,
        chance=float(hit.mean()),
    )
