"""The page of a study of circuits: all parts from the files alone, everything escaped, nothing from the network."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from jaxsteer.circuits.study_figures import figures
from jaxsteer.circuits.study_result import (
    Circuits,
    CircuitSize,
    CircuitStudy,
    Effect,
    Grid,
    Level,
    PushStudy,
    Said,
    Scored,
    Stays,
    Unexplained,
)
from jaxsteer.cli import main
from jaxsteer.lens.words import Words
from jaxsteer.report import is_circuits, write_plots, write_report
from jaxsteer.report.circuits_graph import circuit_svg
from jaxsteer.runs.files import CONFIG, METRICS, write_json

EVIL = "<script>alert(1)</script>"


def grid(kind: str, columns: int) -> Grid:
    table = tuple(tuple(0.1 * (i + 1) - 0.05 * j for j in range(columns)) for i in range(2))
    flat = tuple((0.0,) * columns for _ in range(2))
    return Grid(kind=kind, layers=(2, 3), shares=table, low=flat, high=table, control=flat)


def push(name: str = "dim") -> PushStudy:
    sizes = tuple(
        CircuitSize(
            asked=n, edges=n, faithfulness=f, ci95=(f - 0.1, f + 0.1), complement=1 - f, control=0.0,
            random=(-0.1, 0.0, 0.2), as_close=0.01,
        )
        for n, f in ((3, 0.5), (9, 0.95))
    )  # fmt: skip
    edges = ("input->a2.h1<v>", "a2.h1->m3", "m3->logits", "input->logits")
    words = Words(
        names=("the vector",), lens=((EVIL, "b"),), lens_against=(("c",),), nearest=(("d",),), cosines=((0.5,),)
    )
    stays = [
        Stays(what=what, layers="2–3", share=0.5, ci95=(0.4, 0.6), control=0.01)
        for what in ("patterns", "values", "attention", "mlps", "attention+mlps")
    ]
    return PushStudy(
        name=name, label="1 x dim", site="blocks.1.hook_resid_post", start=2, norm=3.0, rows=8, readings=8,
        effects=(
            Effect(name="base", metric=-1.0, change=0.0, ci95=(0.0, 0.0)),
            Effect(name="pushed", metric=1.0, change=2.0, ci95=(1.5, 2.5)),
            Effect(name="random 1", metric=-0.9, change=0.1, ci95=(0.0, 0.2)),
        ),
        heads=grid("attn.hook_z", 2), mlps=grid("hook_mlp_out", 1),
        edges=tuple(Scored(name=edge, share=0.4 - 0.1 * i, control=0.0) for i, edge in enumerate(edges)),
        nodes=(Scored(name="a2.h1", share=0.3, control=0.0),), completeness=0.97, method="inputs, 10 steps, midpoint",
        circuits=Circuits(
            semantics="ablate outside", ablation="patching", end="output", n_edges=40, sizes=sizes, needed=9,
            needed_ci95=(0.2, 1.0), drawn=edges[:3],
        ),
        frozen=tuple(stays),
        by_layer=tuple(
            Stays(what=what, layers=str(layer), share=0.9, ci95=(0.8, 1.0))
            for what in ("patterns", "values")
            for layer in (2, 3)
        ),
        generated=(Said(condition="as it is", shown=0.0, ci95=(0.0, 0.5), unread=0.0, replies=("Sure " + EVIL,)),),
        words=words, control_words=None, ablated=stays[0], explained=0.7, dimensions=8,
        sparsity=(
            Level(by="gradient", kept=4, share=0.9, ci95=(0.8, 1.0)),
            Level(by="random", kept=4, share=0.5, ci95=(0.4, 0.6), spread=(0.3, 0.7)),
        ),
        unexplained=(Unexplained(what="attribution", share=0.03, told="what gradients miss"),),
    )  # fmt: skip


@pytest.fixture
def study() -> CircuitStudy:
    return CircuitStudy(
        model=f"a model {EVIL}", fingerprint="f", persona="refusal", goal="elicit", metric="answers", told="nats",
        questions=(f"How? {EVIL}",), pushes=(push(),), seed=0,
    )  # fmt: skip


@pytest.fixture
def folder(study: CircuitStudy, tmp_path: Path) -> Path:
    write_json(tmp_path / CONFIG, {"format": "jaxsteer.run/1", "kind": "circuits", "model": EVIL})
    write_json(tmp_path / METRICS, study.to_json())
    return tmp_path


def test_every_part_is_on_the_page(folder: Path) -> None:
    assert is_circuits(folder)
    text = write_report(folder).read_text()
    for part in ("patched exactly", "How to read this", "how many edges are enough", "Frozen parts", "Sparse vectors"):
        assert part in text
    for number in ("9 of 40 edges (22.5 %", "50.0 % (40 to 60)", "70.0 % of what freezing the values costs", "3.0 %"):
        assert number in text
    assert text.count("<svg") == 6  # patch map, graph, circuits, frozen, layers, sparse
    assert EVIL not in text and "&lt;script&gt;alert(1)" in text
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", text)


def test_the_graph_holds_all_edges_of_the_circuit_and_says_more_on_pointing() -> None:
    svg = str(circuit_svg(push(), 0))
    assert svg.count('class="edge') == 4 and svg.count(" outside") == 1
    assert "input-&gt;a2.h1&lt;v&gt;: +40.0 % of the effect" in svg
    assert all(f'data-name="{name}"' in svg for name in ("input", "a2.h1", "m3", "logits"))
    heights = {
        name: float(re.search(rf'data-name="{name}".*?<rect x="[^"]*" y="(\d+)', svg)[1])
        for name in ("input", "a2.h1", "m3", "logits")
    }
    assert heights["input"] > heights["a2.h1"] > heights["m3"] > heights["logits"]


def test_an_evil_name_is_escaped_in_the_graph() -> None:
    one = dataclasses.replace(push(), name=EVIL)
    assert EVIL not in str(circuit_svg(one, 0))


def test_the_same_page_again_and_all_plots_as_files(
    folder: Path, study: CircuitStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    paths = write_plots(folder)
    assert len(paths) == 3 * len(figures(study)) == 15
    assert main(["report", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "frozen" in out and "report.html" in out
    assert main(["report", str(folder), "--attribute"]) == 2
