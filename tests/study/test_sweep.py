"""A whole sweep on a tiny random model: rows, choice, resuming, drawing, refusals."""

import csv
import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxsteer.cli.commands import parse
from jaxsteer.cli.steer import Sweep as Command
from jaxsteer.cli.steering import Steering
from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.personas import load_direction, save_direction
from jaxsteer.prompts import Placement
from jaxsteer.statistics import wilson
from jaxsteer.steer import Edits
from jaxsteer.study import sweep as module
from jaxsteer.study.sweep import SweepOptions, choose, stream_norms, sweep
from jaxsteer.study.sweep_result import Sweep, SweepRow
from tests.helpers.tiny import tiny_model

Make = Callable[..., SweepOptions]


def model() -> Model:
    return Model(**vars(tiny_model()))


@pytest.fixture
def sweep_options(tmp_path: Path, persona_file: Path) -> Make:
    def make(**changes: object) -> SweepOptions:
        (tmp_path / "neutral.txt").write_text("The river and the mill.\n\nSome advice for a friend?\n")
        fields = {
            "out": tmp_path / "sweep",
            "persona": str(persona_file),
            "layers": (2, 0),
            "coefficients": (-2.0, 0.0, 4.0),
            "questions": 3,
            "neutral": tmp_path / "neutral.txt",
            "quiet": True,
        }
        return SweepOptions(**{**fields, **changes})  # type: ignore[arg-type]

    return make


def test_a_sweep_measures_every_setting_and_is_not_repeated(sweep_options: Make, compile_counter: object) -> None:
    options, said = sweep_options(), []
    with compile_counter() as count:
        metrics = sweep(options, model=model(), say=said.append)
    assert count["_compare"] == 1  # one program for all layers, coefficients and directions
    rows = metrics.rows
    cells = [(row.layer, row.direction, row.coefficient) for row in rows]
    assert cells == [(y, d, c) for y in (2, 0) for d in ("persona", "random 0") for c in (-2.0, 0.0, 4.0)]
    for row in rows:
        assert row.ci95[0] <= row.rate <= row.ci95[1] and row.n == metrics.baseline.validation.n == 3
        if row.coefficient == 0:
            assert row.kl == 0 and row.perplexity == row.baseline_perplexity
            assert row.probability == metrics.baseline.validation.probability
        else:
            assert row.kl > 1e-6 and row.perplexity != row.baseline_perplexity
    assert rows[0].probability != rows[2].probability
    table = list(csv.DictReader((options.out / "sweep.csv").open()))
    assert [float(line["kl"]) for line in table] == [row.kl for row in rows]
    assert sweep(options, model=model(), say=said.append) == metrics and "nothing to do" in said[-1]
    text = metrics.table()
    assert "unsteered" in text and "+4" in text and "random 0" in text or "no setting" in text
    assert Sweep.from_json(json.loads((options.out / "metrics.json").read_text())) == metrics
    old = metrics.to_json()
    for row in old["rows"]:  # as older versions wrote them: over rows, without n
        row |= {"n": None, "ci95": [row["rate"]] * 2}
    assert all(row.n == 3 and row.ci95 == wilson(3 * row.rate, 3) for row in Sweep.from_json(old).rows)
    assert len(metrics.plot().axes) == 2 * 2 * 3  # two directions, three numbers, each with its scale
    assert not [p for p in options.out.iterdir() if p.name.startswith(".")]


