"""The probe: its objective against the public capture, its prompts, and its choice."""

from pathlib import Path

import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.models.run import capture
from jaxsteer.personas import Direction, Persona, search_conversations
from jaxsteer.prompts import allowed_tokens, build_slots, encode, prompt_text, retokenises_many
from jaxsteer.study import probe as room
from jaxsteer.study.probe import (
    Extent,
    Probe,
    ProbeRow,
    blocks_before,
    choose,
    cue_words,
    probe,
    probe_prompts,
    projector,
    scorer,
)
from tests.evals.test_choice import items
from tests.helpers.tiny import tiny_model

SITES = ("blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.2.hook_resid_post")


def model() -> Model:
    return Model(**vars(tiny_model()))


def direction(seed: int = 0) -> Direction:
    rng = np.random.default_rng(seed)
    return Direction(
        delta={site: rng.standard_normal(32).astype(np.float32) for site in SITES},
        mean_resid_norm=dict.fromkeys(SITES, 1.0),
        n=1,
        read_position="decision",
        metadata={},
    )


def persona() -> Persona:
    return Persona(
        name="tiny",
        items=tuple(items()),
        counter_cues=("Please be patient.",),
        pro_cues=("Take easy money!",),
        data_hash="",
    )


@pytest.mark.parametrize("position", ["decision", "matched"])
def test_the_objective_is_the_mean_projection_of_what_capture_reads(position: str) -> None:
    tiny = model()
    pairs = search_conversations(items()[:2], position)
    slots = build_slots(tiny.tokenizer, [c for c, _ in pairs], 3, read=[r for _, r in pairs])
    allowed = allowed_tokens(tiny.tokenizer, tiny.config.vocab_size, word_initial=True)
    ids = probe_prompts(tiny.tokenizer, slots, allowed, [], n=9, seed=0)[:5]
    found = projector(tiny.params, tiny.config, slots, direction())(ids)
    for m, row in enumerate(ids):
        text = prompt_text(tiny.tokenizer, row)
        expected = dict.fromkeys(SITES, 0.0)
        for conversation, _ in pairs:
            tokens = np.zeros((1, 96), np.int32)
            full = encode(tiny.tokenizer, conversation, text)
            tokens[0, : len(full)] = full
            states = capture(tiny, tokens, SITES)
            for site in SITES:
                r = np.asarray(states[site], np.float64)[0, len(full) - 1]
                expected[site] += r @ direction().delta[site].astype(np.float64) / len(pairs)
        for site in SITES:
            assert found[site][m] == pytest.approx(expected[site], abs=1e-4)


def test_probe_prompts_hold_cue_words_and_survive_as_text() -> None:
    tiny = model()
    slots = build_slots(tiny.tokenizer, [c for c, _ in search_conversations(items()[:1], "decision")], 4)
    allowed = allowed_tokens(tiny.tokenizer, tiny.config.vocab_size, word_initial=True)
    assert cue_words(persona()) == ["please", "be", "patient", "take", "easy", "money"]
    ids = probe_prompts(tiny.tokenizer, slots, allowed, ["patient", "money"], n=60, seed=1)
    again = probe_prompts(tiny.tokenizer, slots, allowed, ["patient", "money"], n=60, seed=1)
    assert np.array_equal(ids, again) and len(ids) == 60 == len({tuple(row) for row in ids.tolist()})
    assert retokenises_many(tiny.tokenizer, slots, ids).all()
    texts = [prompt_text(tiny.tokenizer, row) for row in ids]
    holding = sum(" patient" in text or " money" in text for text in texts)
    assert 30 <= holding <= 50  # two of three prompts


