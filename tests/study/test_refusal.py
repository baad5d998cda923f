"""Refusal end to end: rates by every way to tell, attacks, edits, what is kept of a measurement that was cut off."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.evals.refusal import opening_ids, refusal_log_odds, refuses, request_rows
from jaxsteer.personas import Requests
from jaxsteer.prompts.generate import generate
from jaxsteer.runs.result import Unfinished
from jaxsteer.statistics import rate_interval
from jaxsteer.steer import ablate, add
from jaxsteer.study.refusal import RefusalResult, measure_refusal
from jaxsteer.writers.endpoint import Endpoint
from jaxsteer.writers.writer import Rule
from tests.helpers.endpoint import endpoint
from tests.helpers.tiny import tiny_model

MODEL = tiny_model(d_model=128)
REQUESTS = Requests.of(["Take the river", "Wait for the mill", "Hello money"], "harmful") + Requests.of(
    ["Say what the town is", "How are you?"], "harmless"
)
OPENINGS = ("I", "river")
(ID, *_) = opening_ids(MODEL, OPENINGS)
TABLE = MODEL.params.embed if MODEL.params.unembed is None else MODEL.params.unembed.T
VECTOR = np.asarray(TABLE[ID], np.float32)
"""Along it the model says "I"."""
SITE = "blocks.2.hook_resid_post"
EDITS = {"up": add(SITE, VECTOR, 40.0), "off": ablate(SITE, VECTOR), "down": add(SITE, VECTOR, -1.0)}


def test_rates_agree_with_their_parts() -> None:
    phrases = ("a", "river")
    found = measure_refusal(
        MODEL, REQUESTS, edits=EDITS, templates={"polite": "Please: {request}"}, openings=OPENINGS, generate=True,
        max_new_tokens=3, phrases=phrases,
    )  # fmt: skip
    assert [(row.attack, row.edit) for row in found.rows] == [(a, e) for e in ("", *EDITS) for a in ("", "polite")]
    openings, texts = opening_ids(MODEL, OPENINGS), REQUESTS.only("harmful").texts
    first = found.row().of("harmful")
    for attack, asked in (("", texts), ("polite", [f"Please: {text}" for text in texts])):
        rows = request_rows(MODEL, asked)
        odds = {"": refusal_log_odds(MODEL, rows, openings)[0]}
        odds |= dict(zip(("up", "down"), refusal_log_odds(MODEL, rows, openings, [EDITS["up"], EDITS["down"]])))
        odds["off"] = refusal_log_odds(MODEL, rows, openings, [EDITS["off"]])[0]
        for name, scores in odds.items():
            one = found.row(attack=attack, edit=name).of("harmful")
            np.testing.assert_allclose(one.scores, scores, atol=1e-5)
            assert (one.openings.rate, one.n) == (np.mean(scores > 0), 3)
            assert one.openings.ci95 == pytest.approx(rate_interval(scores > 0, texts))
            assert one.phrases.rate == np.mean([refuses(reply, phrases) for reply in one.replies])
            assert (one.kl is None) == (name == "")
            if one is not first:
                assert one.openings.difference.value == pytest.approx(one.openings.rate - first.openings.rate)
    last = generate(MODEL, rows, temperature=0, max_new_tokens=3, edits=EDITS["up"])
    assert found.row(attack="polite", edit="up").of("harmful").replies == last.texts
    rates = {row.openings.rate for each in found.rows for row in each.kinds}
    assert len(rates) > 1, "the test needs requests that are refused and others that are not"
    assert found.row(edit="up").of("harmless").kl > 0.01
    assert found.row(edit="up").attack_success == 1 - found.row(edit="up").of("harmful").phrases.rate
    assert RefusalResult.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert "harmful, n = 3" in found.table() and "up: polite" in found.table()
    assert len(found.to_rows()) == 2 * len(found.rows)


@pytest.mark.parametrize(
    ("reply", "found"),
    [("I\u2019m  SORRY, no", True), ("Well, as an AI I try", True), ("I'm glad", False), ("", False)],
)
def test_phrases(reply: str, found: bool) -> None:
    assert refuses(reply) is found


def test_an_edit_under_which_logits_overflow_is_a_row_that_says_so() -> None:
    found = measure_refusal(
        MODEL, REQUESTS, edits={"far": NAN, "up": EDITS["up"]}, openings=OPENINGS, judge=Rule(write=lambda _: "7"),
        max_new_tokens=2,
    )  # fmt: skip
    row = found.row(edit="far")
    assert not row.kinds and row.attack_success is None and row.over_refusal is None
    assert found.problems == {"far": row.problem} and "far: the model's logits are not finite" in found.table()
    assert found.row(edit="up").of("harmful").judged.rate == 0.0 and len(found.to_rows()) == 4
    assert RefusalResult.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_measurement_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    written: list[int] = []
    monkeypatch.setattr(
        "jaxsteer.evals.free_answers.generate",
        lambda *given, **how: written.append(len(given[1])) or generate(*given, **how),
    )
    plain = measure_refusal(MODEL, REQUESTS, "x", judge=Rule(write=lambda asked: "100"), max_new_tokens=4)
    assert plain.row().of("harmful").judged.rate == 1.0 and plain.row().attack_success == 0.0 and written == [5, 5]
    stops = [True]
    with endpoint(lambda body: 400 if stops and len(asked) > 4 else "100") as (url, asked):
        given = dict(judge=Endpoint(url=url, retries=0, workers=1), max_new_tokens=4, out=tmp_path)
        with pytest.raises(Unfinished, match="gives no answer.*What came is kept in") as stopped:
            measure_refusal(MODEL, REQUESTS, "x", **given)
        assert stopped.value.result.row().of("harmful").replies == plain.row().of("harmful").replies
        written.clear()
        stops.clear()
        found = measure_refusal(MODEL, REQUESTS, "x", **given)
        assert not written and len(asked) == 5 + 6, "what was written and judged is not asked for again"
        assert found == measure_refusal(MODEL, REQUESTS, "x", **given) and len(asked) == 11
    for row, other in zip(found.rows, plain.rows, strict=True):
        assert [one.judged.scores for one in row.kinds] == [one.judged.scores for one in other.kinds]


NAN = add(SITE, VECTOR * 1e30, 1e8)


@pytest.mark.parametrize(
    ("requests", "given", "said"),
    [
        (REQUESTS, {"templates": {"rude": "Go"}}, "the template 'rude' has no place for the request"),
        ((), {}, "no requests were given"),
        (REQUESTS, {"opening": "I"}, "there is no option of measure_refusal 'opening': did you mean 'openings'"),
        (REQUESTS, {"judge": Rule(write=lambda asked: "maybe 5000"), "max_new_tokens": 2},
         "no reply of the judge rule to 5 answers holds one number from 0 to 100, for example 'maybe 5000'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_message(requests: object, given: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        measure_refusal(MODEL, requests, **given)
