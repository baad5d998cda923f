"""Sparse autoencoders: one pytree for every layout that is out there; train, evaluate and explore them."""

from jaxsteer.files.sae_form import SAEConfig
from jaxsteer.sae.dictionary import (
    SAE,
    Fidelity,
    decode,
    encode,
    fidelity,
    preactivations,
    reconstruct,
    shard_sae,
    subset,
)
from jaxsteer.sae.evaluation import Evaluation, evaluate_sae
from jaxsteer.sae.exploration import Detail, Exploration, explore
from jaxsteer.sae.lens import promoted_tokens
from jaxsteer.sae.loading import Health, check_health, check_sae, load_sae, require_same_model, save_sae
from jaxsteer.sae.objective import Latents, latents_objective
from jaxsteer.sae.recipe import Recipe
from jaxsteer.sae.texts import Sample, documents_of
from jaxsteer.sae.training import train_sae

__all__ = [
    "SAE",
    "Detail",
    "Evaluation",
    "Exploration",
    "Fidelity",
    "Health",
    "Latents",
    "Recipe",
    "SAEConfig",
    "Sample",
    "check_health",
    "check_sae",
    "decode",
    "documents_of",
    "encode",
    "evaluate_sae",
    "explore",
    "fidelity",
    "latents_objective",
    "load_sae",
    "preactivations",
    "promoted_tokens",
    "reconstruct",
    "require_same_model",
    "save_sae",
    "shard_sae",
    "subset",
    "train_sae",
]
