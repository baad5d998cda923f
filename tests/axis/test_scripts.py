"""Scripted conversations and templates that ship."""

from __future__ import annotations

import collections
import json

import pytest

from jaxsteer.axis.scripts import load_scripts, persona_attacks
from jaxsteer.errors import UserError


def test_four_domains_of_at_least_five_scripts_of_at_least_eight_messages():
    domains = load_scripts().domains
    assert set(domains) == {"coding", "writing", "therapy", "philosophy"}
    assert all(len(scripts) >= 5 for scripts in domains.values())
    messages = [message for scripts in domains.values() for script in scripts for message in script]
    assert all(len(script) >= 8 for scripts in domains.values() for script in scripts)
    assert [message for message, n in collections.Counter(messages).items() if n > 1] == []
    for message in messages:
        assert message == message.strip() and message.isascii() and message[0].isupper() and message[-1] in ".?", (
            message
        )


def test_templates_hold_one_request_each():
    templates = persona_attacks()
    assert len(templates) >= 12 and len(set(templates.values())) == len(templates)
    for template in templates.values():
        assert template.count("{request}") == 1 and template.replace("{request}", "").count("{") == 0
        assert template.isascii() and "  " not in template


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        ({}, "domains is missing"),
        ({"domains": {}}, "there is no domain"),
        ({"domains": {"law": []}}, "domain 'law' has no conversation"),
        ({"domains": {"law": [["hello"], ["one", " "]]}}, "domain 'law', conversation 1: a message is empty"),
        ({"domains": {"law": [["hello", 3]]}}, r"domains.law\[0\]\[1\] is 3, expected a text"),
    ],
)
def test_a_file_with_a_fault_is_named(tmp_path, whole, message):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(whole))
    with pytest.raises(UserError, match=message) as error:
        load_scripts(path)
    assert str(path) in str(error.value)


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"domains": {"law": [["May I?", "And then?"]]}}))
    assert load_scripts(str(path)).domains == {"law": (("May I?", "And then?"),)}
