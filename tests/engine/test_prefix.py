"""Beginnings of prompts that are kept."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxsteer.engine.prefix import Prefixes, piece_keys


def test_prefixes_keep_what_was_used_last() -> None:
    piece = (jnp.zeros(10), jnp.zeros(10))
    held = Prefixes(240)
    tokens = np.arange(10)
    keys = piece_keys(b"", tokens, None, 3)
    assert len(keys) == 3 == len(set(keys))
    assert piece_keys(b"", np.arange(7), None, 3) == keys[:2], "a key is of the beginning alone"
    assert piece_keys(b"other", tokens, None, 3)[0] != keys[0]
    touched = np.zeros((1, 10), bool)
    assert piece_keys(b"", tokens, touched, 3)[1:] != piece_keys(b"", tokens, touched | (tokens == 4), 3)[1:]
    for key in keys:
        held.keep(key, piece)
        held.find(keys[:1])
    held.keep(b"more", piece)
    assert len(held) == 3 and len(held.find(keys)) == 1, "the second piece went"
    assert held.bytes == 240
    held.clear()
    assert not held.bytes and not held.find(keys)
