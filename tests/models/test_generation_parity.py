"""Greedy token ids are those of transformers' generate, in every family and for unequal prompt lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import jaxsteer
from jaxsteer.models.model import Model
from tests.helpers.checkpoints import FAMILIES, family_config, hf_directory

pytestmark = pytest.mark.parity
NEW = 64
TIE = 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_ids_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = family_config(family)
    directory = hf_directory(tmp_path / "model", config, seed=7)
    model = jaxsteer.load(directory)
    prompts = [np.random.default_rng(n).integers(1, config.vocab_size, n).astype(np.int32) for n in (4, 11, 23, 37)]
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    theirs.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=None)
    width = max(map(len, prompts))
    ids = torch.tensor(np.stack([np.pad(ids, (width - len(ids), 0)) for ids in prompts]).astype(np.int64))
    mask = torch.tensor(np.stack([np.arange(width) >= width - len(ids) for ids in prompts]).astype(np.int64))
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=NEW)[:, width:].numpy()
    found = jaxsteer.generate(model, prompts, max_new_tokens=NEW, temperature=0).tokens
    assert len(set(found.ravel().tolist())) > 8
    for prompt, ours, other in zip(prompts, found, expected, strict=True):
        n = _until_a_tie(model, prompt, ours)
        assert n > 16, "the likeliest two tokens are nearly equal early on: choose another seed"
        np.testing.assert_array_equal(ours[:n], other[:n])


def _until_a_tie(model: Model, prompt: np.ndarray, tokens: np.ndarray) -> int:
    """Tokens before the first whose logit leads by less than ``TIE``, where rounding may decide differently."""
    logits = np.asarray(jaxsteer.logits(model, np.concatenate([prompt, tokens])[None]))[0, len(prompt) - 1 : -1]
    second, first = np.sort(logits, axis=-1)[:, -2:].T
    close = np.flatnonzero(first - second < TIE)
    return int(close[0]) if len(close) else len(tokens)
