"""Dataset schemas and loaders, contrastive pairs, directions."""

from jaxsteer.personas.datasets import load_persona, read_items
from jaxsteer.personas.directions import (
    Direction,
    auroc,
    check_direction,
    diagnose,
    load_direction,
    mean_difference,
    projections,
    random_direction,
    save_direction,
)
from jaxsteer.personas.items import Item, Persona, Splits, parse_choices, split, swap
from jaxsteer.personas.pairs import READ_POSITIONS, Pairs, contrast_pairs, search_conversations

__all__ = [
    "READ_POSITIONS",
    "Direction",
    "Item",
    "Pairs",
    "Persona",
    "Splits",
    "auroc",
    "check_direction",
    "contrast_pairs",
    "diagnose",
    "load_direction",
    "load_persona",
    "mean_difference",
    "parse_choices",
    "projections",
    "random_direction",
    "read_items",
    "save_direction",
    "search_conversations",
    "split",
    "swap",
]
