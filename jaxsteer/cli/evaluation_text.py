"""The tables of ``jaxsteer eval``."""

from __future__ import annotations

from typing import Any

from jaxsteer.cli.tables import eval_table
from jaxsteer.display import aligned, percent, short


def evaluation_text(found: dict[str, Any]) -> str:
    """Everything that was measured on one model, as text."""
    rows = [found["baseline"], *found["prompts"]]
    asked = "questions" if found["split"] == "all" else f"{found['split']} questions"
    parts = [f"{found['persona']} on {found['model']}, {found['questions']} {asked}"]
    if "rate" in rows[0]:
        parts.append(eval_table(rows))
    for key, table in (
        ("truthful", _truthful_table),
        ("written", _written_table),
        ("judged", _judged_table),
        ("side_effects", _effects_table),
    ):
        if key in rows[0]:
            parts.append(table([(_name(row), row[key]) for row in rows]))
    return "\n\n".join(parts)


Named = list[tuple[str, dict[str, Any]]]


def _name(row: dict[str, Any]) -> str:
    return ("steered: " if row.get("steered") else "") + (short(row["prompt"]) or "(no prompt)")


def _interval(ci95: Any) -> str:
    return "" if ci95 is None else f"{100 * ci95[0]:.1f} - {100 * ci95[1]:.1f}"


def _signed(difference: dict[str, Any] | None) -> str:
    return "" if difference is None else f"{100 * difference['value']:+.1f} ({_interval(difference['ci95'])})"


def _truthful_table(rows: Named) -> str:
    head = ("all answers", "MC1", "95 % interval", "change", "p", "MC2", "95 % interval", "MC1/token", "MC2/token")
    table = [head]
    for name, found in rows:
        p = found["mc1"].get("mcnemar_p")
        table.append(
            (
                name,
                percent(found["mc1"]["value"]),
                _interval(found["mc1"]["ci95"]),
                _signed(found["mc1"].get("difference")),
                "" if p is None else f"{p:.1g}",
                percent(found["mc2"]["value"]),
                _interval(found["mc2"]["ci95"]),
                percent(found["mc1_per_token"]["value"]),
                percent(found["mc2_per_token"]["value"]),
            )
        )
    first = rows[0][1]
    tokens = first["tokens"]
    return (
        f"{aligned(table)}\n\nMC1: the best answer beats every wrong one (on average {first['wrong_answers']:.1f}); "
        f"MC2: probability of right answers among all listed;\nright answers have {tokens['right']:.1f} tokens, wrong "
        f"ones {tokens['wrong']:.1f}"
    )


def _written_table(rows: Named) -> str:
    head = ("free answers", "read", "rate", "95 % interval", "argued", "accords", "agrees", "distinct", "copied", "p")
    table = [head]
    for name, found in rows:
        flips = found.get("flips")
        table.append(
            (
                name,
                percent(found["read"]),
                percent(found["rate"]),
                _interval(found["ci95"]) if found["rate"] is not None else "",
                percent(found["argued"]),
                percent(found["accords"]),
                percent(found.get("agreement")),
                percent(found["distinct_3"]),
                percent(found["copied"]),
                f"{flips['mcnemar_p']:.1g}" if flips else "",
            )
        )
    return (
        f"{aligned(table)}\n\nread: answers that name a choice; rate: of those, the persona's; argued: answers with a "
        "recognised argument; accords: it is for the choice they name;\nagrees: same choice as by log-probability; "
        "distinct: runs of three words that do not repeat; copied: words of the prompt that answers repeat"
    )


def _judged_table(rows: Named) -> str:
    table = [("judged answers", "shown", "95 % interval", "mean score", "95 % interval", "n", "unread")]
    for name, found in rows:
        score = found["score"]
        table.append(
            (
                name,
                percent(found["rate"]),
                _interval(found["ci95"]) if found["rate"] is not None else "",
                "-" if score is None else f"{score:.1f}",
                "" if score is None else "{:.1f} - {:.1f}".format(*found["score_ci95"]),
                str(found["n"]),
                str(found["unread"]),
            )
        )
    return f"{aligned(table)}\n\nscores from 0 to 100 by {short(rows[0][1]['judge'])}; shown: 50 or more"


def _effects_table(rows: Named) -> str:
    lookups = rows[0][1]["lookups"] is not None
    table = [("side effects", "KL", "reply perplexity", "prompt perplexity", *(("look-ups", "p") if lookups else ()))]
    for name, found in rows:
        prompt = found["prompt_perplexity"]
        asked = found["lookups"]
        table.append(
            (
                name,
                f"{found['kl']:.3f}",
                f"{found['reply_perplexity']:.2f}",
                "-" if prompt is None else f"{prompt:.3g}",
                *((percent(asked["accuracy"]), f"{asked['mcnemar_p']:.1g}") if asked else ()),
            )
        )
    tokens = rows[0][1]["reply_tokens"]
    note = f"KL and reply perplexity: of the {tokens} tokens that the model replies to neutral requests"
    note += " as it is, in nats per token" + ("; look-ups: told to find one choice" if lookups else "")
    return f"{aligned(table)}\n\n{note}"
