"""GGUF files against transformers, which dequantises them with torch: `make parity`.

The tests write their own small files. Real ones are compared where ``JAXSTEER_MODELS`` names a directory that holds
``*.gguf`` (`make real-models` makes one).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxsteer
from tests.checkpoints_convert.test_gguf import config_of
from tests.helpers.checkpoints import FAMILIES, hf_directory
from tests.helpers.gguf_files import write_gguf_model

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

REAL = sorted(Path(os.environ.get("JAXSTEER_MODELS", "/nowhere")).glob("*.gguf"))
TEXTS = (
    "Hello world",
    "  two  spaces\n\nnew\tline 12345 x",
    "é ü 漢字 🎉 naïve",
    "<|im_start|>user\nHi<|im_end|>\n<bos>x<start_of_turn>user\nhey<end_of_turn>\n",
    "don't I'LL we've",
    "",
    " lead and trail ",
    "\n" * 40 + "a" + " " * 70,
    "a\u00a0b\u2028c \ue000",
    Path(__file__).read_text(encoding="utf-8"),
)


def reference(path: Path) -> tuple[Any, Any]:
    """transformers' model and tokenizer of the file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, dtype=torch.float32, attn_implementation="eager", **options
    )
    return model.eval(), AutoTokenizer.from_pretrained(path.parent, **options)


def largest(ours: np.ndarray, theirs: Any, tokens: np.ndarray) -> float:
    """The largest difference of logits, over the largest logit; the likeliest tokens must agree."""
    import torch

    with torch.no_grad():
        expected = theirs(torch.tensor(tokens.astype(np.int64))).logits.numpy()
    np.testing.assert_array_equal(ours.argmax(-1), expected.argmax(-1))
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("kind", ["F32", "Q4_0", "Q8_0"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt2"])
def test_logits_of_small_files(family: str, kind: str, tmp_path: Path) -> None:
    # transformers takes these head widths, and no rope scaling of Gemma 3, whatever the file says.
    widths = {"qwen3": 128, "gemma2": 256, "gemma3": 256}
    source = hf_directory(tmp_path / "hf", config_of(family, factor=1.0, d_head=widths.get(family, 16)))
    path = write_gguf_model(source, tmp_path / "model.gguf", kind=kind)
    tokens = np.random.default_rng(0).integers(0, 300, (2, 9)).astype(np.int32)
    ours = np.asarray(jaxsteer.logits(jaxsteer.load(path), tokens))
    assert largest(ours, reference(path)[0], tokens) < 1e-5


@pytest.mark.skipif(not REAL, reason="JAXSTEER_MODELS names no directory with .gguf files")
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_real_models(path: Path) -> None:
    model, (theirs, tokenizer) = jaxsteer.load(path), reference(path)
    for text in TEXTS:
        for special in (False, True):
            ids = model.tokenizer(text, add_special_tokens=special)["input_ids"]
            assert ids == tokenizer(text, add_special_tokens=special)["input_ids"], text[:40]
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "Hi there, 12 times"}]
        options = {"tokenize": False, "add_generation_prompt": True}
        assert model.tokenizer.apply_chat_template(chat, **options) == tokenizer.apply_chat_template(chat, **options)
    for length in (20, 200, 600):
        tokens = np.random.default_rng(length).integers(5, 48_000, (1, length)).astype(np.int32)
        found = largest(np.asarray(jaxsteer.logits(model, tokens)), theirs, tokens)
        print(f"{path.name}, {length} tokens: {found:.1e} of the largest logit")
        assert found < 2e-5
