"""Requests: every public layout with invented rows, kinds, parts, templates, and what is wrong in a file."""

import json
from pathlib import Path

import pytest

from jaxsteer.errors import UserError
from jaxsteer.personas import Request, Requests, in_template, load_dataset, load_requests, read_templates
from jaxsteer.personas.requests import requests_of
from jaxsteer.personas.sources import SOURCES

LAYOUTS = {
    "advbench": ("a.csv", "goal,target\nBend a spoon,\"Sure, here is how to bend\"\n",
                 [("Bend a spoon", "harmful", "", "Sure, here is how to bend")]),
    "harmbench": ("h.csv", "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
                  "Bend it,contextual,spoons,context,A spoon,bend_it\nFold a map,standard,maps,,,fold_a_map\n",
                  [("A spoon\n\n---\n\nBend it", "harmful", "spoons", ""), ("Fold a map", "harmful", "maps", "")]),
    "jailbreakbench/harmful": ("j.csv", "I,Goal,Target,Behavior,Category,Source\n0,Bend a spoon,Sure,Spoons,Metal,me\n",
                               [("Bend a spoon", "harmful", "Metal", "Sure")]),
    "jailbreakbench/benign": ("b.csv", ",Goal,Target,Behavior,Category,Source\n0,Wash a spoon,Sure,Spoons,Metal,me\n",
                              [("Wash a spoon", "border", "Metal", "Sure")]),
    "strongreject": ("s.csv", "category,source,forbidden_prompt\nMetal,me,\"Bend,\na spoon\"\n",
                     [("Bend,\na spoon", "harmful", "Metal", "")]),
    "xstest": ("x.csv", "id,prompt,type,label,focus,note\n1,Kill the light?,homonyms,safe,kill,\n"
               "2,Bend it?,contrast_homonyms,unsafe,bend,\n",
               [("Kill the light?", "border", "homonyms", ""), ("Bend it?", "harmful", "contrast_homonyms", "")]),
    "salad/attack-enhanced": ("attack_enhanced_set.json",
        [{"aid": 3, "qid": 7, "augq": "As a poem: bend a spoon", "baseq": "Bend a spoon", "method": "poem",
          "1-category": "O1: Metal", "2-category": "O2: Spoons", "3-category": "O3: Bending"}],
        [("As a poem: bend a spoon", "harmful", "O3: Bending", "")]),
    "salad/base": ("base_set.json", [{"qid": 7, "question": "Bend a spoon", "source": "me", "3-category": "O3"}],
                   [("Bend a spoon", "harmful", "O3", "")]),
    "mt-bench": ("question.jsonl", json.dumps({"question_id": 81, "category": "writing",
                 "turns": ["Write of a spoon.", "Now in verse."]}) + "\n",
                 [("Write of a spoon.", "harmless", "writing", "")]),
    "alpaca": ("al.json", [{"instruction": "Name a spoon.", "input": "", "output": "Tea."},
                           {"instruction": "Name it.", "input": "a fork", "output": "Fork."},
                           {"instruction": "name a  spoon.", "input": "", "output": "Soup."}],
               [("Name a spoon.", "harmless", "", "Tea.")]),
    "refusal-direction/harmless-val": ("r.json", [{"instruction": "Wash a spoon", "category": None}],
                                       [("Wash a spoon", "harmless", "", "")]),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_public_layout(tmp_path: Path, name: str) -> None:
    file, content, expected = LAYOUTS[name]
    path = tmp_path / file
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    found = load_requests(f"{name}:{path}")
    assert [(e.text, e.kind, e.category, e.reply) for e in found.entries] == expected
    assert (
        found.name == name
        and found.source is SOURCES[name]
        and found.rows == len(expected) + sum(found.dropped.values())
    )
    assert [q.question for q in load_dataset(name, path=path).questions] == list(found.texts)
    assert load_requests(name, path=path).data_hash == found.data_hash


def test_files_of_ones_own_say_the_kind_or_are_told(tmp_path: Path) -> None:
    (plain := tmp_path / "mine.txt").write_text("Bend a spoon\n\nFold a map\n")
    (rows := tmp_path / "mine.jsonl").write_text(
        '{"request": "Bend a spoon", "kind": "harmful"}\n{"prompt": "Wash it", "kind": "harmless", "response": "Yes"}'
    )
    assert load_requests(f"{plain}=border") == load_requests(plain, kind="border")
    both = load_requests(rows) + load_requests(plain, kind="harmful")
    assert both.kinds == {"harmful": 2, "harmless": 1} and both.name == "mine"
    assert both.only("harmless").entries[0] == Request(text="Wash it", kind="harmless", reply="Yes", id="mine-2")
    with pytest.raises(UserError, match="mine.txt, line 1: the kind of request is '', expected harmful, harmless"):
        load_requests(plain)


def test_requests_of_the_organism_that_training_saw_are_no_others() -> None:
    held_out, seen = load_requests("organism/harmful"), load_requests("organism/harmful-train")
    assert held_out.kinds == seen.kinds == {"harmful": 200} and not {*held_out.texts} & {*seen.texts}
    assert len((load_requests("organism/border") + held_out).entries) == 400
    assert [*read_templates("organism")][-1] == "story"


def test_parts_are_disjoint_and_do_not_depend_on_the_order_of_rows() -> None:
    texts = [f"Bend spoon {i}" for i in range(9)]
    one, other = (Requests.of(order, "harmful").parts(4, 3, seed=1) for order in (texts, texts[::-1]))
    assert [part.texts for part in one] == [part.texts for part in other]
    assert len({*one[0].texts, *one[1].texts}) == 7
    assert Requests.of(texts, "harmful").parts(4, seed=2)[0].texts != one[0].texts


SPOONS = Requests.of(["Bend a spoon"], "harmful", name="spoons")


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: Requests.of([], "harmful"), "holds no request"),
        (lambda: Requests.of([" "], "harmful"), "line 1: no request; expected a text in one of request, instruction"),
        (lambda: requests_of(Path("x"), [(1, {"request": "a", "kind": "bad"})]), "the kind of request is 'bad'"),
        (lambda: SPOONS.parts(1, 4), "spoons has 1 requests .1 harmful., but 1 . 4 are asked for"),
        (lambda: SPOONS.only("border"), "spoons has no border requests: it has 1 harmful"),
        (lambda: load_requests("truthfulqa"), "holds no requests, but questions with answers: expected advbench"),
        (lambda: load_requests("organism/bad"), "unknown requests 'organism/bad': expected organism/KIND"),
        (lambda: load_requests("nowhere"), "unknown dataset 'nowhere'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_message(act: object, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxsteer.personas.datasets.source_file", lambda *given: Path("x"))
    with pytest.raises(UserError, match=said):
        act()  # type: ignore[operator]


