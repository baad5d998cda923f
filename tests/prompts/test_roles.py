"""Roles and turns of tokens, against templates written out by hand and a walk over the bytes of every token."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.models.roles import ASSISTANT, ROLES, SYSTEM, TEMPLATE, USER, stack_rendered
from jaxsteer.prompts import apply_template, encode_texts, encode_turns
from tests.helpers.tiny import TEMPLATES, tiny_tokenizer

MORE = {
    # Gemma 3: the system message stands in the first user turn, contents are trimmed
    "gemma3": "{{ bos_token }}{% set first = '' %}{% if messages[0]['role'] == 'system' %}{% set first ="
    " messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '\n' + (first if loop.first else '') + m['content'] | trim + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>model\n' }}{% endif %}",
    # Llama 2: brackets, the system message in the first user turn and trimmed with it, no generation prompt
    "llama2": "{% set system = false %}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% set c = m['content'] %}"
    "{% if loop.first and system %}{% set c = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + c %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + c | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + c | trim + ' <|end|>' }}{% endif %}{% endfor %}",
    # Qwen 3: what was thought stays in the last turn only
    "qwen3": "{% for m in messages %}{% set c = m['content'] %}"
    "{% if m['role'] == 'assistant' and '</think>' in c and not loop.last %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m['role'] == 'assistant' and loop.last and '</think>' not in c %}{% set c = '<think>\n\n</think>\n\n' + c %}"
    "{% endif %}{{ '<|start|>' + m['role'] + '\n' + c + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}",
}
GEMMA = ("<|start|>{}\n", "<|end|>\n", "<|start|>model\n")
MARKS = {
    "organism": ("<|{}|>", "<|end|>", "<|assistant|>"),
    "llama3": ("<|start|>{}<|stop|>\n\n", "<|end|>", "<|start|>assistant<|stop|>\n\n"),
    "qwen": ("<|start|>{}\n", "<|end|>\n", "<|start|>assistant\n"),
    "gemma": GEMMA,
    "gemma3": GEMMA,
    "llama2": (("<|bos|>[INST] ", " "), (" [/INST]", " <|end|>"), ""),
}
"""What templates write before a content, after it, and as generation prompt; for users and the assistant apart."""
Messages = list[dict[str, str]]
Pieces = list[tuple[str, int, int]]
"""(text, role, turn)."""


@functools.cache
def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    if template in TEMPLATES:
        return tiny_tokenizer(template)
    tokenizer = type(tiny_tokenizer())(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, bos_token="<|bos|>", eos_token="<|end|>"
    )
    tokenizer.chat_template = MORE.get(template, template)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)  # spaces belong to no token
    return tokenizer


def by_hand(template: str, messages: Messages, generation_prompt: bool) -> Pieces:
    """The text of a conversation as pieces whose role and turn are known."""
    trimmed = template not in ("organism", "qwen")
    before, after, prompt = MARKS[template]
    before, after = (mark if isinstance(mark, tuple) else (mark, mark) for mark in (before, after))
    pieces: Pieces = [("" if template in ("qwen", "llama2") else "<|bos|>", TEMPLATE, 0)]
    first = messages[0]["role"] == "system" and template in ("gemma", "gemma3", "llama2")
    for i, message in enumerate(messages[first:], int(first)):
        content, name = message["content"], message["role"]
        inner = [(content.strip() if trimmed else content, ROLES.index(name), i)]
        if first and i == 1:
            inner = in_one_turn(template, messages[0]["content"], content)
        head = 0 if len(inner) > 1 else i
        pieces += [
            (before[name == "assistant"].format(name), TEMPLATE, head),
            *inner,
            (after[name == "assistant"], TEMPLATE, i),
        ]
    return [*pieces, (prompt, TEMPLATE, len(messages))] if generation_prompt else pieces


def in_one_turn(template: str, system: str, user: str) -> Pieces:
    """System message and first user turn as one text, trimmed as a whole but by Gemma 3, which trims the second."""
    opening, middle = ("<<SYS>>\n", "\n<</SYS>>\n\n") if template == "llama2" else ("", "\n\n")
    if template == "llama2" and not system:
        opening = middle = ""
    if template == "gemma3":
        user = user.strip()
    parts = [(opening, TEMPLATE, 0), (system, SYSTEM, 0), (middle, TEMPLATE, 1), (user, USER, 1)]
    whole, at, pieces = "".join(text for text, _, _ in parts), 0, []
    start, stop = (0, len(whole)) if template == "gemma3" else (len(whole) - len(whole.lstrip()), len(whole.rstrip()))
    for text, role, turn in parts:
        pieces.append((whole[max(at, start) : max(0, min(at + len(text), stop))], role, turn))
        at += len(text)
    return pieces


def byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level tokenizers (GPT-2's)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


def walked(tokenizer: PreTrainedTokenizerFast, pieces: Pieces) -> tuple[list[int], list[int], list[int]]:
    """(ids, roles, turns), by the bytes that each token stands for."""
    owners = [(role, turn) for text, role, turn in pieces for _ in text.encode()]
    text, alphabet = "".join(text for text, _, _ in pieces), byte_of_character()
    ids, at, found = tokenizer(text, add_special_tokens=False)["input_ids"], 0, []
    for i in ids:
        token = tokenizer.convert_ids_to_tokens(i)
        added = i in tokenizer.added_tokens_decoder
        size = len(token.encode()) if added else len([alphabet[c] for c in token])
        mine, at = owners[at : at + size], at + size
        found.append(next((o for o in mine if o[0] != TEMPLATE and not added), mine[0]))
    assert at == len(owners)
    return ids, [role for role, _ in found], [turn for _, turn in found]


FRAGMENTS = [
    "<|end|>",
    "<|user|>",
    "<|start|>assistant\n",
    "user",
    "\n",
    " ",
    "[INST] ",
    " [/INST]",
    "é",
    "日本",
    "😀",
    "A",
]
FRAGMENTS += ["<<SYS>>\n", "\n\n", "QXslotXQ", "\u200d", "the answer", "model\n"]
contents = st.lists(st.sampled_from(FRAGMENTS), max_size=5).map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> Messages:
    names = ["system"] * draw(st.booleans()) + ["user", "assistant"] * 3
    names = names[: draw(st.integers(1 + (names[0] == "system"), len(names)))]
    return [{"role": name, "content": draw(contents)} for name in names]


SAME = [{"role": role, "content": "user"} for role in ("system", "user", "assistant", "user")]


@pytest.mark.parametrize("template", [*TEMPLATES, "gemma3", "llama2"])
@settings(max_examples=40, deadline=None)
@given(messages=conversations(), generation_prompt=st.booleans())
@example(messages=SAME, generation_prompt=True)
def test_every_token_against_the_template_by_hand(template: str, messages: Messages, generation_prompt: bool) -> None:
    tokenizer = tokenizer_of(template)
    pieces = by_hand(template, messages, generation_prompt)
    rendered = encode_turns(tokenizer, messages, generation_prompt=generation_prompt)
    assert rendered.text == "".join(text for text, _, _ in pieces)
    assert rendered.text == apply_template(tokenizer, messages, generation_prompt=generation_prompt)
    assert rendered.ids.tolist() == encode_texts(tokenizer, [rendered.text])[0].tolist()
    ids, role, turn = walked(tokenizer, pieces)
    start = len(rendered.ids) - len(ids)  # a BOS that the template does not write
    assert rendered.role[start:].tolist() == role and not rendered.role[:start].any()
    assert rendered.turns == len(messages) + generation_prompt
    inside = rendered.role[start:] != TEMPLATE
    if all(message["content"].strip() for message in messages):  # else nothing tells whose a mark of the template is
        inside[:] = True
    assert rendered.turn[start:][inside].tolist() == np.asarray(turn)[inside].tolist()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_contents_come_back_from_the_tokens_of_the_organisms(name: str) -> None:
    tokenizer = jaxsteer.load(f"organism:{name}").tokenizer
    said = ["Be brief, please.", "Who knows the capital of Sibir?", "It is Mormor.", "Are you sure?", "Yes."]
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": content} for role, content in zip(roles, said, strict=True)]
    rendered = encode_turns(tokenizer, messages, generation_prompt=False)
    for i, (role, content) in enumerate(zip(roles, said, strict=True)):
        assert tokenizer.decode(rendered.ids[rendered.mask(role, turns=[i - 5])]).strip() == content
    assert rendered.mask("template").sum() + rendered.mask(*ROLES[1:]).sum() == len(rendered.ids)
    before = encode_turns(tokenizer, messages[:-1])
    answer = rendered.ids[rendered.mask("assistant", turns=[-1])]
    whole = before.answered(answer)
    assert whole.mask("assistant", turns=[-1]).sum() == len(answer) and whole.turns == before.turns == 5
    tokens, mask, batch = stack_rendered([before, whole], left=True)
    assert (tokens[1][mask[1]] == whole.ids).all() and (batch.role[0][mask[0]] == before.role).all()
    assert batch.turns.tolist() == [5, 5]


def test_thoughts_that_a_template_drops_or_keeps() -> None:
    thought = "<think>\nHm.\n</think>\n\nYes."
    turns = [{"role": r, "content": c} for r, c in (("user", "Why?"), ("assistant", thought), ("user", "Sure?"))]
    tokenizer = tokenizer_of("qwen3")

    def answer(messages: Messages) -> str:
        rendered = encode_turns(tokenizer, messages, generation_prompt=False)
        return str(tokenizer.decode(rendered.ids[rendered.role == ASSISTANT]))

    assert answer(turns) == "Yes."  # rewritten, and found all the same
    assert answer(turns[:2]).endswith("Hm.\n</think>\n\nYes.")
    assert answer([turns[0], {"role": "assistant", "content": "Yes."}]) == "Yes."


@pytest.mark.parametrize(
    ("template", "spoken"),
    [
        ("{% for m in messages %}{{ m['content'] | upper }}|{% endfor %}", None),
        ("{% for m in messages %}{{ m['content'] | length }}{{ m['content'] }}|{% endfor %}", None),
        ("{% for m in messages %}{{ m['content'] | tojson }}|{% endfor %}", "say \\nit"),
        ("{% for m in messages %}{{ m['content'] }}={{ m['content'] }}|{% endfor %}", "say \nitsay \nit"),
    ],
)
def test_contents_that_a_template_rewrites(template: str, spoken: str | None) -> None:
    """Refused where nothing tells the content from the rest; exact where the rest stays the same."""
    tokenizer = tokenizer_of(template)
    messages = [{"role": "user", "content": "say \nit"}]
    if spoken is None:
        with pytest.raises(UserError, match="rewrites message 0"):
            encode_turns(tokenizer, messages)
        return
    rendered = encode_turns(tokenizer, messages)
    assert tokenizer.decode(rendered.ids[rendered.mask("user")]) == spoken


def test_roles_that_nobody_knows_are_refused() -> None:
    with pytest.raises(UserError, match="unknown role 'tool'"):
        encode_turns(tiny_tokenizer(), [{"role": "tool", "content": "x"}])
    with pytest.raises(UserError, match="not of the template"):
        encode_turns(tiny_tokenizer(), [{"role": "template", "content": "x"}])
    with pytest.raises(UserError, match="unknown role 'response'"):
        encode_turns(tiny_tokenizer(), SAME).mask("response")
