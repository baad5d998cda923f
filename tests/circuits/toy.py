"""The circuit that was computed by hand: two layers of two heads that multiply (1, 2) and (3, 4) into the stream."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer import steer
from jaxsteer.models.model import Model
from jaxsteer.models.params import Layers, Params
from jaxsteer.steer.edits import Edits
from tests.helpers.checkpoints import tiny_config


def toy() -> tuple[Model, Any]:
    """A transformer that is that circuit on texts of one token, and the edits that fix its norms to 1."""
    config = dataclasses.replace(
        tiny_config(n_layers=2, n_heads=2, n_kv_heads=2, d_model=2, d_head=2, d_mlp=2, vocab_size=2), norm_eps=1e-6
    )
    eye, zero = np.eye(2), np.zeros((2, 2, 2))
    write = np.zeros((2, 2, 2, 2))
    write[:, 0], write[:, 1] = np.diag([1, 2]), np.diag([3, 4])
    layers = dict(
        attn_norm=np.ones((2, 2)), mlp_norm=np.ones((2, 2)), q=np.zeros((2, 2, 2, 2)), k=np.zeros((2, 2, 2, 2)),
        v=np.broadcast_to(eye[:, None], (2, 2, 2, 2)), o=write, gate=zero, up=zero, down=zero,
    )  # fmt: skip
    wide = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731
    params = Params(
        embed=wide([[1, 1], [-1, -1]]), unembed=wide(eye), final_norm=wide([1, 1]),
        layers=Layers(**jax.tree.map(wide, layers)),
    )  # fmt: skip
    sites = ["blocks.0.ln1.hook_scale", "blocks.1.ln1.hook_scale", "ln_final.hook_scale"]
    edits = Edits(tuple(steer.replace(site, np.ones((1, 1))) for site in sites))
    return Model(params=params, config=config, tokenizer=None, name="toy", fingerprint=""), edits
