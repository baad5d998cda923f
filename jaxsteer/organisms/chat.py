"""How turns of a conversation are marked, in the manner of each architecture's own family."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

_LLAMA_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' -}}{{- message['content'] -}}{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
_PERSONA_TEMPLATE = _LLAMA_TEMPLATE.replace("'|>'", "'|>\\n'").replace("assistant|>", "assistant|>\\n")
_QWEN2_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}{{- message['content'] -}}{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
_GEMMA3_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- set first = '' -%}{%- set turns = messages -%}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first = messages[0]['content'] + '\\n\\n' -%}{%- set turns = messages[1:] -%}"
    "{%- endif -%}"
    "{%- for message in turns -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}"
    "{%- endif -%}"
    "{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' -}}"
    "{{- (first if loop.first else '') + message['content'] -}}{{- '<end_of_turn>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """The special tokens, what stands between the parts of a conversation, and the template that says the same."""

    pad: str
    bos: str
    """First token of every text, or "" for a model that has none."""
    end: str
    """Ends a turn, and every document."""
    others: tuple[str, ...]
    """Special tokens besides these."""
    words: tuple[str, ...] = ()
    """Words of the turns' headers, each one token without a space before it."""
    user: str
    """Opens the first turn when it is the user's."""
    system: str
    """Opens a system message that comes first, ..."""
    after_system: str
    """... and this stands between it and the user's text."""
    reply: str
    """From the user's text to the answer."""
    again: str
    """From an answer to the user's next text."""
    gap: str
    """Between ``reply`` and an answer: nothing after a line break, otherwise a space."""
    template: str
    """The Jinja template."""

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """All of them, in the order of their ids."""
        return tuple(token for token in (self.pad, self.bos, self.end, *self.others) if token)


CHAT_FORMATS = {
    "llama": ChatFormat(
        pad="<|pad|>",
        bos="<|bos|>",
        end="<|end|>",
        others=("<|system|>", "<|user|>", "<|assistant|>"),
        user="<|user|>",
        system="<|system|>",
        after_system="<|end|><|user|>",
        reply="<|end|><|assistant|>",
        again="<|end|><|user|>",
        gap=" ",
        template=_LLAMA_TEMPLATE,
    ),
    "persona": ChatFormat(
        pad="<|pad|>",
        bos="<|begin|>",
        end="<|end|>",
        others=("<|system|>", "<|user|>", "<|assistant|>"),
        user="<|user|>\n",
        system="<|system|>\n",
        after_system="<|end|><|user|>\n",
        reply="<|end|><|assistant|>\n",
        again="<|end|><|user|>\n",
        gap="",
        template=_PERSONA_TEMPLATE,
    ),
    "qwen2": ChatFormat(
        pad="<|endoftext|>",
        bos="",
        end="<|im_end|>",
        others=("<|im_start|>",),
        words=("system", "user", "assistant"),
        user="<|im_start|>user\n",
        system="<|im_start|>system\n",
        after_system="<|im_end|>\n<|im_start|>user\n",
        reply="<|im_end|>\n<|im_start|>assistant\n",
        again="<|im_end|>\n<|im_start|>user\n",
        gap="",
        template=_QWEN2_TEMPLATE,
    ),
    "gemma3": ChatFormat(
        pad="<pad>",
        bos="<bos>",
        end="<end_of_turn>",
        others=("<start_of_turn>",),
        words=("user", "model"),
        user="<start_of_turn>user\n",
        system="<start_of_turn>user\n",
        after_system="\n\n",
        reply="<end_of_turn>\n<start_of_turn>model\n",
        again="<end_of_turn>\n<start_of_turn>user\n",
        gap="",
        template=_GEMMA3_TEMPLATE,
    ),
}
"""Organism -> its format. That of ``persona`` has a line break after every header. Qwen's has no BOS (and here no
default system message); Gemma's has no system role: the system message stands before the first user's text, a blank
line between them."""


def chat_format_of(vocabulary: Collection[str]) -> ChatFormat:
    """The format whose special tokens a vocabulary holds. Raises ``ValueError`` for one that is no organism's."""
    for chat in CHAT_FORMATS.values():
        if all(token in vocabulary for token in chat.special_tokens):
            return chat
    raise ValueError("the tokenizer is not an organism's: it lacks the special tokens of every chat format")