def test_a_sweep_that_was_cut_off_goes_on(sweep_options: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sweep(sweep_options(), model=model())
    out = sweep_options().out
    (out / "metrics.json").unlink()
    lines = (out / "sweep.jsonl").read_text().splitlines(keepends=True)
    (out / "sweep.jsonl").write_text(lines[0] + lines[1].replace('"n": 3', '"n": null') + lines[1][:40])
    measured = []
    real = module._layer_rows

    def spy(options: object, model: object, directions: object, layer: int, *rest: object) -> object:
        measured.append(layer)
        return real(options, model, directions, layer, *rest)

    monkeypatch.setattr(module, "_layer_rows", spy)
    again = sweep(sweep_options(), model=model())
    assert measured == [0]
    assert again.rows == whole.rows and again.chosen == whole.chosen
    assert len((out / "sweep.jsonl").read_text().splitlines()) == 2
    with pytest.raises(UserError, match="max_kl"):
        sweep(sweep_options(max_kl=0.1), model=model())


def test_the_chosen_setting_is_written_as_vectors(
    sweep_options: Make, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    options = sweep_options(controls=0, positions="prompt", max_kl=1e9)
    chosen = sweep(options, model=model()).chosen
    assert chosen is not None
    assert Command(**vars(options)).run() == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("Steer by the chosen setting: jaxsteer generate --model organism:llama --steer ")
    command = parse(shlex.split(line)[6:])
    assert command.steer == options.out / "steering.safetensors" and command.prompts == ("Your question",)
    edit = command.edits(model())
    direction = load_direction(options.out / "direction.safetensors")
    wanted = module._edit(options, direction, chosen.layer, chosen.coefficient)
    assert caplog.records == [] and edit is not None
    for mine, other in zip(jax.tree.leaves(edit), jax.tree.leaves(Edits((wanted,))), strict=True):
        np.testing.assert_allclose(mine.squeeze(), other.squeeze(), rtol=1e-6)
    Steering(steer=options.out / "direction.safetensors").edits(model())
    assert "names no site: steering at all of its 2" in caplog.text


def test_a_direction_of_a_file_is_used(sweep_options: Make, tmp_path: Path) -> None:
    options = sweep_options(out=tmp_path / "a", layers=(1,), controls=0)
    first = sweep(options, model=model())
    made = load_direction(tmp_path / "a" / "direction.safetensors")
    turned = dataclasses.replace(made, delta={k: -v for k, v in made.delta.items()})
    path = save_direction(turned, tmp_path / "turned.safetensors")
    second = sweep(
        dataclasses.replace(options, out=tmp_path / "b", direction=path, coefficients=(2.0, -4.0)), model=model()
    )
    for mine, other in zip(second.rows, (first.rows[0], first.rows[2]), strict=True):
        assert mine.kl == pytest.approx(other.kl, rel=1e-4)
    with pytest.raises(UserError, match=r"no vector with a mean norm at blocks\.0"):
        sweep(dataclasses.replace(options, out=tmp_path / "c", direction=path, layers=(0, 1)), model=model())


def test_the_choice_keeps_the_limits() -> None:
    def row(rate: float, kl: float, direction: str = "persona", collapse: bool = False) -> SweepRow:
        return SweepRow(
            direction=direction, layer=0, site="", coefficient=1.0, rate=rate, ci95=(0.0, 1.0), a_rate=0.5,
            letter_collapse=collapse, probability=rate, kl=kl, perplexity=2.0, baseline_perplexity=2.0,
        )  # fmt: skip

    rows = [row(0.0, 0.9), row(0.0, 0.1, "random 0"), row(0.1, 0.1, collapse=True), row(0.4, 0.4), row(0.4, 0.2)]
    assert choose(rows, 0.5) == rows[4]
    assert choose(rows, 1.0) == rows[0]
    assert choose(rows, 0.01) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layers": (5,)}, "layers 0 to"),
        ({"layers": (1, 1)}, "twice"),
        ({"coefficients": ()}, "no value"),
        ({"coefficients": (float("nan"),)}, "finite"),
        ({"max_kl": 0.0}, "above 0"),
        ({"controls": -1}, "at least 0"),
        ({"neutral": Path("/nonexistent.txt")}, "cannot be read"),
    ],
)
def test_bad_options_are_refused(sweep_options: Make, changes: dict[str, object], says: str) -> None:
    options = sweep_options(**changes)
    with pytest.raises(UserError, match=says):
        sweep(options, model=model())
    assert not (options.out / "metrics.json").exists()


def test_norms_of_the_stream(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("the river runs past the old town\nthe mill\n")
    norms = stream_norms(model(), tmp_path / "texts.txt", placement=Placement(style="plain"))
    assert len(norms) == model().config.n_layers and all(np.isfinite(v) and v > 0 for v in norms.values())
    assert json.dumps(norms)
