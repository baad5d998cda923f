"""Cells of a table: computed once, in files of their own, with all seeds in one program."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.study import cell_runs, cells
from jaxsteer.study.cell_rows import flesch
from jaxsteer.study.cells import Block, Method, Table, slug
from jaxsteer.study.table_row import TableRow
from tests.helpers.tiny import tiny_model


def test_cells_are_computed_once_and_other_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    def at_once(_: Block, method: Method) -> TableRow:
        asked.append(method.name)
        return TableRow(rate=0.5, seconds=1.0, method=method.name)

    monkeypatch.setattr(cell_runs, "Shared", lambda block: asked.append("shared") or block)
    monkeypatch.setattr(cell_runs, "compute_row", at_once)
    table = Table(out=tmp_path, seeds=(0, 1), options={"steps": 3})
    methods = (Method(name="zero-shot", about=""), Method(name="RESGA, decision", about="", options={}))
    block = Block(table=table, model="organism:llama", sae=None, persona="myopic", methods=methods)
    cell_runs.open_table(table)
    first = list(cell_runs.compute_all([block]))
    assert asked == ["shared", "zero-shot", "RESGA, decision"]
    assert list(cell_runs.compute_all([block])) == first and len(asked) == 3
    block.path(methods[1]).unlink()
    list(cell_runs.compute(block))
    assert asked[3:] == ["shared", "RESGA, decision"]
    cell_runs.open_table(table)
    with pytest.raises(UserError, match="steps: 3 there, 4 now"):
        cell_runs.open_table(Table(out=tmp_path, seeds=(0, 1), options={"steps": 4}))


@pytest.mark.slow
def test_cells_that_differ_in_the_search_alone_share_an_objective(
    tmp_path: Path, persona_file: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every option of the search may differ, and no other: the key is what the objective is made of."""
    monkeypatch.setattr(cells, "load_once", lambda _: Model(**vars(tiny_model())))
    probed, choose = [], cells.choose_objective
    monkeypatch.setattr(cells, "choose_objective", lambda *a, **more: probed.append(a) or choose(*a, **more))
    options = {"steps": 1, "prompt_length": 3, "contexts": 2, "population": 2, "children": 4, "top_k": 8}
    table = Table(out=tmp_path, seeds=(0, 1), options=options, questions=4)
    changes = (
        {},
        {"steps": 2, "prompt_length": 2, "contexts": 1, "fluency": "loose", "repetition": 0.1, "seed": 3},
        {"site": "blocks.1.hook_resid_post"},
    )
    methods = tuple(Method(name=f"m{i}", about="", options=change) for i, change in enumerate(changes))
    random = Method(name="random", about="", options={}, random=True, populations=2)
    block = Block(table=table, model="tiny", sae=None, persona=str(persona_file), methods=(*methods, random))
    rows = list(cell_runs.compute(block, lambda _: None))
    assert len(probed) == 2
    for row in rows:
        assert [each.seed for each in row.each] == [0, 1] and row.ci95[0] <= row.rate <= row.ci95[1]
    assert rows[0].tried == 8 and rows[1].tried == rows[3].tried == 16
    assert rows[3].probe_correlation is None and rows[0].site == rows[1].site == rows[3].site
    assert not list((tmp_path / "runs").rglob("config.json")), "files of searches that are not kept"


def test_reading_ease():
    assert flesch(" The cat sat.") > 100 > flesch(" impartial objective rigorous truthful") and flesch("") is None


def test_slugs_are_parts_of_paths():
    assert slug("organism:llama") == "organism-llama"
    assert slug("/data/Llama-3.1-8B") == "llama-3.1-8b"
    assert Method(name="prompt length", about="", value=8).slug == "prompt-length-8"
