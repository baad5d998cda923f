"""Tokenizers of GGUF files: tokenizer.json and tokenizer_config.json from a file's ``tokenizer.*`` keys.

Two kinds exist in our families: byte-level BPE ("gpt2": tokens and merges, and the name of a pre-tokenizer) and
SentencePiece BPE ("llama": tokens and scores, bytes for what is not in the vocabulary). llama.cpp knows pre-tokenizers
by name only; what each name means stands in ``PRE_TOKENIZERS``. What is not listed there is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxsteer.errors import UserError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}


def _split_by(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**_BYTES, "use_regex": False}]}


_GPT2 = {**_BYTES, "use_regex": True}
_SMOLLM = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2]}
_LLAMA3 = _split_by(_WORDS % r"\p{N}{1,3}")
_QWEN2 = _split_by(_WORDS % r"\p{N}")
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _GPT2,
    "smollm": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
"""``tokenizer.ggml.pre`` -> the pre-tokenizer of tokenizer.json."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens, as ``tokenizer.ggml.token_type`` has them."""
_ID_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_SPACE = "\u2581"


def tokenizer_files(keys: Mapping[str, Any], where: str) -> dict[str, str]:
    """File name -> text: tokenizer.json, tokenizer_config.json and, where the file has a template, chat_template.jinja.

    ``keys`` are the metadata of a GGUF file, which ``where`` names in errors. Raises ``UserError`` for a tokenizer
    that is not supported, by name, and for keys that do not fit together.
    """
    model = keys.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise UserError(f"{where} has a tokenizer of the model {model!r}, expected 'gpt2' (byte BPE) or 'llama' (SPM).")
    tokens = _list(keys, "tokens", str, where)
    kinds = _list(keys, "token_type", int, where) if "tokenizer.ggml.token_type" in keys else [NORMAL] * len(tokens)
    if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        raise UserError(
            f"{where} has {len(tokens)} tokens, {len(set(tokens))} of them different, and {len(kinds)} token types."
        )
    names = {name: _named(keys, key, tokens, where) for name, key in _ID_KEYS.items()}
    adds_bos = bool(keys.get("tokenizer.ggml.add_bos_token", _adds_bos(keys)))
    content = _byte_bpe(keys, tokens, where) if model == "gpt2" else _sentencepiece(keys, tokens, kinds, where)
    first = names["bos"] if adds_bos else None
    content |= {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, kinds),
        "post_processor": _post_processor(first, tokens, content["pre_tokenizer"]),
    }
    config = {f"{name}_token": text for name, text in names.items() if text is not None}
    files = {
        "tokenizer.json": json.dumps(content, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": adds_bos, **config}, ensure_ascii=False
        ),
    }
    template = keys.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        files["chat_template.jinja"] = template
    return files


def stop_ids(keys: Mapping[str, Any]) -> list[int]:
    """Ids that end an answer: the end of the text and the end of a turn, where the file names them."""
    found = (keys.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return list(dict.fromkeys(int(index) for index in found if index is not None))


def _adds_bos(keys: Mapping[str, Any]) -> bool:
    """What llama.cpp does where the file does not say it."""
    return (
        keys.get("tokenizer.ggml.model") == "llama" or PRE_TOKENIZERS.get(keys.get("tokenizer.ggml.pre", "")) is _LLAMA3
    )


def _list(keys: Mapping[str, Any], name: str, kind: type, where: str) -> list[Any]:
    value = keys.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list) or not all(isinstance(entry, kind) for entry in value):
        raise UserError(
            f"{where} has no list of {kind.__name__} under tokenizer.ggml.{name}: its tokenizer is missing."
        )
    return value


def _named(keys: Mapping[str, Any], key: str, tokens: Sequence[str], where: str) -> str | None:
    index = keys.get(f"tokenizer.ggml.{key}_token_id")
    if index is None:
        return None
    if not 0 <= int(index) < len(tokens):
        raise UserError(f"{where}: tokenizer.ggml.{key}_token_id is {index}, and there are {len(tokens)} tokens.")
    return tokens[int(index)]


