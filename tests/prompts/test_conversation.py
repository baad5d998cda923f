"""Rendering and encoding: the space rule, exactly one BOS, templates without system role, decision tokens."""

import json

import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.prompts import (
    Conversation,
    Placement,
    apply_template,
    as_conversation,
    bos_id,
    encode,
    encode_texts,
    join_answer,
    load_conversations,
    question_conversation,
    render,
)
from jaxsteer.prompts.conversation import common_prefix
from tests.helpers.tiny import KINDS, tiny_tokenizer


def with_template(template, base=None, **tokens):
    """A tiny tokenizer with another chat template."""
    base = base or tiny_tokenizer()
    tokenizer = type(base)(tokenizer_object=base.backend_tokenizer, **tokens)
    tokenizer.chat_template = template
    return tokenizer


QUESTION = "Which do you prefer?\n (A) A small reward now\n (B) A large reward later"


@pytest.mark.parametrize("prompt", ["want frank", " want frank"])
def test_the_space_before_the_prompt_is_there_once_and_leaves_with_an_empty_prompt(prompt):
    tokenizer = tiny_tokenizer()
    suffix = Conversation(text="Question: why? {prompt}\nAnswer:")
    assert render(tokenizer, suffix, prompt) == "Question: why? want frank\nAnswer:"
    assert render(tokenizer, suffix, "") == "Question: why?\nAnswer:"
    assert render(tokenizer, Conversation(text="Why? {optim_str}"), "") == "Why?"
    assert render(tokenizer, Conversation(text="{prompt} Why?"), "") == "Why?"
    assert render(tokenizer, Conversation(text="{prompt} Why?"), "want") == "want Why?"


def test_an_empty_system_prompt_leaves_no_system_turn():
    conversation = question_conversation(QUESTION, Placement(slot="system"))
    for kind in KINDS:
        tokenizer = tiny_tokenizer(kind)
        bare = tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
        )
        assert render(tokenizer, conversation, "") == bare
        assert render(tokenizer, question_conversation(QUESTION), "") == bare


def test_system_text_goes_into_the_user_turn_where_the_template_has_no_system_role():
    text = render(tiny_tokenizer("gemma"), question_conversation(QUESTION, Placement(slot="system")), "be frank")
    assert f"user\nbe frank\n\n{QUESTION}" in text


def test_a_template_that_drops_the_system_message_in_silence_gets_it_in_the_user_turn():
    base = tiny_tokenizer()
    dropping = type(base)(tokenizer_object=base.backend_tokenizer)
    dropping.chat_template = "{{ (messages | selectattr('role', 'equalto', 'user') | first)['content'] }}"
    text = render(dropping, question_conversation(QUESTION, Placement(slot="system")), "be frank")
    assert text == f"be frank\n\n{QUESTION}"


@pytest.mark.parametrize("kind", [*KINDS, "bos is a turn marker"])
def test_bos_stands_where_transformers_has_it(kind):
    tokenizer = tiny_tokenizer("qwen" if kind not in KINDS else kind)
    if kind not in KINDS:  # as in SmolLM2: a template writes it, the tokenizer does not
        tokenizer = with_template(tokenizer.chat_template, base=tokenizer, bos_token="<|start|>")
    turns = [{"role": "user", "content": "Why? want frank"}]
    chat = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    for conversation, expected in (
        (Conversation(messages=({"role": "user", "content": "Why? {prompt}"},)), chat),
        (Conversation(text="Why? {prompt}"), tokenizer("Why? want frank")["input_ids"]),
    ):
        assert encode(tokenizer, conversation, "want frank").tolist() == expected
    bos = tokenizer.convert_tokens_to_ids("<|bos|>")
    assert bos_id(tokenizer) == (bos if kind in ("llama3", "gemma") else None)
    assert (encode_texts(tokenizer, ["<|bos|>Why?"])[0] == bos).sum() == 1


