"""Training from texts to the file: which activations count, the pool, and that stopping changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer import UserError, capture, load_sae, make_mesh
from jaxsteer.models.model import Model
from jaxsteer.models.sharding import shard_params
from jaxsteer.sae.harvest import empty_pool, fill, harvest, usable
from jaxsteer.sae.recipe import Recipe
from jaxsteer.sae.texts import FileDocuments, Rows, documents_of
from jaxsteer.sae.training import METRICS, OPTIONS, STATE, train_sae

SITE = "blocks.1.hook_resid_post"
RECIPE = Recipe(site=SITE, latents=48, arch="batchtopk", k=4, batch=32, pool=256, tokens=640, context=16, rows=8)


# Texts


def test_documents_are_all_lines_in_another_order_in_every_pass(tmp_path: Path, model: Model):
    (tmp_path / "a.txt").write_text("first one\r\n\nsecond one", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "third\\none"}\n{"text": "<|bos|>fourth"}\n', encoding="utf-8")
    documents = FileDocuments([tmp_path / "a.txt", tmp_path / "b.jsonl"], model.tokenizer, seed=3)
    assert len(documents) == 4
    said = [model.tokenizer.decode(documents(i), skip_special_tokens=True) for i in range(12)]
    for start in (0, 4, 8):
        assert sorted(said[start : start + 4]) == ["first one", "fourth", "second one", "third\none"]
    assert said[:4] != said[4:8] or said[4:8] != said[8:]
    bos = model.tokenizer.bos_token_id
    assert all(documents(i)[0] == bos and documents(i)[1] != bos for i in range(4))


def test_texts_that_cannot_be_read_say_why(tmp_path: Path, model: Model):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "odd.jsonl").write_text('{"body": "no text"}\n')
    with pytest.raises(UserError, match="is empty"):
        documents_of(model, [tmp_path / "empty.txt"])
    with pytest.raises(UserError, match="cannot be read"):
        documents_of(model, [tmp_path / "missing.txt"])
    for data, says in (
        (b'{"text": "a"}\n\n{"text": 5}\n', 'odd.jsonl, line 3: .* key "text"'),
        (b'{"text": "a"}\n[1]\n', 'line 2: .* key "text"'),
        (b'{"text": "a"}\n{"text": \n', "line 2: its JSON.* ends too early"),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', "line 2: .*half a character"),
        (b'{"text": "a"}\n\xff\n', "line 2: the text is not UTF-8"),
    ):
        (tmp_path / "odd.jsonl").write_bytes(data)
        documents = documents_of(model, [tmp_path / "odd.jsonl"])
        with pytest.raises(UserError, match=says):
            [documents(0), documents(1)]
    (tmp_path / "a.txt").write_bytes("\ufeffé\n".encode() + b"\xe9\n")
    documents = documents_of(model, [tmp_path / "a.txt"])
    assert documents._text(0) == "é"
    with pytest.raises(UserError, match="a.txt, line 2: the text is not UTF-8"):
        documents._text(1)
    with pytest.raises(UserError, match="no texts were given"):
        documents_of(model)


def test_rows_cut_long_documents_and_go_on_anywhere():
    documents = {0: [1, 5, 6, 7, 8, 9], 1: [1], 2: [1, 20, 21], 3: [30, 31]}
    rows = Rows(lambda i: documents[i % 4], rows=3, length=4, bos=1)
    tokens, mask, position = rows.next()
    # The piece after the first one begins with the document's BOS again; what would be BOS alone is dropped.
    np.testing.assert_array_equal(tokens, [[1, 5, 6, 7], [1, 8, 9, 0], [1, 20, 21, 0]])
    np.testing.assert_array_equal(mask.sum(1), [4, 3, 3])
    later = [rows.next()[0] for _ in range(3)]
    again = Rows(lambda i: documents[i % 4], rows=3, length=4, bos=1, position=position)
    for tokens in later:
        np.testing.assert_array_equal(again.next()[0], tokens)
    with pytest.raises(UserError, match="fewer than two tokens"):
        Rows(lambda i: [1], rows=1, length=4, bos=1).next()


# Activations


def test_padding_bos_first_tokens_and_outliers_do_not_count():
    x = np.random.default_rng(0).uniform(0.9, 1.1, (3, 6, 4)).astype(np.float32)
    x[0, 3] *= 30.0
    x[1, 0] = 1e6  # the first token is out already: the median must not see it
    tokens = np.full((3, 6), 7)
    tokens[1, 2] = 1
    mask = np.ones((3, 6), bool)
    mask[0, 5:] = False
    mask[2, :2] = False  # padding on the left: the first token is at 2
    expected = mask.copy()
    expected[[0, 0, 1, 1, 2], [0, 3, 0, 2, 2]] = False
    np.testing.assert_array_equal(usable(jnp.asarray(x), jnp.asarray(tokens), jnp.asarray(mask), 1), expected)
    x[0, 1] = np.nan
    expected[0, 1] = False
    np.testing.assert_array_equal(usable(jnp.asarray(x), jnp.asarray(tokens), jnp.asarray(mask), 1), expected)


def test_the_pool_holds_exactly_the_activations_that_count(model: Model, texts: Path):
    rows = lambda: Rows(documents_of(model, [texts]), rows=8, length=16, bos=model.tokenizer.bos_token_id)  # noqa: E731
    expected, source = [], rows()
    for _ in range(3):
        tokens, mask, _ = source.next()
        x = np.asarray(capture(model, tokens, [SITE], mask)[SITE])
        keep = mask & (np.arange(16) > 0) & (tokens != model.tokenizer.bos_token_id)
        found, counts = harvest(model, SITE, tokens, mask)
        np.testing.assert_array_equal(np.asarray(counts).reshape(8, 16), keep)
        np.testing.assert_array_equal(np.asarray(found).reshape(x.shape), x)
        expected.append(x[keep])
    pool = empty_pool(None, 256, 32, jnp.dtype("float32"))
    slots = jnp.asarray(np.random.default_rng(0).permutation(256)[:200])
    pool, position = fill(pool, slots, model, SITE, iter(rows().next, None))
    np.testing.assert_array_equal(np.asarray(pool)[np.asarray(slots)], np.concatenate(expected)[:200])
    rest = np.setdiff1d(np.arange(256), np.asarray(slots))
    assert not np.asarray(pool)[rest].any()
    assert position == source.position or len(np.concatenate(expected[:2])) >= 200


# Runs


def run(model: Model, texts: Path, out: Path, **arguments: Any) -> Any:
    return train_sae(model, documents_of(model, [texts]), RECIPE, out, **({"save_minutes": 0.0} | arguments))


@pytest.fixture(scope="module")
def finished(model: Model, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(model, texts, out)
    return out


class Killed(Exception):
    """Stands for the end of the process."""


def killer(rounds: int) -> Callable[[dict[str, Any]], None]:
    def progress(line: dict[str, Any]) -> None:
        if line["round"] == rounds:
            raise Killed

    return progress


def test_a_run_that_was_killed_ends_as_if_it_had_not_been(model: Model, texts: Path, finished: Path, tmp_path: Path):
    out = tmp_path / "killed"
    for rounds in (1, 3):
        with pytest.raises(Killed):
            run(model, texts, out, progress=killer(rounds))
    assert (out / STATE).is_dir() and not (out / "cfg.json").exists()
    (out / STATE / "9.orbax-checkpoint-tmp").mkdir()  # a checkpoint that was being written
    with (out / METRICS).open("a") as file:
        file.write('{"round": 4, "half a li')
    began: list[int] = []
    run(model, texts, out, progress=lambda line: began.append(line["round"]))
    assert began == [4, 5]
    for name in ("sae_weights.safetensors", METRICS, "cfg.json"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["sae_weights.safetensors", "cfg.json", METRICS, OPTIONS]
    )


def test_the_file_is_an_sae_in_units_of_the_model(model: Model, texts: Path, finished: Path):
    sae = load_sae(finished)
    config = sae.config
    assert (config.activation, config.site_in, config.model) == ("jumprelu", SITE, model.name)
    assert (config.input_scale, config.subtract_b_dec, config.latent_units) == (1.0, False, "unit decoder")
    np.testing.assert_allclose(np.linalg.norm(sae.W_dec, axis=1), 1.0, atol=1e-5)
    lines = [json.loads(line) for line in (finished / METRICS).read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(1, RECIPE.rounds + 1))
    assert lines[-1]["fvu"] < lines[0]["fvu"] and lines[-1]["l0"] == pytest.approx(4, abs=0.1)


def test_a_finished_run_is_not_done_again_and_another_is_refused(model: Model, texts: Path, finished: Path):
    before = (finished / "sae_weights.safetensors").stat().st_mtime_ns
    run(model, texts, finished, progress=killer(1))
    assert (finished / "sae_weights.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds another training .data: None there, 'other' now"):
        run(model, texts, finished, data="other")
    with pytest.raises(UserError, match="holds no training"):
        run(model, texts, texts.parent)


def test_a_mesh_of_eight_trains_the_same_sae_in_one_program(
    model: Model, texts: Path, finished: Path, tmp_path: Path, compile_counter: Any
):
    mesh = make_mesh(model=2)
    params = shard_params(model.params, model.config, mesh)
    spread = Model(params, model.config, model.tokenizer, model.name, model.fingerprint, mesh)
    with compile_counter() as count:
        eight = run(spread, texts, tmp_path / "eight", save_minutes=10.0)
    assert count["advance"] == 1 and RECIPE.rounds > 1
    one = load_sae(finished)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
        np.testing.assert_allclose(getattr(one, name), getattr(eight, name), rtol=2e-3, atol=2e-4, err_msg=name)
    assert eight.W_enc.sharding.spec[-1] == "model"
