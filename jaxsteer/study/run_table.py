"""Runs as text: the prompts of one beside what was not searched, and a line for each of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxsteer.display import aligned, columns, decimals, interval, percent, short, visible, wrapped
from jaxsteer.evals.free_answers import ILLUSION, WrittenRates
from jaxsteer.evals.rates import Side

if TYPE_CHECKING:
    from jaxsteer.study.results import Prompt, SearchRun

HEAD = ("", "prompt", "target", "x-ent", "validation", "test", "A-rate", "swapped")
RULES = {
    "objective": "the largest objective",
    "validation": "the lowest rate on validation questions (a prompt under which a letter wins comes last)",
    "replies": "the lowest rate of free replies to validation questions",
}
"""What ``selected_by`` says, in words; by "validation" a persona in words is selected by free replies."""
LEAST, MOST = 14, 48
"""Letters of a prompt that are shown, at least and at most."""

Line = tuple[str, str, "Prompt | None"]
"""The mark of a prompt, its text, and the prompt."""


def run_table(run: SearchRun, limit: int, width: int | None) -> str:
    """What ``SearchRun.table`` says."""
    shown = list(enumerate(run.prompts[:limit]))
    if run.selected is not None and run.selected >= limit:
        shown.append((run.selected, run.prompts[run.selected]))
    lines: list[Line] = [("", "(no prompt)", run.baseline)]
    for index, prompt in shown:
        mark = ("*" if index == run.selected else "") + ("!" if prompt.retokenises is False else "")
        lines.append((mark, prompt.text, prompt))
    lines += [("", f"[{name}] {control.text}".rstrip(), control) for name, control in run.controls.items()]
    more = f"... and {len(run.prompts) - len(shown)} more" if len(run.prompts) > len(shown) else ""
    notes = [
        f"persona rate with 95 % interval over questions; target in {visible(run.target_units)}; * selected by "
        f"{rule_of(run)}; ! re-tokenises differently"
    ]
    if run.in_words:
        judged = run.baseline is not None and run.baseline.test_judged is not None
        tested = run.split == "test"
        sides = [line for line in lines if not tested or (line[2] and line[2].test)]
        tables = [_written_table(lines, tested, judged, width), more, _likelihood_table(sides, width)]
        notes += [JUDGE_NOTE] * judged
        facts = {"right": percent(run.reply_reader), "split": run.split, "illusion": ILLUSION}
        notes += REPLIES_NOTE.format(**facts).split("\n")
    else:
        tables = [_fitted([HEAD, *map(_line, lines)], 1, width), more]
    notes += [f"warning: {visible(note)}" for note in run.doubts]
    whole = [] if run.best is None else [f"* {short(run.best.text, 400)}"]  # in the table it may be cut
    return "\n".join([wrapped(_title(run)), "", *filter(None, tables), "", *map(wrapped, [*whole, *notes])])


def _title(run: SearchRun) -> str:
    goal = f"{run.goal or 'reduce'} " if run.goal or run.in_words else ""
    parts = [f"{goal}{run.persona} on {run.model}", f"{run.method} at {run.site}", f"read {run.read_position}"]
    if run.probe_correlation is not None:
        parts.append(f"probe {decimals(run.probe_correlation)}")
    return visible(" | ".join([*parts, f"seed {run.seed}"]))


def _line(line: Line) -> tuple[str, ...]:
    mark, text, prompt = line
    rate = prompt and prompt.rate
    return (
        *_scores(mark, text, prompt),
        interval(prompt and prompt.validation),
        interval(prompt and prompt.test),
        percent(rate and rate.a_rate),
        percent(rate and rate.swapped_rate),
    )


def _scores(mark: str, text: str, prompt: Prompt | None) -> tuple[str, ...]:
    return mark, text, decimals(prompt and prompt.target), decimals(prompt and prompt.cross_entropy)


def _written_table(lines: Sequence[Line], tested: bool, judged: bool, width: int | None) -> str:
    """What is written freely under every prompt, by the odds of words and by the judge."""
    head = (*(("validation",) if tested else ()), "free replies", "read", "agree")
    rows: list[tuple[str, ...]] = [(*HEAD[:4], *head, *(("judge", "alike") if judged else ()))]
    for mark, text, prompt in lines:
        before, free = (prompt.validation_replies, prompt.test_replies) if prompt else (None, None)
        found = prompt and prompt.test_judged
        first = (percent(before and before.rate) + _unread(before),) if tested else ()
        free = free if tested else before
        last = (interval(found), percent(found and found.agreement)) if judged else ()
        mark += "~" if prompt and prompt.note else ""
        read = interval(free), percent(free and free.read), percent(free and free.agreement)
        rows.append((*_scores(mark, text, prompt), *first, *read, *last))
    return _fitted(rows, 1, width)


def _unread(free: WrittenRates | None) -> str:
    """How much of the replies a rate is of, where that is not all."""
    return f" ({percent(free.read)} read)" if free is not None and free.read is not None and free.read < 1 else ""


def _likelihood_table(lines: Sequence[Line], width: int | None) -> str:
    """Which of two given replies is likelier under every prompt, and which side moved."""
    rows: list[tuple[str, ...]] = [("nats per token", "preference", "persona's", "other's", "neutral", "relative")]
    for _, text, prompt in lines:
        rate = prompt and prompt.rate
        sides = rate and rate.sides
        each = (_side(getattr(sides, name, None)) for name in ("persona", "other", "yardstick"))
        rows.append((text, interval(rate), *each, percent(sides and sides.relative_rate)))
    return "\n" + _fitted(rows, 0, width)


def _side(side: Side | None) -> str:
    """A log-probability per token, and its change against no prompt."""
    if side is None:
        return ""
    return decimals(side.log_prob) + ("" if side.change is None else f" ({side.change.value:+.2f})")


def _fitted(rows: Sequence[tuple[str, ...]], at: int, width: int | None) -> str:
    """Aligned columns, of which that ``at`` a place has texts of at most ``width`` letters, or of what is left of a
    line."""
    others = sum(max(len(row[i]) for row in rows) + 2 for i in range(len(rows[0])) if i != at)
    width = width or min(MOST, max(LEAST, columns() - others))
    return aligned([(*row[:at], short(row[at], width), *row[at + 1 :]) for row in rows], left=range(at + 1))


REPLIES_NOTE = """free replies: share of what the model writes freely to {split} questions that is the persona's, by \
its words (the rule reads {right} of given validation replies right)
read: replies that the rule could read; others are in no rate, and count against the goal where prompts are selected
agree: {split} questions of which the preference says the same
preference: share of questions on which the persona's given reply is likelier than the other, per token
persona's, other's, neutral: log-probability of these replies (change against no prompt); neutral ones answer \
something else
relative: the preference if a reply gains only what it rises beyond the neutral ones
~ {illusion}"""
JUDGE_NOTE = (
    "judge: share of free replies that show the persona to the judge; alike: replies of which both say the same"
)


def rule_of(run: SearchRun) -> str:
    """How a run chose its prompt, in words."""
    key = "replies" if run.in_words and run.selected_by == "validation" else run.selected_by
    rule = RULES.get(key, visible(key))
    return rule.replace("lowest", "highest") if run.goal == "elicit" else rule


def summary_table(runs: Sequence[SearchRun], *, width: int = 60) -> str:
    """One line per run: persona, baseline, and the selected prompt with its test rate; of personas in words, the rates
    are those of free replies."""
    lettered = not all(run.in_words for run in runs)
    lines: list[tuple[str, ...]] = [
        ("persona", "baseline", "with prompt", *(("A-rate",) if lettered else ()), "probe", "prompt")
    ]
    for run in runs:
        before, after = (p and (p.replies if run.in_words else p.test) for p in (run.baseline, run.best))
        words = f" (free replies, {run.goal or 'reduce'})" if run.in_words else ""
        lines.append(
            (
                visible(run.persona) + words,
                interval(before),
                interval(after),
                *((percent(getattr(after, "a_rate", None)),) if lettered else ()),
                decimals(run.probe_correlation),
                short("(none found)" if run.best is None else run.best.text, width),
            )
        )
    return aligned(lines, left=(0, len(lines[0]) - 1))