def test_answers_follow_one_space_or_a_line_break():
    assert join_answer("Why?", "(A)") == join_answer("Why?", " (A)") == "Why? (A)"
    assert join_answer("assistant\n\n", " (A)") == "assistant\n\n(A)"
    assert join_answer("Why?", "") == "Why?"
    conversation = question_conversation(QUESTION, answer=" (B)")
    assert render(tiny_tokenizer("llama3"), conversation, "").endswith("<|stop|>\n\n(B)")
    assert render(tiny_tokenizer("organism"), conversation, "").endswith("<|assistant|> (B)")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", ["chat", "plain"])
def test_the_decision_token_is_the_last_that_both_answers_share(kind, style):
    tokenizer = tiny_tokenizer(kind)
    undecided = question_conversation(QUESTION, Placement(style=style), alternatives=("(A)", "(B)"))
    ids = encode(tokenizer, undecided, " want frank")
    full = [
        encode(tokenizer, question_conversation(QUESTION, Placement(style=style), answer=a), " want frank")
        for a in ("(A)", "(B)")
    ]
    assert common_prefix(full) == len(ids)
    assert tokenizer.decode([ids[-1]]).strip() == "("
    assert all(np.array_equal(row[: len(ids)], ids) for row in full)


def test_a_one_token_letter_is_decided_at_the_last_template_token():
    tokenizer = tiny_tokenizer("llama3")
    ids = encode(tokenizer, question_conversation(QUESTION, alternatives=("A", "B")), "")
    assert tokenizer.decode([ids[-1]]) == "\n"


def test_alternatives_must_differ():
    conversation = question_conversation(QUESTION, alternatives=("(A)", "(A)"))
    with pytest.raises(UserError, match="no token decides"):
        encode(tiny_tokenizer(), conversation, "")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "no slot"}, "found 0 times"),
        ({"text": "{prompt} and {optim_str}"}, "found 2 times"),
        ({}, "exactly one of the two"),
        ({"text": "{prompt}", "messages": ()}, "exactly one of the two"),
        ({"text": "{prompt}", "answer": "(A)", "alternatives": ("(A)", "(B)")}, "not both"),
    ],
)
def test_conversations_without_one_slot_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Conversation(**fields)


@pytest.mark.parametrize(
    ("placement", "system", "message"),
    [
        ({"style": "poem"}, "", "unknown style"),
        ({"slot": "middle"}, "", "unknown slot"),
        ({"style": "plain", "slot": "system"}, "", "no system message"),
        ({"style": "plain"}, "hi", "no system message"),
        ({"slot": "system"}, "hi", "use 'system-suffix'"),
    ],
)
def test_unknown_placements_are_refused(placement, system, message):
    with pytest.raises(UserError, match=message):
        asked = ((("system", system),) if system else ()) + (("user", QUESTION),)
        question_conversation(asked, Placement(**placement))


def test_a_question_that_holds_the_marker_is_refused():
    with pytest.raises(UserError, match="the question itself"):
        question_conversation("What does {prompt} mean?")


def test_a_missing_template_says_what_to_do():
    tokenizer = tiny_tokenizer()
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="style 'plain'"):
        render(bare, question_conversation(QUESTION), "")


def test_a_template_that_refuses_the_turns_is_quoted():
    base = tiny_tokenizer()
    strict = type(base)(tokenizer_object=base.backend_tokenizer)
    strict.chat_template = "{{ raise_exception('no turns today') }}"
    for slot in ("suffix", "system"):
        with pytest.raises(UserError, match="no turns today"):
            render(strict, question_conversation(QUESTION, Placement(slot=slot)), "be frank")
    answered = Conversation(
        messages=({"role": "system", "content": "{prompt}"}, {"role": "assistant", "content": "Hi"})
    )
    assert "be frank<|end|>" in render(tiny_tokenizer("gemma"), answered, "be frank")


