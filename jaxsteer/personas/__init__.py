"""Dataset schemas and loaders, contrastive pairs, directions, SAE signatures."""

from jaxsteer.personas.dataset_formats import Dataset, read_items
from jaxsteer.personas.datasets import load_dataset, load_persona, load_requests
from jaxsteer.personas.directions import (
    Direction,
    check_direction,
    diagnose,
    fit_direction,
    load_direction,
    mean_difference,
    pair_states,
    random_direction,
    save_direction,
    shuffled,
)
from jaxsteer.personas.instructions import instructions, invitations, seed_phrase
from jaxsteer.personas.items import Item, OpenQuestion, number_of_questions, orders, parse_choices, swap
from jaxsteer.personas.latent_vectors import latents_vector, sta_vector
from jaxsteer.personas.pairs import (
    READ_POSITIONS,
    Pairs,
    check_cues,
    contrast_pairs,
    response_pairs,
    role_pairs,
    search_conversations,
    text_pairs,
)
from jaxsteer.personas.persona import Goal, Persona, Splits, split
from jaxsteer.personas.persona_files import CHARACTERS, save_persona
from jaxsteer.personas.replies import with_replies
from jaxsteer.personas.requests import Request, Requests, check_templates, in_template, read_requests, read_templates
from jaxsteer.personas.signatures import Signature, load_signature, random_signature, sae_signature, save_signature

__all__ = [
    "CHARACTERS",
    "READ_POSITIONS",
    "Dataset",
    "Direction",
    "Goal",
    "Item",
    "OpenQuestion",
    "Pairs",
    "Persona",
    "Request",
    "Requests",
    "Signature",
    "Splits",
    "check_cues",
    "check_direction",
    "check_templates",
    "contrast_pairs",
    "diagnose",
    "fit_direction",
    "in_template",
    "instructions",
    "invitations",
    "latents_vector",
    "load_dataset",
    "load_direction",
    "load_persona",
    "load_signature",
    "load_requests",
    "mean_difference",
    "number_of_questions",
    "orders",
    "parse_choices",
    "pair_states",
    "random_direction",
    "random_signature",
    "read_items",
    "read_requests",
    "read_templates",
    "sae_signature",
    "response_pairs",
    "role_pairs",
    "save_direction",
    "shuffled",
    "save_persona",
    "save_signature",
    "search_conversations",
    "seed_phrase",
    "split",
    "sta_vector",
    "swap",
    "text_pairs",
    "with_replies",
]
