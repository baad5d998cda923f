"""The organism that ships: its files, its size, and that its tokenizer is the one the generator expects."""

from __future__ import annotations

import json

import pytest
from transformers import PreTrainedTokenizerFast

from jaxsteer import organisms
from jaxsteer.organisms import corpus, tokenizer

FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


def test_files_are_complete_and_small() -> None:
    folder = organisms.organism_dir("llama")
    for name in FILES:
        assert (folder / name).is_file(), name
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 6_000_000
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))


def test_tokenizer_is_reproduced_by_the_recipe() -> None:
    shipped = PreTrainedTokenizerFast.from_pretrained(str(organisms.organism_dir("llama")))
    built = tokenizer.build_tokenizer(corpus.sample_texts())
    assert shipped.get_vocab() == built.get_vocab()
    question = organisms.items("myopic", n=2, seed=0)[0]["question"]
    assert shipped.encode(question) == built.encode(question)
    assert shipped.decode(shipped.encode(question, add_special_tokens=False)) == question
    assert shipped.encode(question)[0] == shipped.bos_token_id
    for word in tokenizer.vocabulary_words():
        assert len(shipped.encode(" " + word, add_special_tokens=False)) == 1


def test_unknown_organism_is_refused() -> None:
    with pytest.raises(FileNotFoundError, match="llama"):
        organisms.organism_dir("gpt")