BE_NICE = [{"role": "system", "content": "Be nice"}, {"role": "user", "content": "Hi"}]
LOOP = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ({"tool_use": "tools", "default": LOOP}, "system:Be nice;user:Hi;"),
        ("{{ strftime_now('%d %b %Y') }} " + LOOP, "26 Jul 2024 system:Be nice;user:Hi;"),
        ("{{ date_string }} " + LOOP, "26 Jul 2024 system:Be nice;user:Hi;"),
        ("{% if messages[0].role == 'system' %}{{ 'N' + 1 }}{% endif %}" + LOOP, "user:Be nice\n\nHi;"),
        ("{% if messages[0].role == 'system' %}{{ 1 / 0 }}{% endif %}" + LOOP, "user:Be nice\n\nHi;"),
        (LOOP.replace("m.content", "m.content[0].text"), "system:Be nice;user:Hi;"),
        ("{% for m in messages %}{% for p in m.content %}{{ p['text'] }}{% endfor %};{% endfor %}", "Be nice;Hi;"),
        ("{% generation %}" + LOOP + "{% endgeneration %}", "system:Be nice;user:Hi;"),
    ],
)
def test_templates_are_read_as_transformers_does_and_lose_nothing(template, expected):
    assert apply_template(with_template(template), BE_NICE) == expected


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ({"tool_use": LOOP, "rag": LOOP}, "default"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ messages[0].role }}", "leaves out what the messages say"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ '\\ud800' }}" + LOOP, "UnicodeEncodeError"),
        ("{{ 'a' * 10 ** 8 }}", "it writes 100000000 characters"),
        ("{{ 'a' * 10 ** 10 }}", "too long, or too much memory"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "too long, or too much"),
    ],
)
def test_whatever_goes_wrong_in_a_template_is_one_error(template, says):
    with pytest.raises(UserError, match=says):
        apply_template(with_template(template), BE_NICE)
    assert apply_template(with_template(LOOP), BE_NICE) == "system:Be nice;user:Hi;"  # the next one is not harmed


def test_braces_and_special_spellings_in_text_are_left_alone():
    tokenizer = tiny_tokenizer()
    assert render(tokenizer, Conversation(text="{x} {{y}} {prompt}"), "{z}") == "{x} {{y}} {z}"
    assert encode_texts(tokenizer, []) == []


TURNS = [{"role": "system", "content": "You help. {optim_str}"}, {"role": "user", "content": "Why?"}]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Why? {prompt}", Conversation(text="Why? {prompt}")),
        (TURNS, Conversation(messages=({"role": "system", "content": "You help. {prompt}"}, TURNS[1]))),
        (
            {"text": "Why? {prompt}", "alternatives": ["(A)", "(B)"]},
            Conversation(text="Why? {prompt}", alternatives=("(A)", "(B)")),
        ),
    ],
)
def test_a_users_text_or_turns_become_a_conversation(given, expected, tmp_path):
    assert as_conversation(given) == expected == as_conversation(expected)
    for text in (json.dumps([given]), f"{json.dumps(given)}\n\n{json.dumps(given)}\n"):
        (tmp_path / "c.json").write_text(text)
        assert set(map(str, load_conversations(tmp_path / "c.json"))) == {str(expected)}
    (tmp_path / "c.json").write_text(json.dumps(TURNS))
    assert len(load_conversations(tmp_path / "c.json")) == 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("Why?", "found 0 times"),
        ({"text": "{prompt}", "anser": "x"}, "unknown: anser"),
        ([{"role": "user"}], "list of"),
        ({"messages": "{prompt}"}, "list of"),
    ],
)
def test_what_is_no_conversation_is_refused_by_number(given, says, tmp_path):
    with pytest.raises(UserError, match=says):
        as_conversation(given)
    (tmp_path / "c.json").write_text(json.dumps(["{prompt}", given]))
    with pytest.raises(UserError, match="conversation 2: "):
        load_conversations(tmp_path / "c.json")


def test_a_file_of_conversations_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="missing.json"):
        load_conversations(tmp_path / "missing.json")
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(UserError, match="no conversation"):
        load_conversations(tmp_path / "c.json")
    (tmp_path / "c.json").write_text("Why? {prompt}")
    with pytest.raises(UserError, match="JSON"):
        load_conversations(tmp_path / "c.json")