def test_the_sign_is_found_and_rows_are_sorted() -> None:
    tiny = model()
    allowed = allowed_tokens(tiny.tokenizer, tiny.config.vocab_size, word_initial=True)
    true = direction()
    flipped = Direction(
        delta={site: -d for site, d in true.delta.items()}, mean_resid_norm={}, n=1, read_position="", metadata={}
    )
    common = {"allowed": allowed, "length": 3, "extent": Extent(prompts=24)}
    first = probe(tiny, persona(), items()[:2], {"decision": scorer(tiny, true)}, **common)
    second = probe(tiny, persona(), items()[:2], {"decision": scorer(tiny, flipped)}, **common)
    assert [row.correlation for row in first.rows] == sorted((row.correlation for row in first.rows), reverse=True)
    signs = {row.site: row.sign for row in first.rows if row.correlation > 0.01}
    assert all(row.sign == -signs[row.site] for row in second.rows if row.correlation > 0.01)
    assert first.prompts == 24 and len(first.rows) == 3 and first.shift.min <= first.shift.max


def probed(**extent: object) -> Probe:
    tiny = model()
    allowed = allowed_tokens(tiny.tokenizer, tiny.config.vocab_size, word_initial=True)
    how = Extent(**extent)  # type: ignore[arg-type]
    scorers = {"decision": scorer(tiny, direction())}
    return probe(tiny, persona(), items()[:2], scorers, allowed=allowed, length=3, extent=how)


def test_a_probe_ends_after_a_round_that_is_enough_as_if_so_many_prompts_had_been_asked_for() -> None:
    seen, said = [], []
    early = probed(enough=lambda rows: len(seen.append(rows) or seen) == 2, say=said.append)  # type: ignore[func-returns-value]
    assert early.prompts == 63 and early == probed(prompts=63)
    assert [line.split(":")[0] for line in said] == ["Probe"] and "at most 240 random prompts on 2 questions" in said[0]
    for row, first in zip(early.rows, sorted(seen[0], key=lambda row: row.site)):
        assert row.ci95[0] < row.correlation < row.ci95[1] and first.ci95[1] - first.ci95[0] > row.ci95[1] - row.ci95[0]


def test_a_probe_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, asked, measure = probed(prompts=70), [], room.choice_eval

    def cut(*args: object, **how: object) -> object:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(args[2][0])  # type: ignore[index]
        return measure(*args, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(room, "choice_eval", cut)
    with pytest.raises(KeyboardInterrupt):
        probed(prompts=70, folder=tmp_path)
    asked.pop()
    said: list[str] = []
    assert probed(prompts=70, folder=tmp_path, say=said.append) == whole
    assert len(asked) == 2 and "63 random prompts have been measured before" in said[0]  # the third pass alone was new
    assert probed(prompts=70, folder=tmp_path) == whole  # nothing is measured again
    (kept,) = (tmp_path / "probe-state").iterdir()
    kept.write_text('{"probability": [0.5, "x"]}')
    with pytest.raises(UserError, match="is damaged: delete it"):
        probed(prompts=70, folder=tmp_path)


@pytest.mark.parametrize(
    ("ci95", "known"),
    [((0.6, 0.69), True), ((0.8, 0.95), True), ((0.1, 0.49), True), ((0.79, 0.95), False), ((0.4, 0.51), False)],
)
def test_an_interval_that_is_narrow_or_decides_is_enough(ci95: tuple[float, float], known: bool) -> None:
    row = ProbeRow(site="s", read_position="decision", sign=1, correlation=sum(ci95) / 2, layer=1, ci95=ci95)
    assert row.known is known


def test_the_earliest_passing_site_is_chosen_else_the_best() -> None:
    def row(layer: int, correlation: float) -> ProbeRow:
        return ProbeRow(site=f"l{layer}", read_position="decision", sign=1, correlation=correlation, layer=layer)

    assert choose([row(3, 0.95), row(1, 0.82), row(2, 0.9), row(0, 0.1)]).layer == 1
    assert choose([row(3, 0.4), row(1, 0.7), row(2, 0.7)]).layer == 1


def test_sites_off_the_stream_are_refused() -> None:
    assert blocks_before("blocks.1.hook_resid_pre", 3) == 1 and blocks_before("layers.-1", 3) == 3
    with pytest.raises(UserError, match="lies elsewhere"):
        blocks_before("blocks.1.hook_mlp_out", 3)
