"""GGUF models give what the Hugging Face directories that they were made of give."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize, quantize

import jaxsteer
from checkpoints_convert.gguf import read_gguf_model
from checkpoints_convert.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_files
from jaxsteer.checkpoints.inspect import describe
from jaxsteer.cli import main
from jaxsteer.errors import UserError
from jaxsteer.models.config import GLOBAL_WINDOW, Rope
from tests.helpers.checkpoints import FAMILIES, family_config, hf_directory
from tests.helpers.gguf_files import write_gguf_model

TOKENS = np.random.default_rng(0).integers(0, 300, (2, 9)).astype(np.int32)


def config_of(family: str, *, factor: float = 8.0, **changes):
    """A config that GGUF can express: widths of whole blocks, Gemma's own pattern of layers.

    ``factor`` is that of Gemma 3's linear rope scaling; 1 for none.
    """
    layers = {"gemma2": 2, "gemma3": 7}.get(family, 2)
    config = family_config(family, n_layers=layers, vocab_size=320, d_model=64, d_mlp=96, d_head=16)
    config = dataclasses.replace(config, **changes)
    config = dataclasses.replace(config, query_scale=1 / math.sqrt(config.d_head))
    if family == "gemma2":
        config = dataclasses.replace(config, attn_softcap=50.0, final_softcap=30.0)
    if family == "gemma3":
        full = [(layer + 1) % 6 == 0 for layer in range(layers)]
        config = dataclasses.replace(
            config,
            windows=tuple(GLOBAL_WINDOW if f else 6 for f in full),
            rope_index=tuple(int(f) for f in full),
            ropes=(
                Rope(theta=10_000.0),
                Rope(theta=1e6, kind="linear", factor=factor) if factor > 1 else Rope(theta=1e6),
            ),
        )
    if family == "llama":
        config = dataclasses.replace(config, ropes=(Rope(theta=500.0),))
    return config


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt2"])
def test_a_file_gives_the_logits_of_its_source(family: str, tmp_path: Path) -> None:
    source = hf_directory(tmp_path / "hf", config_of(family))
    path = write_gguf_model(source, tmp_path / "model.gguf")
    ours, theirs = jaxsteer.load(path), jaxsteer.load(source)
    assert ours.config == theirs.config
    np.testing.assert_allclose(jaxsteer.logits(ours, TOKENS), jaxsteer.logits(theirs, TOKENS), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_matrices_are_what_the_package_makes_of_them(kind: str, tmp_path: Path) -> None:
    source = hf_directory(tmp_path / "hf", config_of("llama"))
    model = read_gguf_model(write_gguf_model(source, tmp_path / "m.gguf", kind=kind))
    exact = read_gguf_model(write_gguf_model(source, tmp_path / "exact.gguf"))
    quantisation = GGMLQuantizationType[kind]
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        whole = np.concatenate(list(exact.tensors[name].blocks(7)))
        expected = dequantize(quantize(whole, quantisation), quantisation)  # by rows, so that their order is no matter
        found = np.concatenate(list(model.tensors[name].blocks(5)))
        np.testing.assert_array_equal(found.astype(np.float32), expected)


@pytest.mark.parametrize("kind", sorted({k.name for k in GGML_QUANT_SIZES} - {"F32", "F64"}))
def test_every_type_is_dequantised_by_the_package_or_refused_by_name(kind: str, tmp_path: Path) -> None:
    """Blocks of random bytes: what the package cannot quantise itself, files hold all the same."""
    source = hf_directory(tmp_path / "hf", config_of("qwen2", d_mlp=512))
    path = write_gguf_model(source, tmp_path / "m.gguf")
    quantisation = GGMLQuantizationType[kind]
    block, width = GGML_QUANT_SIZES[quantisation]
    name, shape = "model.layers.0.mlp.down_proj.weight", (64, 512)
    model = read_gguf_model(path)
    tensor = model.tensors[name]
    raw = np.random.default_rng(0).integers(0, 60, shape[0] * shape[1] // block * width).astype(np.uint8)
    entry = dataclasses.replace(tensor.entry, kind=int(quantisation), nbytes=len(raw), offset=0)
    (tmp_path / "raw").write_bytes(raw.tobytes())
    tensor = dataclasses.replace(tensor, entry=entry, file=tmp_path / "raw")
    try:
        expected = dequantize(raw.reshape(shape[0], -1), quantisation)
    except NotImplementedError:
        data = path.read_bytes()
        at = data.index(b"blk.0.ffn_down.weight") + len(b"blk.0.ffn_down.weight") + 4 + 16
        path.write_bytes(data[:at] + struct.pack("<I", int(quantisation)) + data[at + 4 :])
        with pytest.raises(UserError, match="cannot be dequantised|no multiple|overlap"):
            read_gguf_model(path)
        return
    np.testing.assert_array_equal(np.concatenate(list(tensor.blocks(10))).astype(np.float32), expected)


def test_parts_are_one_model(tmp_path: Path) -> None:
    source = hf_directory(tmp_path / "hf", config_of("llama"))
    whole = read_gguf_model(write_gguf_model(source, tmp_path / "whole.gguf"))
    first = write_gguf_model(source, tmp_path / "parts.gguf", parts=3)
    assert len(read_gguf_model(first).files) == 3 and read_gguf_model(first).tensors.keys() == whole.tensors.keys()
    np.testing.assert_array_equal(
        jaxsteer.logits(jaxsteer.load(first), TOKENS), jaxsteer.logits(jaxsteer.load(tmp_path / "whole.gguf"), TOKENS)
    )
    with pytest.raises(UserError, match="later part"):
        read_gguf_model(first.with_name("parts-00002-of-00003.gguf"))
    first.with_name("parts-00003-of-00003.gguf").unlink()
    with pytest.raises(UserError, match="00003-of-00003.gguf is missing"):
        read_gguf_model(first)


def test_llama_3_scaling_is_told_from_its_factors(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    from checkpoints_convert.gguf import _llama3_rope
    from jaxsteer.files.gguf import read_gguf_header
    from jaxsteer.models.attention import inverse_frequencies

    rope = Rope(
        theta=5e5, kind="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )
    factors = inverse_frequencies(Rope(theta=5e5), 64) / inverse_frequencies(rope, 64)
    for name, values in (("good", factors), ("other", factors**1.1)):
        writer = GGUFWriter(tmp_path / name, "llama")
        writer.add_tensor("rope_freqs.weight", values.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    entry = read_gguf_header(tmp_path / "good")[1]["rope_freqs.weight"]
    found = _llama3_rope(tmp_path / "good", entry, 5e5, 64)
    assert found["factor"] == 32.0 and found["original_max_position_embeddings"] == 8192
    with pytest.raises(UserError, match="rope_freqs.weight"):
        _llama3_rope(tmp_path / "other", entry, 5e5, 64)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"llama.expert_count": 4}, "mixtures of experts"),
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn'"),
        ({"tokenizer.ggml.model": "t5"}, "model 't5'"),
        ({"general.architecture": "mamba"}, "architecture 'mamba'"),
        ({"llama.attention.layer_norm_rms_epsilon": math.nan}, "m.gguf: llama.attention.layer_norm_rms_epsilon is nan"),
        ({"llama.rope.freq_base": math.inf}, "m.gguf: llama.rope.freq_base is inf; one finite number"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "m.gguf.*eos"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(keys: dict, message: str, tmp_path: Path) -> None:
    path = write_gguf_model(hf_directory(tmp_path / "hf", config_of("llama")), tmp_path / "m.gguf", keys=keys)
    for call in (jaxsteer.load, describe):
        with pytest.raises(UserError, match=message):
            call(str(path))


def test_a_tensor_that_has_no_place_is_refused(tmp_path: Path) -> None:
    path = write_gguf_model(hf_directory(tmp_path / "hf", config_of("llama")), tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes().replace(b"blk.0.ffn_gate.weight", b"blk.0.ffn_gatf.weight"))
    with pytest.raises(UserError, match="ffn_gatf"):
        read_gguf_model(path)


def test_the_commands_take_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = hf_directory(tmp_path / "hf", config_of("llama"))
    path = write_gguf_model(source, tmp_path / "m.gguf", kind="Q4_1")
    for words, said in (
        (["inspect", str(path)], ("float32", "Q4_1")),
        (["convert", str(path), str(tmp_path / "out"), "--dtype", "bfloat16"], ("Wrote",)),
        (["convert", "--verify", str(path), str(tmp_path / "out")], ("bit for bit",)),
        (["generate", "--model", str(path), "--plain", "--max-new-tokens", "2", "the"], ("the",)),
    ):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert all(word in out for word in said), out


def test_a_loaded_file_has_its_name_its_tokenizer_and_its_ends(tmp_path: Path) -> None:
    path = write_gguf_model(hf_directory(tmp_path / "hf", config_of("gemma3")), tmp_path / "m.gguf")
    found = describe(str(path))
    assert found.config == config_of("gemma3") and found.name == "m.gguf"
    model = jaxsteer.load(path)
    assert model.name == "m.gguf" and model.stop_tokens == (1,)
    ids = model.tokenizer("the inner", add_special_tokens=True)["input_ids"]
    assert model.tokenizer.convert_ids_to_tokens(ids)[0] == "<s>"
    assert model.tokenizer.decode(ids, skip_special_tokens=True) == "the inner"
    assert model.params.embed.dtype == jnp.float32


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_bpe_splits_as_its_name_says(pre: str) -> None:
    from tokenizers import Tokenizer, pre_tokenizers

    letters = list(pre_tokenizers.ByteLevel.alphabet())
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*letters, "1" + "2", "12" + "3", "123" + "4"],
        "tokenizer.ggml.merges": ["1 2", "12 3", "123 4"],
    }
    tokenizer = Tokenizer.from_str(tokenizer_files(keys, "x")["tokenizer.json"])
    most = {"smollm": 1, "qwen2": 1, "deepseek-r1-qwen": 1, "gpt-2": 4}.get(pre, 3)  # digits of a number kept together
    assert max(len(token) for token in tokenizer.encode("1234").tokens) == most
    text = "Don't  stop:\n\n naïve 漢字\t🎉 "
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_sentencepiece_merges_by_score(tmp_path: Path) -> None:
    """Against a direct reading of the algorithm: merge the neighbours that make the piece of highest score."""
    path = write_gguf_model(hf_directory(tmp_path / "hf", config_of("llama")), tmp_path / "m.gguf")
    side = read_gguf_model(path).side()
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(side["tokenizer.json"])
    vocabulary = json.loads(side["tokenizer.json"])["model"]["vocab"]

    def reference(text: str) -> list[str]:
        pieces = list("\u2581" + text.replace(" ", "\u2581"))
        while True:
            pairs = [(vocabulary[a + b], i) for i, (a, b) in enumerate(zip(pieces, pieces[1:])) if a + b in vocabulary]
            if not pairs:
                return pieces
            _, i = min(pairs)  # scores fall with the number
            pieces[i : i + 2] = ["".join(pieces[i : i + 2])]

    for text in ("the inner thing", "then other there", "in the th", "xyz the"):
        assert tokenizer.encode(text, add_special_tokens=False).tokens == reference(text)
