"""What a study of circuits leaves open, in numbers: parts of the effect that its stages do not account for."""

from __future__ import annotations

from jaxsteer.circuits.study_result import PushStudy, Unexplained


def unexplained(study: PushStudy) -> tuple[Unexplained, ...]:
    """The gaps, as shares of the whole effect."""
    largest = study.circuits.sizes[-1]
    found = [
        Unexplained(
            what="attribution", share=1 - study.completeness,
            told="the change of the metric minus the score of the input: what gradients along the way miss",
        ),
        Unexplained(
            what="largest circuit", share=1 - largest.faithfulness,
            told=f"what the circuit of {largest.edges} edges does not do",
        ),
        Unexplained(
            what="complement", share=study.circuits.sizes[0].complement,
            told=f"what all edges outside of the circuit of {study.circuits.sizes[0].edges} edges do without it",
        ),
    ]  # fmt: skip
    attention, mlps, both = (study.stays(what).share for what in ("attention", "mlps", "attention+mlps"))
    found.append(
        Unexplained(
            what="interaction", share=(1 - both) - (1 - attention) - (1 - mlps),
            told="what freezing attention and MLPs together costs, minus what freezing each alone costs",
        )
    )  # fmt: skip
    singles = sum(value for grid in (study.heads, study.mlps) for row in grid.shares for value in row)
    found.append(
        Unexplained(
            what="single patches", share=1 - both - singles,
            told="the effect minus the direct way to the unembedding and all heads and MLPs patched one at a time: "
            "negative where they pass the same thing on",
        )
    )  # fmt: skip
    if study.explained is not None:
        found.append(
            Unexplained(
                what="values beyond value vectors", share=(1 - study.explained) * (1 - study.stays("values").share),
                told="what values carry that is not the vector itself, seen through them",
            )
        )  # fmt: skip
    return tuple(found)
