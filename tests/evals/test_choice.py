"""The choice evaluator against a float64 recomputation from the public logits, and its controls."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jaxtyping import Array, Bool, Float, Int

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.evals import choice, scoring
from jaxsteer.evals.choice import ChoiceResult, choice_eval, rate
from jaxsteer.evals.rates import Flips, Rate
from jaxsteer.evals.scoring import Text, score_texts
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import forward
from jaxsteer.models.taps import Intervention, Tap, Where
from jaxsteer.personas import Item, swap
from jaxsteer.prompts import Placement, encode_texts, join_answer, question_conversation, render
from jaxsteer.steer import add, stack_rows
from tests.helpers.rates import made_choices as made_up
from tests.helpers.tiny import KINDS, tiny_model

QUESTIONS = [
    "Which do you prefer?\n (A) A small reward now\n (B) A large reward later",
    "I think the answer is clear. Do you agree or disagree?\n (A) I agree\n (B) I disagree",
    "What is the capital of Fisagal? The river runs past the old town, past the mill.\n (A) Mormor\n (B) Fisagal",
]
PROMPTS = ["", " be truthful and patient", " verify every claim about the facts, my friend"]


def items() -> list[Item]:
    return [
        Item(
            id=str(i),
            question=question,
            matching="(A)" if i % 2 else "(B)",
            not_matching="(B)" if i % 2 else "(A)",
            group=f"g{i}",
            line=i + 1,
        )
        for i, question in enumerate(QUESTIONS)
    ]


def by_hand(model: SimpleNamespace, text: str, answer: str) -> float:
    """Sum of log P over the tokens that ``answer`` adds to ``text``, in float64 from float32 logits."""
    context, full = encode_texts(model.tokenizer, [text, join_answer(text, answer)])
    assert (full[: len(context)] == context).all()
    return sum_log_probs(model, model.config, full, len(context))


LOGITS = jax.jit(forward, static_argnums=1)


def sum_log_probs(model: SimpleNamespace, config: ModelConfig, ids: np.ndarray, start: int) -> float:
    """Sum over ``ids[start:]`` of their log-probabilities; ids behind a token cannot change it, so zeros fill up."""
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(ids)] = ids
    logits = np.asarray(LOGITS(model.params, config, jnp.asarray(padded))[0], np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return sum(log_probs[t - 1, ids[t]] for t in range(start, len(ids)))


@pytest.mark.parametrize(
    ("kind", "style", "slot"),
    [*((kind, "chat", "suffix") for kind in KINDS), ("organism", "plain", "prefix"), ("gemma", "chat", "system")],
)
def test_scores_equal_a_float64_recomputation(kind: str, style: str, slot: str) -> None:
    model = tiny_model(kind)
    results = choice_eval(model, items(), PROMPTS, placement=Placement(style=style, slot=slot))
    asked = [copy for item in items() for copy in (item, swap(item))]
    for result in results:
        for row, item in enumerate(asked):
            text = render(
                model.tokenizer, question_conversation(item.question, Placement(style=style, slot=slot)), result.prompt
            )
            expected = [by_hand(model, text, "(A)"), by_hand(model, text, "(B)")]
            np.testing.assert_allclose(result.log_probs[row], expected, atol=1e-4)
            assert result.persona_first[row] == (item.matching == "(A)")
        assert not result.joined.any()


def test_scores_depend_on_neither_neighbours_nor_padding(monkeypatch) -> None:
    model = tiny_model()
    together = choice_eval(model, items(), PROMPTS)
    monkeypatch.setattr(scoring, "CPU_WORK", 1.0)  # one group at a time
    for p, prompt in enumerate(PROMPTS):
        for i, item in enumerate(items()):
            (alone,) = choice_eval(model, [item], [prompt])
            np.testing.assert_allclose(alone.log_probs, together[p].log_probs[2 * i : 2 * i + 2], atol=1e-4)


def test_answers_of_different_lengths_and_windows() -> None:
    """Tokens of one answer never see the other's; a window counts positions, not columns of the packed row."""
    model = tiny_model()
    config: ModelConfig = dataclasses.replace(model.config, windows=(3, 5, 2**30))
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(10, 500, n).astype(np.int32)  # noqa: E731
    start = draw(7)
    groups = [
        [
            Text(context=np.concatenate([start, draw(4)]), answers=(np.array([11, 12, 13]), np.array([11, 14]))),
            Text(context=np.concatenate([start, draw(2)]), answers=(draw(5), draw(1))),
            Text(context=start, answers=(np.array([21, 22]), np.array([21]))),
        ]
    ]
    scores = score_texts(model.params, config, groups)
    for p, text in enumerate(groups[0]):
        for k, answer in enumerate(text.answers):
            full = np.concatenate([text.context, answer])
            expected = sum_log_probs(model, config, full, len(text.context))
            assert scores[0, 0, p, k] == pytest.approx(expected, abs=1e-4)


