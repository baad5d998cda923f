"""Tokenizer, chat template, slots, token masks, retokenisation."""

from jaxsteer.prompts.conversation import (
    Conversation,
    Placement,
    Turns,
    as_conversation,
    bos_id,
    encode,
    encode_texts,
    join_answer,
    load_conversations,
    question_conversation,
    render,
    with_system,
)
from jaxsteer.prompts.roles import encode_turns
from jaxsteer.prompts.slots import (
    PAD,
    Slots,
    build_slots,
    first_allowed,
    prompt_text,
    random_rows,
    resized,
    retokenises,
    retokenises_many,
    with_first_tokens,
)
from jaxsteer.prompts.targets import with_target
from jaxsteer.prompts.templates import apply_template, template_of
from jaxsteer.prompts.tokens import allowed_tokens, listed_tokens

__all__ = [
    "with_first_tokens",
    "PAD",
    "Conversation",
    "Placement",
    "Slots",
    "allowed_tokens",
    "apply_template",
    "as_conversation",
    "bos_id",
    "build_slots",
    "encode",
    "encode_texts",
    "encode_turns",
    "first_allowed",
    "join_answer",
    "listed_tokens",
    "load_conversations",
    "prompt_text",
    "Turns",
    "question_conversation",
    "random_rows",
    "render",
    "resized",
    "retokenises",
    "retokenises_many",
    "template_of",
    "with_system",
    "with_target",
]
