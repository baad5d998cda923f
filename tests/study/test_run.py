"""A whole run on a tiny random model: files, schema, repeats, refusals."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxsteer.cli import main
from jaxsteer.errors import UserError
from jaxsteer.evals.choice import ChoiceResult, rate
from jaxsteer.explain.explanations import Explanations, digest_of
from jaxsteer.explain.vocabulary import Vocabulary
from jaxsteer.models.model import Model
from jaxsteer.models.sharding import make_mesh
from jaxsteer.personas import load_direction
from jaxsteer.prompt_search import make_problem
from jaxsteer.report import read_run, write_report
from jaxsteer.sae import SAE, SAEConfig, save_sae
from jaxsteer.study import SearchOptions, run
from jaxsteer.study.attribution import attribute_run
from jaxsteer.study.outcome import select
from jaxsteer.study.results import Prompt, SearchRun
from tests.helpers.rates import made_rate
from tests.helpers.tiny import tiny_model

Make = Callable[..., SearchOptions]


def model() -> Model:
    return Model(**vars(tiny_model()))


def lines(path) -> list[dict]:  # noqa: ANN001
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_writes_its_files_and_is_not_repeated(options: Make) -> None:
    chosen, said = options(), []
    metrics = run(chosen, model=model(), say=said.append)
    names = {p.name for p in chosen.run.out.iterdir()}
    assert names == {
        "config.json", "direction.safetensors", "progress.jsonl", "pareto.jsonl", "metrics.json", "choices.json",
    }  # fmt: skip
    written = json.loads((chosen.run.out / "metrics.json").read_text())
    assert written == metrics.to_json() and SearchRun.from_json(written) == metrics
    assert metrics.persona == "tiny" and metrics.splits.keys() == {"train", "validation", "test"}
    assert min(metrics.timing.compile_s, metrics.timing.search_s, metrics.timing.eval_s) > 0
    assert metrics.timing.candidates == 3 * 2 * 4
    for entry in (metrics.baseline, metrics.controls["oracle"], *metrics.prompts):
        for split, rate_ in (("validation", entry.validation), ("test", entry.test)):
            assert 0 <= rate_.ci95[0] <= rate_.rate <= rate_.ci95[1] <= 1
            assert rate_.n == metrics.splits[split]  # questions, which the data has in both orders
    prompts = metrics.prompts
    assert prompts and all(len(p.ids) == 3 for p in prompts)
    assert metrics.selected == 0 and prompts[0].target == max(p.target for p in prompts)
    for p in prompts:
        assert p.target == pytest.approx(p.search_target, abs=1e-3)
    progress = lines(chosen.run.out / "progress.jsonl")
    assert progress[-1]["step"] == 3 and math.isfinite(progress[-1]["best_target"][0])
    assert lines(chosen.run.out / "pareto.jsonl")[0]["text"] == prompts[0].text
    direction = load_direction(chosen.run.out / "direction.safetensors")
    assert direction.metadata["site"] == metrics.site in direction.delta
    choices = json.loads((chosen.run.out / "choices.json").read_text())["test"]
    rows = {**choices, **choices["prompts"][0], "joined": [0] * len(choices["ids"])}
    del rows["prompts"], rows["asked"]
    again = rate(ChoiceResult.from_json(rows))
    assert again.rate == metrics.baseline.test.rate

    tokens = attribute_run(chosen.run.out, model=model())
    assert len(tokens.tokens) == len(tokens.replacement) == 3
    assert run(chosen, say=said.append) == dataclasses.replace(metrics, attribution=tokens)  # no model is loaded
    assert "already holds this run" in said[-1]
    with pytest.raises(UserError, match=r"another run's files \(seed: 0 there, 1 now\)"):
        run(options(seed=1), model=model())


def test_what_is_no_finished_run_is_not_attributed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished search"):
        attribute_run(tmp_path)


def test_the_same_seed_gives_the_same_prompts_after_a_cut_off_run(options: Make) -> None:
    first = run(options(), model=model())
    (options().run.out / "metrics.json").unlink()  # as if killed before the end
    second = run(options(), model=model())
    assert [p.ids for p in first.prompts] == [p.ids for p in second.prompts]
    assert first.probe_correlation == second.probe_correlation


def test_the_probe_takes_no_more_than_the_search_and_is_taken_up_again(
    options: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jaxsteer.study.dispatch as module

    monkeypatch.setattr(module, "search", lambda *_, **__: pytest.fail("the probe is done"))
    with pytest.raises(pytest.fail.Exception, match="the probe is done"):
        run(options(), model=model())
    monkeypatch.undo()
    said: list[str] = []
    kept = run(options(resume=True), model=model(), say=said.append)
    assert any("31 random prompts have been measured before" in line for line in said)
    assert kept.probe.prompts == 31  # the search scores 24 prompts in 4 rows each
    assert kept.probe_ci95 in [row.ci95 for row in kept.probe.rows]
    assert not (options().run.out / "probe-state").exists()


def test_without_a_probe_the_site_is_as_given_and_the_run_says_what_is_unknown(options: Make) -> None:
    said: list[str] = []
    metrics = run(options(probe="off", site="layers.1"), model=model(), say=said.append)
    assert (metrics.site, metrics.sign) == ("blocks.1.hook_resid_post", 1) and any("--probe off" in s for s in said)
    assert (metrics.probe, metrics.probe_correlation, metrics.probe_ci95) == (None, None, None)
    assert [doubt for doubt in metrics.doubts if "it is unknown whether the objective ranks prompts" in doubt]
    written = json.loads((options().run.out / "metrics.json").read_text())
    assert SearchRun.from_json(written) == metrics


@pytest.mark.slow
@pytest.mark.parametrize("read_position", ["published"])
def test_another_read_position_and_a_given_site(options: Make, read_position: str) -> None:
    metrics = run(options(read_position=read_position, site="layers.2", select="validation"), model=model())
    assert metrics.site == "blocks.2.hook_resid_post" and metrics.sign == 1
    assert metrics.read_position == read_position and metrics.selected_by == "validation"


@pytest.mark.parametrize("several", [{}, {"vary": {"seed": range(2)}}])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"persona": "rows.jsonl"}, "give --read-position matched, or counter_cues and pro_cues in a persona file"),
        ({"direction": "absent.safetensors"}, "there is no direction file"),
        ({"site": "blocks.99.hook_resid_post"}, "blocks.99"),
    ],
)
def test_a_refused_search_leaves_no_directory(
    options: Make, tmp_path: Path, changes: dict[str, str], message: str, several: dict[str, object]
) -> None:
    names = {name: str(tmp_path / text) if name != "site" else text for name, text in changes.items()}
    with pytest.raises(UserError, match=message):
        run(options(**names, **several), model=model())
    assert not options().run.out.exists()


@pytest.mark.parametrize("many", [{"restarts": 50}, {"vary": {"restart": "0:50"}}])
def test_more_searches_than_memory_holds(options: Make, many: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = options(probe="off", site="blocks.1.hook_resid_post", **many)
    monkeypatch.setattr("jaxsteer.models.sharding.free_memory", lambda: 1 << 18)
    made: list[str] = []
    monkeypatch.setattr("jaxsteer.study.stages.make_problem", lambda *a, **k: made.append("") or make_problem(*a, **k))
    with pytest.raises(UserError, match="50 searches needs .* choose fewer --restarts"):
        run(chosen, model=model(), say=lambda _: None)
    assert len(made) == 1  # the other problems were never made


def test_a_custom_objective_from_a_file(options: Make, tmp_path) -> None:  # noqa: ANN001
    file = tmp_path / "mine.py"
    file.write_text("def down(reads):\n    return -reads['blocks.0.hook_resid_post'][:, 3]\nother = 3\n")
    more = {"prompt_length": "2:4", "combine": "soft-min", "combine_temperature": 0.05}
    words = ("frank", "honest", "clear", "prefer", "year")
    metrics = run(options(objective=f"{file}:down", raw_units=True, allow=words, **more), model=model())
    assert metrics.site == "custom: down" and metrics.objective_units.name == "raw"
    assert json.loads((options().run.out / "config.json").read_text()).items() >= more.items()
    for p in metrics.prompts:
        assert p.target == pytest.approx(p.search_target, abs=1e-3) and 2 <= len(p.ids) <= 4
        assert set(p.text.split()) <= set(words)
    assert not (options().run.out / "direction.safetensors").exists()
    for reference, message in [
        (f"{file}:nothing", "it has down"),
        (f"{file}:other", "not a function"),
        (f"{tmp_path}/none.py:f", "there is no file"),
        ("mine.py", "file.py:function"),
    ]:
        with pytest.raises(UserError, match=message):
            run(options(objective=reference, out=tmp_path / "x"), model=model())
    file.write_text("raise RuntimeError('boom')\n")
    with pytest.raises(UserError, match="RuntimeError: boom"):
        run(options(objective=f"{file}:down", out=tmp_path / "x"), model=model())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"site": "blocks.7.hook_resid_post"}, "beyond the last layer"),
        ({"site": "blocks.0.hook_attn_out"}, "lies elsewhere"),
        ({"prompt_length": 230}, "256 positions"),
        ({"combine_temperature": 0.5}, "belongs to --combine soft-min"),
        ({"allow": ("frank",)}, "fewer than 2 tokens can stand first"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"probe": "off"}, "leaves nobody to choose the site"),
        ({"probe": 7}, "at least 8 prompts, got 7"),
        ({"persona": "kindness"}, "unknown persona 'kindness'"),
    ],
)
def test_refused_before_any_work(options: Make, changes: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import jaxsteer.study.dispatch as module

    monkeypatch.setattr(module, "choose_objective", lambda *_: pytest.fail("work was done"))
    with pytest.raises(UserError, match=message):
        run(options(**changes), model=model())
    assert not options().run.out.exists() or not list(options().run.out.iterdir())


def test_a_directory_with_other_things_is_left_alone(options: Make, tmp_path) -> None:  # noqa: ANN001
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="thesis.txt"):
        run(options(), model=model())
    with pytest.raises(UserError, match="is a file"):
        run(options(out=tmp_path / "run" / "thesis.txt"), model=model())


def test_selection_never_takes_a_prompt_that_changes_as_text() -> None:
    def prompt(target: float, validation: float, retokenises: bool = True, **changes: bool) -> Prompt:
        return Prompt(target=target, retokenises=retokenises, validation=made_rate(validation, **changes))

    prompts = [prompt(9.0, 0.0, False), prompt(3.0, 0.6), prompt(5.0, 0.9), prompt(1.0, 0.6)]
    assert select(prompts, "objective") == 2
    assert select(prompts, "validation") == 1
    assert select([*prompts, prompt(0.0, 0.1, letter_collapse=True)], "validation") == 1
    assert select(prompts[:1], "objective") is None


def test_ctrl_c_keeps_and_evaluates_what_was_found(options: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import jaxsteer.study.stages as module

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    # The search asks for it after its first steps.
    monkeypatch.setattr(module, "text_filter", lambda *_: interrupted)
    said: list[str] = []
    metrics = run(options(), model=model(), say=said.append)
    assert metrics.interrupted and metrics.prompts and metrics.selected == 0
    assert any("Interrupted" in line for line in said)
    assert (options().run.out / "metrics.json").is_file()
    monkeypatch.undo()
    assert run(options(), model=model(), say=said.append).interrupted, "it is reported as far as it went"
    whole = run(options(resume=True), model=model(), say=said.append)
    assert not whole.interrupted and whole.timing.steps == options().algorithm.steps
    assert not (options().run.out / "search-state").exists()


def test_saega_searches_latents_and_names_them(options: Make, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    d, f, site = model().config.d_model, 24, "blocks.1.hook_resid_post"
    sae = SAE(
        W_enc=jnp.asarray(rng.normal(size=(d, f)), jnp.float32),
        W_dec=jnp.asarray(rng.normal(size=(f, d)), jnp.float32),
        b_enc=jnp.zeros(f),
        b_dec=jnp.zeros(d),
        config=SAEConfig(activation="relu", site_in=site, model=model().name),
    )
    save_sae(sae, tmp_path / "sae")
    chosen = options(method="saega", sae=str(tmp_path / "sae"), latents=5, restarts=2)
    mesh = make_mesh(prompts=2)  # as where there are several devices
    copies = jax.device_put(model().params, NamedSharding(mesh, PartitionSpec()))
    metrics = run(chosen, model=dataclasses.replace(model(), params=copies, mesh=mesh))
    assert metrics.method == "saega" and metrics.site == site
    assert {"signature.safetensors", "metrics.json", "pareto.jsonl"} <= {p.name for p in chosen.run.out.iterdir()}
    signature = metrics.signature
    assert signature.latents == 5 and signature.dictionary == f and len(signature.rows) == 5
    assert len(signature.tokens) == 3
    for row in signature.rows:
        assert len(row.promotes) == 8 and len(row.by_token) == 3
    # The latents' contributions add up to the objective, which the search standardised and scored from text again.
    units, best = metrics.objective_units, metrics.best
    assert signature.objective == pytest.approx(best.target * units.scale + units.offset, rel=1e-4)
    assert sum(row.at_read for row in signature.rows) == pytest.approx(signature.objective, rel=1e-5)
    page = write_report(chosen.run.out).read_text()
    assert f"latent {signature.rows[0].latent}" in page
    names_of_latents(chosen.run.out, sae, best.text, [row.latent for row in signature.rows])


def names_of_latents(out: Path, sae: SAE, prompt: str, latents: list[int]) -> None:
    """One latent is explained by a word of the prompt, all others by words that no prompt has."""
    (spoken, *_) = re.findall(r"[^\W\d_]{2,}", prompt)
    words = (spoken.upper(), *(f"zz{chr(97 + i)}" for i in range(12)))
    told = np.tile(np.arange(1, 13, dtype=np.int32), (sae.n_latents, 1))
    told[latents[1], 3] = 0
    table = Explanations(
        words=told, scores=np.ones(told.shape, np.float32), information=np.ones(len(told), np.float32),
        vocabulary=Vocabulary(words=words, tokens=tuple((i,) for i in range(13)), source="given"), model="m",
        fingerprint="f", sae="s", digest=digest_of(sae), site="blocks.1.hook_resid_post", side="decoder",
        posterior="bayes", temperature=1.0,
    )  # fmt: skip
    table.save(out.parent / "e.safetensors")
    assert main(["report", str(out), "--explanations", str(out.parent / "e.safetensors")]) == 0
    found = read_run(out).result.latent_names
    assert found is not None and [row.latent for row in found.rows] == latents
    assert [row.held for row in found.rows] == [(spoken.upper(),) if at == 1 else () for at in range(len(latents))]
    assert found.share == 1 / len(latents) and found.chance == pytest.approx(1 / sae.n_latents) and found.known == 1
    page = (out / "report.html").read_text()
    assert f"<b>{spoken.upper()}</b>" in page
    assert "of all latents of the SAE it does so of 4.2 %" in " ".join(page.split())
    dataclasses.replace(table, digest="0" * 16).save(out.parent / "o.safetensors")
    assert main(["report", str(out), "--explanations", str(out.parent / "o.safetensors")]) == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "saega"}, "belong together"),
        ({"sae": "somewhere"}, "belong together"),
        ({"method": "saega", "sae": "x", "site": "blocks.0.hook_resid_post"}, "its own objective and site"),
        ({"latents": 3}, "option of --method saega"),
        ({"method": "saega", "sae": "x", "latents": 0}, "at least 1"),
    ],
)
def test_options_of_saega_that_contradict_each_other(options: Make, changes: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        run(options(**changes), model=model())