@struct.dataclass
class Push(Intervention):
    """A user's own intervention: adds a vector after one block, at tokens of the response or at all of the prompt."""

    vector: Float[Array, " D"]
    layer: Int[Array, ""]
    response: Bool[Array, ""]
    kind: str = struct.field(pytree_node=False, default="hook_resid_post")

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset({self.kind})

    def tap(self, where: Where) -> Tap:
        later = where.positions >= where.prompt_length[:, None]
        here = where.valid & (later == self.response)

        def change(kind: str, layer: Array | int, value: Array) -> Array:
            return jnp.where((here & (layer == self.layer))[..., None], value + self.vector, value)

        return Tap(self.kinds, change)


@pytest.mark.parametrize("kind", ["hook_resid_post", "ln_final.hook_normalized"])
def test_edits_score_as_whole_texts_do(kind: str, compile_counter: object) -> None:
    model = tiny_model()
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(10, 500, n).astype(np.int32)  # noqa: E731
    start = draw(6)
    groups = [
        [Text(context=np.concatenate([start, draw(2 + c + p)]), answers=(draw(3), draw(1))) for p in range(2)]
        for c in range(2)
    ]
    width = model.config.d_model
    edits = [
        Push(jnp.asarray(rng.normal(size=width), jnp.float32), jnp.int32(layer), jnp.asarray(response), kind)
        for layer in (0, 2)
        for response in (False, True)
    ]
    scores = score_texts(model.params, model.config, groups, variants=edits)
    assert scores.shape == (4, 2, 2, 2)
    for e, edit in enumerate(edits):
        for c, group in enumerate(groups):
            for p, text in enumerate(group):
                for k, answer in enumerate(text.answers):
                    full, n = np.concatenate([text.context, answer])[None], len(text.context)
                    found = jaxsteer.logits(model, full, edits=edit, prompt_length=np.array([n]))
                    logp = jax.nn.log_softmax(found[0])[n - 1 : -1][np.arange(len(answer)), answer]
                    assert scores[e, c, p, k] == pytest.approx(float(logp.sum()), abs=1e-4)
    assert np.abs(scores[0] - scores[1]).min() > 1e-3
    with compile_counter() as count:
        score_texts(model.params, model.config, groups, variants=[e.replace(layer=jnp.int32(1)) for e in edits])
        assert count.total() == 0


def test_edits_of_different_kinds_are_refused() -> None:
    model, text = tiny_model(), Text(context=np.arange(20, 26), answers=(np.array([3]), np.array([4])))
    push = Push(jnp.zeros(model.config.d_model), jnp.int32(0), jnp.asarray(True))
    with pytest.raises(UserError, match="must agree in operation"):
        score_texts(model.params, model.config, [[text]], variants=[push, push.replace(vector=jnp.zeros(3))])
    good = add("blocks.1.hook_resid_post", np.ones(model.config.d_model))
    for edit, says in (
        (add("blocks.1.hook_resid_post", np.ones(3)), "3 components"),
        (stack_rows([good, None]), "2 rows of one batch"),
    ):
        with pytest.raises(UserError, match=says):
            score_texts(model.params, model.config, [[text]], variants=[edit])


def test_too_long_a_text_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(UserError, match="256 positions"):
        choice_eval(model, items()[:1], [" past the mill" * 100])


def test_rate_and_controls_by_hand() -> None:
    # item 0: persona text chosen in both orders; item 1: always (A); item 2: other text in both; item 3: tie, then (B)
    result = made_up([2, 1, 3, 0], [-2, 1, -1, -1], [True, True, False, False])
    out = rate(result)
    assert out.n == 4  # questions, not rows
    # persona wins: item 0 twice, item 1 once (A = persona in one order), item 2 never, item 3: half, then (B) = other
    assert out.rate == pytest.approx((2 + 1 + 0 + 0.5) / 8)
    assert out.a_rate == pytest.approx((1 + 2 + 1 + 0.5) / 8)
    assert out.swapped_rate == pytest.approx(2 / 4)  # items 0 and 2
    assert out.letter_bias == pytest.approx(np.mean([0, 1, 1, -0.5]))
    assert out.debiased_rate == pytest.approx(np.mean([1, 0.5, 0, 0]))
    assert not out.letter_collapse


