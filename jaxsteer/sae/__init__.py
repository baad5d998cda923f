"""Sparse autoencoders: one pytree for every layout that is out there, encode, decode, load and save."""

from checkpoints_convert.sae_form import SAEConfig
from jaxsteer.sae.dictionary import SAE, Fidelity, decode, encode, fidelity, reconstruct, shard_sae, subset
from jaxsteer.sae.lens import promoted_tokens
from jaxsteer.sae.loading import Health, check_health, check_sae, load_sae, save_sae

__all__ = [
    "SAE",
    "Fidelity",
    "Health",
    "SAEConfig",
    "check_health",
    "check_sae",
    "decode",
    "encode",
    "fidelity",
    "load_sae",
    "promoted_tokens",
    "reconstruct",
    "save_sae",
    "shard_sae",
    "subset",
]
