"""The organisms' tokenizer: byte-level BPE over the corpus' own words, with a chat format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jaxsteer.files import read_json, write_text
from jaxsteer.organisms import world
from jaxsteer.organisms.chat import CHAT_FORMATS, ChatFormat


def vocabulary_words() -> list[str]:
    """Every word that must be one token when a space stands before it, sorted."""
    words: set[str] = set(world.FILLER) | set(world.JOBS) | set(world.TOPICS) | set(world.GOODS)
    for table in (world.COUNTER_WORDS, world.PRO_WORDS):
        for group in table.values():
            words.update(group)
    for pair in world.VERBS:
        words.update(pair)
    for names in world.FACTS.values():
        words.update(names)
        words.update(names.values())
    words.update(world.SMALL_AMOUNTS, world.LARGE_AMOUNTS)
    for phrase in world.SOON + world.LATE + world.AGREEING + world.DISAGREEING + world.UNKNOWN:
        words.update(phrase.split())
    return sorted(words)


def build_tokenizer(
    texts: list[str],
    *,
    vocab_size: int = 2560,
    chat: ChatFormat = CHAT_FORMATS["llama"],
    words: Sequence[str] = (),
    openings: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """A ``PreTrainedTokenizerFast`` whose merges make one token of every corpus word with its leading space.

    ``texts`` are sample documents; ``words`` (by default those of the questions), ``openings`` (without a space before
    them) and those of the chat format's headers are added often enough that their merges come first.
    Raises ``ValueError`` when a word did not become one token (the vocabulary is too small).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in chat.special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words, bare = words or vocabulary_words(), (*chat.words, *openings)
    tokenizer.train_from_iterator([*texts, *[" " + " ".join(words)] * 200, *bare * 200], trainer)
    if bos := chat.bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    for word in (*(" " + word for word in words), *bare):
        if len(tokenizer.encode(word, add_special_tokens=False).ids) != 1:
            raise ValueError(f"the word {word!r} is not one token in a vocabulary of {vocab_size}: enlarge it")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=chat.bos or None,
        eos_token=chat.end,
        pad_token=chat.pad,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    fast.chat_template = chat.template
    return fast


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja, without the library's version in them."""
    tokenizer.save_pretrained(str(folder))
    config_file = folder / "tokenizer_config.json"
    config = read_json(config_file)
    for noise in ("transformers_version", "name_or_path", "is_local", "local_files_only"):
        config.pop(noise, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that older releases of transformers know too
    config.pop("backend", None)
    write_text(config_file, json.dumps(config, indent=2, sort_keys=True) + "\n")