def _added(tokens: Sequence[str], kinds: Sequence[int]) -> list[dict[str, Any]]:
    """Tokens that are found in a text before it is split: control tokens and those that the model's makers added."""
    return [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind in (CONTROL, UNKNOWN),
        }
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, UNKNOWN) or (kind == USER_DEFINED and token.strip(" "))
    ]


def _byte_bpe(keys: Mapping[str, Any], tokens: Sequence[str], where: str) -> dict[str, Any]:
    pre = keys.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise UserError(
            f"{where} has the pre-tokenizer {pre!r} (tokenizer.ggml.pre), which is not supported: expected one of "
            f"{', '.join(PRE_TOKENIZERS)}."
        )
    merges = [merge.split(" ") for merge in _list(keys, "merges", str, where)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if wrong := next((m for m in merges if len(m) != 2 or not {*m, "".join(m)} <= vocabulary.keys()), None):
        raise UserError(f"{where}: the merge {' '.join(wrong)!r} does not fit the vocabulary.")
    return {
        "normalizer": {"type": "NFC"} if PRE_TOKENIZERS[pre] is _QWEN2 else None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "decoder": {**_BYTES, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": PRE_TOKENIZERS[pre] is _LLAMA3,  # a word that is a token is taken whole
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _sentencepiece(keys: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int], where: str) -> dict[str, Any]:
    # llama.cpp writes runs of spaces, which the original marks, as they are.
    tokens = [token.replace(" ", _SPACE) if not token.strip(" ") else token for token in tokens]
    scores = _list(keys, "scores", float, where)
    if len(scores) != len(tokens):
        raise UserError(f"{where} has {len(tokens)} tokens and {len(scores)} scores.")
    to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    to_space = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    prefixed = bool(keys.get("tokenizer.ggml.add_space_prefix", True))
    unknown = _named(keys, "unknown", tokens, where)
    decoders: list[dict[str, Any]] = [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefixed:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, to_mark]}
        if prefixed
        else to_mark,
        "pre_tokenizer": None
        if prefixed
        else {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": _merges(tokens, scores, kinds),
        },
    }


def _merges(tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]) -> list[list[str]]:
    """The merges of SentencePiece's BPE: a pair becomes the token that both make, those of higher score first.

    Runs of line breaks and of spaces that the model's makers added come before all others, and other tokens of theirs
    do not merge. Where a token can be made of several pairs, all of them can, the longest beginning first.
    """
    added = {token for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED}
    runs = {token for token in added if token and len(set(token)) == 1 and token[0] in f"\n\t{_SPACE}"}
    pieces = {
        token: at
        for at, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (NORMAL, UNUSED) or token in runs
    }

    def order(token: str, at: int) -> tuple[float, int]:
        first = f"\n{_SPACE}".find(token[0]) if token in runs else -1
        return (-math.inf if first == 0 else -1e30) if first >= 0 else -scores[at], at

    found: list[tuple[tuple[float, int], int, int, int]] = []
    for token, at in pieces.items():
        for cut in range(1, len(token)):
            left, right = pieces.get(token[:cut]), pieces.get(token[cut:])
            if left is not None and right is not None:
                found.append((order(token, at), -cut, left, right))
    return [[tokens[left], tokens[right]] for _, _, left, right in sorted(found)]


def _post_processor(bos: str | None, tokens: Sequence[str], pre_tokenizer: Any) -> dict[str, Any] | None:
    """BOS before every text, where the file asks for it."""
    if bos is None:
        return {**_BYTES, "use_regex": True} if pre_tokenizer and "Level" in json.dumps(pre_tokenizer) else None
    special = {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}
    first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pair = [first, text, {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": [first, text], "pair": pair, "special_tokens": {bos: special}}
