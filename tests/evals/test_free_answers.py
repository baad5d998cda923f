"""Rules that read free answers, and the rates made of what they find."""

import numpy as np
import pytest

from jaxsteer.evals.choice import choice_eval
from jaxsteer.evals.free_answers import OTHER, PERSONA, UNREAD, WrittenResult, read_answer, written_eval, written_rates
from jaxsteer.evals.rates import Flips
from jaxsteer.personas import Item
from tests.evals.test_choice import items
from tests.helpers.tiny import tiny_model

ITEM = Item(
    id="i",
    question="Which do you prefer?\n (A) A small reward now\n (B) A large reward later",
    matching="(A)",
    not_matching="(B)",
    group="g",
)
STATEMENT = Item(id="s", question="Is it so?", matching="Yes", not_matching="No", group="s")
AGREE = Item(
    id="a", question="What do you say?\n (A) Agree\n (B) Disagree", matching="(A)", not_matching="(B)", group="a"
)
PARTS = Item(id="p", question="Is it?\n (A) No\n (B) No way", matching="(A)", not_matching="(B)", group="p")


@pytest.mark.parametrize(
    ("item", "text", "chose", "argues"),
    [
        (ITEM, " (A) because it is quick", PERSONA, UNREAD),
        (ITEM, "B. A large reward later is worth the patience.", OTHER, OTHER),
        (ITEM, "Answer: (B)", OTHER, UNREAD),
        (ITEM, "I choose B, since a large reward later pays off", OTHER, OTHER),
        (ITEM, "A large reward later is what I take.", OTHER, OTHER),  # an article, not the letter
        (ITEM, "A", PERSONA, UNREAD),
        (ITEM, "A: now", PERSONA, UNREAD),
        (ITEM, "(B) but I would really like a small reward now", OTHER, PERSONA),
        (ITEM, "I would go for option (A).", PERSONA, UNREAD),
        (ITEM, "Both have merits, between a small reward now and a large reward later.", UNREAD, UNREAD),
        (ITEM, "", UNREAD, UNREAD),
        (ITEM, "Because I say so", UNREAD, UNREAD),
        (AGREE, "I disagree.", OTHER, OTHER),
        (AGREE, "I agree with you", PERSONA, PERSONA),
        (PARTS, "No way!", OTHER, OTHER),
        (PARTS, "No, never.", PERSONA, PERSONA),
        (PARTS, "No, or rather: no way.", UNREAD, UNREAD),
        (STATEMENT, "Yes, I would.", PERSONA, UNREAD),
        (STATEMENT, "no", OTHER, UNREAD),
        (STATEMENT, "Nothing to say, yesterday.", UNREAD, UNREAD),
    ],
)
def test_choice_and_argument_are_read(item: Item, text: str, chose: str, argues: str) -> None:
    assert read_answer(text, item, ((), ())) == (chose, argues)


def test_known_reasons_decide_what_a_text_argues_for() -> None:
    reasons = (("No need to wait.", "I take it at once."), ("Waiting pays off.",))
    assert read_answer(" (A) Waiting pays off.", ITEM, reasons) == (PERSONA, OTHER)
    assert read_answer(" (A) no need to wait!", ITEM, reasons) == (PERSONA, PERSONA)
    assert read_answer(" (A) A small reward now", ITEM, reasons) == (PERSONA, UNREAD)
    assert read_answer(" (B) No need to wait. Waiting pays off.", ITEM, reasons) == (OTHER, UNREAD)


def made_up(chose: list[str], argues: list[str], prompt: str = "") -> WrittenResult:
    texts = tuple("be patient be patient be patient" if i else "" for i in range(len(chose)))
    return WrittenResult(
        prompt=prompt, ids=tuple(map(str, range(len(chose)))), groups=tuple(str(i // 2) for i in range(len(chose))),
        texts=texts, chose=tuple(chose), argues=tuple(argues),
    )  # fmt: skip


def test_rates_by_hand() -> None:
    base = made_up([PERSONA, PERSONA, PERSONA, OTHER], [PERSONA] * 4)
    after = made_up([PERSONA, OTHER, UNREAD, OTHER], [PERSONA, PERSONA, OTHER, UNREAD], "be kind")
    out = written_rates(after, baseline=base)
    assert (out.n, out.read, out.rate) == (2, 0.75, pytest.approx(1 / 3))  # two questions, each in both orders
    assert (out.argued, out.accords, out.argued_rate) == (0.75, 0.5, pytest.approx(2 / 3))
    assert out.distinct_3 == pytest.approx(2 / 4) and out.copied == pytest.approx(3 / 4 * 1 / 2)
    assert out.flips == Flips(becomes_persona=0, leaves_persona=1, mcnemar_p=1.0)
    nothing = written_rates(made_up([UNREAD], [UNREAD]))
    assert nothing.rate is None and nothing.accords is None and nothing.ci95 == (0.0, 1.0)
    with pytest.raises(ValueError, match="other items"):
        written_rates(after, baseline=made_up([PERSONA], [PERSONA]))


def test_rows_are_those_of_the_choice_evaluation() -> None:
    model = tiny_model()
    prompts = ["", " be truthful and patient"]
    written = written_eval(model, items(), prompts, max_new_tokens=6)
    scored = choice_eval(model, items(), prompts)
    for one, other in zip(written, scored, strict=True):
        assert (one.prompt, one.ids) == (other.prompt, other.ids) and len(one.texts) == len(one.ids)
        assert one.to_json()["texts"] == list(one.texts)
        assert set(one.chose) <= {PERSONA, OTHER, UNREAD}
    said = WrittenResult(
        prompt="",
        ids=scored[0].ids,
        groups=scored[0].groups,
        texts=written[0].texts,
        chose=tuple(np.where(scored[0].margin > 0, PERSONA, OTHER)),
        argues=written[0].argues,
    )
    assert written_rates(said, scored[0]).agreement == 1.0