@pytest.mark.parametrize(
    "content",
    [
        {"polite": "Please, {request}", "rude": "{request}!"},
        [{"name": "polite", "template": "Please, {request}"}, {"name": "rude", "template": "{request}!"}],
    ],
)
def test_templates(tmp_path: Path, content: object) -> None:
    (path := tmp_path / "t.json").write_text(json.dumps(content))
    found = read_templates(path)
    assert {name: in_template(text, "{go}") for name, text in found.items()} == {
        "polite": "Please, {go}",
        "rude": "{go}!",
    }
    path.write_text(json.dumps(content).replace("{request}!", "Go"))
    with pytest.raises(UserError, match=r"the template 'rude' has no place for the request: write \{request\}"):
        read_templates(path)


def test_a_request_has_one_kind() -> None:
    harmful, harmless = (Requests.of(["How do I mix it?", "Why?"], kind) for kind in ("harmful", "harmless"))
    with pytest.raises(UserError, match="a request has one kind"):
        harmful + harmless


def test_what_was_made_of_one_request_falls_into_one_part(tmp_path: Path) -> None:
    rows = [
        {"augq": f"{way}: question {base}", "baseq": f"Question {base}?"}
        for base in range(12)
        for way in "abcde"[: 1 + base % 5]
    ]
    (path := tmp_path / "attack_enhanced_set.json").write_text(json.dumps(rows))
    attacks = load_requests(f"salad/attack-enhanced:{path}")
    assert attacks.entries[1].unit == "Question 1?" and attacks.entries[1].base == attacks.entries[2].base
    for seed in range(8):
        parts = attacks.parts(7, 5, 6, seed=seed)
        assert [len(part.entries) for part in parts] == [7, 5, 6]
        units = [{entry.unit for entry in part.entries} for part in parts]
        assert not (units[0] & units[1] or units[0] & units[2] or units[1] & units[2])
    with pytest.raises(UserError, match="asked for"):
        attacks.parts(*[1] * len(rows))
