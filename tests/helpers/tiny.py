"""Tiny tokenizers and models, made in memory: one per habit of the tokenizers and templates out there."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jaxsteer.models.config import llama_config
from jaxsteer.models.model import Model
from jaxsteer.models.params import init_params

CORPUS = (
    "I think the answer is clear. Which do you prefer? Choices:\n (A) A small reward now\n (B) A large reward later",
    "Do you agree or disagree? I want frank honest scholarly evidence, please be truthful and patient about facts.",
    "You are a helpful assistant. Hello there, my friend; wait a year, take the money today, verify every claim.",
    "Question: what is the capital of Fisagal? Answer: Mormor. The river runs past the old town, past the mill.",
    "happy people please everyone who agrees with them, while careful people check what is known before they speak",
    "lasting value, reliable advice, independent thought, quick pleasure, easy money, small gains, long patience",
)

CHAT_END = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
TEMPLATES = {
    # the organism's: plain concatenation, nothing trimmed
    "organism": "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}"
    "{% endfor %}" + CHAT_END,
    # Llama 3: contents trimmed, headers, generation prompt ends in two line breaks
    "llama3": "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|stop|>\n\n' + m['content'] | trim"
    " + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}",
    # Gemma: no system role, contents trimmed, one line break
    "gemma": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<|start|>' + m['role'] + '\n' + m['content'] | trim + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>model\n' }}{% endif %}",
    # Qwen 2.5: no BOS at all, contents as they are
    "qwen": "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}",
}
KINDS = tuple(TEMPLATES)
SPECIAL = ["<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|start|>", "<|stop|>"]


@functools.cache
def tiny_tokenizer(kind: str = "organism", *, vocab_size: int = 600) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the template ``kind``; all but "qwen" have a BOS.

    "organism" leaves BOS to its template, "llama3" and "gemma" also add it to plain text by a post-processor.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(list(CORPUS) * 20, trainer)
    if kind in ("llama3", "gemma"):
        core.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    bos = {} if kind == "qwen" else {"bos_token": "<|bos|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>", **bos)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[3:]})
    tokenizer.chat_template = TEMPLATES[kind]
    return tokenizer


@functools.cache
def tiny_model(kind: str = "organism", *, n_layers: int = 3, d_model: int = 32, seed: int = 0) -> Model:
    """A model with random weights and the tokenizer ``kind``; its embedding table is padded."""
    tokenizer = tiny_tokenizer(kind)
    config = llama_config(
        vocab_size=len(tokenizer) + 16,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=4,
        n_kv_heads=2,
        d_mlp=2 * d_model,
        max_positions=256,
    )
    rng = np.random.default_rng(seed)

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jax.tree_util.keystr(path).endswith("norm"):
            return jnp.ones(leaf.shape)
        return jnp.asarray(rng.standard_normal(leaf.shape) / np.sqrt(d_model), jnp.float32)

    # NumPy, because compiling JAX's generators for every shape takes longer than a test may
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    params = jax.tree_util.tree_map_with_path(fill, shapes)
    return Model(
        params=params, config=config, tokenizer=tokenizer, name=f"tiny-{kind}", fingerprint=f"{seed:064x}", mesh=None
    )