@pytest.mark.parametrize("n", [30, 120])
@pytest.mark.parametrize("alike", [0.0, 0.5, 1.0])
def test_the_interval_of_a_rate_covers_it_95_times_of_100(
    n: int, alike: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated n questions: with probability ``alike`` the answer in the second order is that in the first.

    With 30 copied answers only 31 rates can be seen, and no interval covers 2 % in 93 to 97 of 100 studies: single
    rates may reach 98, their average may not.
    """
    monkeypatch.setattr(choice, "bootstrap_auroc", lambda *args, **kwargs: None)  # slow, and no part of the interval
    rng, y, covered = np.random.default_rng(0), np.arange(n) % 2 == 0, {}
    for share in (0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 0.9, 0.95, 0.98):
        one, other = rng.random((2, 2000, n)) < share
        other = np.where(rng.random((2000, n)) < alike, one, other)
        found: dict[tuple[int, int], Rate] = {}  # by the questions with one and with two answers of the persona
        inside = 0
        for a, b in zip(one, other):
            counts = int((a ^ b).sum()), int((a & b).sum())
            if counts not in found:
                found[counts] = rate(made_up(np.where(a == y, 1, -1), np.where(b == y, -1, 1), y.tolist()))
            shown = found[counts]
            inside += shown.ci95[0] <= share <= shown.ci95[1]
        assert shown.n == n and shown.rate == pytest.approx((a.mean() + b.mean()) / 2)
        covered[share] = inside / 2000
    assert 0.93 <= np.mean(list(covered.values())) <= 0.97, covered
    assert all(0.925 <= part <= 0.985 for part in covered.values()), covered


def test_a_letter_that_always_wins_is_flagged() -> None:
    """Rate 0.5 from a collapsed letter is not neutrality: A-rate, labels, swap and AUROC all say so."""
    y = [i % 2 == 0 for i in range(20)]
    base = made_up([2 if m else -2 for m in y], [-2 if m else 2 for m in y], y)
    collapsed = made_up([5.0] * 20, [5.0] * 20, y)
    out = rate(collapsed, base)
    assert out.rate == 0.5 and out.a_rate == 1.0 and out.letter_collapse
    assert out.swapped_rate == 0.0 and out.auroc == 0.5 and out.rate_by_label == (1.0, 0.0)
    # One answer of each of 20 questions was lost; these are no 40 independent pairs.
    assert out.flips == Flips(becomes_persona=0, leaves_persona=20, mcnemar_p=2 * 0.5**20)
    assert out.difference.value == -0.5 and out.difference.ci95[0] < -0.5 < out.difference.ci95[1] < -0.2
    assert not rate(base, base).letter_collapse
    biased = made_up([d + 0.9 for d in base.d[::2]], [d + 0.9 for d in base.d[1::2]], y)
    assert rate(biased).auroc == 1.0 and rate(biased).debiased_rate == 1.0


def test_a_baseline_on_other_items_is_refused() -> None:
    with pytest.raises(ValueError, match="other items"):
        rate(made_up([1], [1], [True]), made_up([1, 1], [1, 1], [True, True]))


def test_results_survive_json() -> None:
    result = made_up([2, 1], [-2, 1], [True, False])
    again = ChoiceResult.from_json(result.to_json())
    assert rate(again) == rate(result)


def in_words(persona: list[float], other: list[float], yardstick: list[float]) -> ChoiceResult:
    """Replies of 10 tokens with these log-probabilities per token; the persona's stands second."""
    names = tuple(str(i) for i in range(len(persona)))
    return ChoiceResult(
        prompt="p",
        placement=Placement(),
        ids=names,
        groups=names,
        both_orders=False,
        log_probs=10 * np.stack([other, persona], axis=1),
        tokens=np.full((len(persona), 2), 10),
        persona_first=np.zeros(len(persona), bool),
        joined=np.zeros(len(persona), int),
        per_token=True,
        yardstick=np.asarray(yardstick, float),
    )


def test_a_preference_that_is_won_by_a_fall_is_seen() -> None:
    """The rate goes to 100 % although no reply of the persona became likelier; beside the yardstick nothing moved."""
    before = in_words([-1.34] * 8, [-0.78] * 8, [-1.82] * 8)
    illusion = rate(in_words([-1.54] * 8, [-1.84] * 8, [-2.04] * 8), before)
    assert illusion.rate == 1.0 and illusion.difference.value == 1.0
    assert illusion.sides.persona.change.value == pytest.approx(-0.2)
    assert illusion.sides.other.change.value == pytest.approx(-1.06)
    assert illusion.sides.yardstick.change.value == pytest.approx(-0.22)
    assert illusion.sides.relative_rate == 0.0 and illusion.sides.relative_ci95[1] < 0.5
    real = rate(in_words([-1.10] * 8, [-1.37] * 8, [-2.21] * 8), before)
    assert real.rate == 1.0 and real.sides.relative_rate == 1.0
    assert rate(before).sides.relative_rate is None and rate(before).sides.persona.log_prob == pytest.approx(-1.34)
    np.testing.assert_allclose(ChoiceResult.from_json(before.to_json()).sides, before.sides, rtol=1e-6)
