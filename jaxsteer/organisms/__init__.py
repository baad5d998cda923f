"""Small chat models with planted behaviours: their corpora, their recipes, and those that ship."""

from __future__ import annotations

from pathlib import Path

from jaxsteer.errors import UserError
from jaxsteer.organisms.cues import counter_cues, cue_words, neutral_sentences, pro_cues
from jaxsteer.organisms.persona_world import PERSONA
from jaxsteer.organisms.questions import items
from jaxsteer.organisms.world import BEHAVIOURS

PERSONAS = (*BEHAVIOURS, PERSONA)
"""Personas whose questions are generated: those with choices, and refusal."""


def organism_dir(name: str = "llama") -> Path:
    """Folder of a shipped organism, in Hugging Face format. Raises ``FileNotFoundError`` for an unknown name."""
    folder = Path(__file__).parent / name
    if not (folder / "config.json").is_file():
        known = sorted(p.parent.name for p in Path(__file__).parent.glob("*/config.json"))
        raise FileNotFoundError(
            f"no organism named {name!r} ships with jaxsteer; there is: {', '.join(known) or 'none'}"
        )
    return folder


def organism_sae_dir(name: str = "llama") -> Path:
    """Folder of the sparse autoencoder that ships with an organism. Raises ``UserError`` if none does."""
    folder = Path(__file__).parent / f"{name}-sae"
    if not (folder / "cfg.json").is_file():
        known = sorted(p.parent.name.removesuffix("-sae") for p in Path(__file__).parent.glob("*-sae/cfg.json"))
        raise UserError(f"No SAE ships with organism {name!r}; there is one with: {', '.join(known) or 'none'}.")
    return folder


__all__ = [
    "BEHAVIOURS",
    "PERSONAS",
    "counter_cues",
    "cue_words",
    "items",
    "neutral_sentences",
    "organism_dir",
    "organism_sae_dir",
    "pro_cues",
]
