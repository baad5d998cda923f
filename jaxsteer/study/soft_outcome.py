"""What a run of ``--algorithm soft`` leaves: the best soft prompt as a file, and its rates on questions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxsteer.evals.choice import choice_eval, distinct, rate
from jaxsteer.prompt_search.algorithms.relaxed import table_unit
from jaxsteer.prompts.soft import SoftPrompt, save_soft, with_soft
from jaxsteer.runs import files
from jaxsteer.study.results import Prompt
from jaxsteer.study.setting import PersonaSetting

KEEP: dict[str, Callable[[Any], Any]] = {"soft": lambda state: {"best": state.best, "f": state.best_f}}
"""What of the last states of an algorithm its files are made from."""


def finish_soft(setting: PersonaSetting, kept: dict[str, np.ndarray], folder: Path) -> Prompt:
    """Write the soft prompt with the largest objective among all restarts and slots, and measure it.

    ``kept`` holds ``best`` (R, P, S, D), in units of the table's root mean square entry, and ``f`` (R, P).
    """
    model = setting.model
    at = np.unravel_index(int(np.argmax(kept["f"])), kept["f"].shape)
    target = float(kept["f"][at])
    soft = SoftPrompt(
        embeddings=np.asarray(kept["best"][at] * np.asarray(table_unit(model.params)), np.float32),
        model=model.name,
        fingerprint=model.fingerprint,
        metadata={
            "persona": setting.persona.name,
            "style": setting.placement.style,
            "slot": setting.placement.slot,
            "target": repr(target),
        },
    )
    save_soft(soft, folder / files.SOFT)
    steered, text = with_soft(model, soft)
    found = Prompt(target=target)
    for name in ("validation", "test"):
        items = distinct(getattr(setting.splits, name))
        baseline = choice_eval(model, items, [""], placement=setting.placement)[0]
        measured = rate(choice_eval(steered, items, [text], placement=setting.placement)[0], baseline)
        found = found.with_rate(name, measured)
    return found
