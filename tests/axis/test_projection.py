"""Projections on an axis: whoever wrote a text, however it is batched; files in and out; refusals."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxsteer
from jaxsteer.axis.projection import PassageProjection, axis_sites, load_axis, project
from jaxsteer.cli import main
from jaxsteer.engine.chat import Chat
from jaxsteer.errors import UserError
from jaxsteer.models.sampling import Decoding
from jaxsteer.models.sharding import make_mesh
from jaxsteer.organisms import persona_world
from jaxsteer.personas.passages import Passage, read_passages
from jaxsteer.prompts.generate import encode_prompts, generate
from jaxsteer.steer import save_vectors
from tests.axis.planted import planted
from tests.helpers.tiny import tiny_model

SITE = "blocks.3.hook_resid_post"


def test_0_is_the_mean_of_the_roles_and_1_the_default() -> None:
    """The planted order needs more rollouts than there are here: tests/axis/test_pipeline.py."""
    world = planted()
    found = project(world.model, world.axis, world.rollouts)
    assert found.sites == (SITE,)
    by_role: dict[str, list[float]] = {}
    for passage in found.passages:
        by_role.setdefault(passage.group, []).append(passage.position(SITE))
    means = {role: float(np.mean(values)) for role, values in by_role.items()}
    default = means.pop("default")
    assert default == pytest.approx(1, abs=1e-4) and np.mean(list(means.values())) == pytest.approx(0, abs=1e-4)
    low, high = min(means, key=persona_world.ASSISTANTNESS.get), max(means, key=persona_world.ASSISTANTNESS.get)  # type: ignore[arg-type]
    assert means[low] < 0 < means[high]


def test_a_live_chat_projects_as_its_text_does() -> None:
    """States of the tokens as they were generated, turn by turn, against the text read at once."""
    world = planted()
    chat = Chat(world.model, decoding=Decoding(temperature=0, max_new_tokens=24))
    unit = world.axis.arrays[SITE].astype(np.float64) / world.axis.norm(SITE)
    live = []
    for text in ("Tell me about rivers.", "Describe dreams to me.", "What do you think of graves?"):
        (asked,) = encode_prompts(world.model, [[*chat.turns, {"role": "user", "content": text}]], roles=True)
        made = generate(
            world.model, [[*chat.turns, {"role": "user", "content": text}]], temperature=0, max_new_tokens=24
        )
        "".join(chat.reply(text))
        assert chat.turns[-1]["content"] == made.texts[0].lstrip()
        ids = np.concatenate([asked.ids, made.tokens[0, : made.lengths[0] - 1]])  # without the end of the turn
        states = jaxsteer.run(world.model, ids[None], sites=[SITE]).states[SITE]
        live.append(np.asarray(states)[0, len(asked.ids) :].astype(np.float64) @ unit)
    found = project(world.model, world.axis, [Passage(id="chat", messages=tuple(chat.turns))], tokens=True)
    (passage,) = found.passages
    assert [turn.turn for turn in passage.turns] == [1, 3, 5]
    for turn, expected in zip(passage.turns, live, strict=True):
        np.testing.assert_allclose(turn.each[SITE], expected, atol=1e-4)
        assert turn.along[SITE] == pytest.approx(expected.mean(), abs=1e-4) and turn.tokens == len(expected)
    assert passage.along(SITE) == pytest.approx(np.concatenate(live).mean(), abs=1e-4)
    assert passage.turns[1].each == project(world.model, world.axis, [
        Passage(id="chat", messages=tuple(chat.turns[:4]))
    ], tokens=True).passages[0].turns[1].each, "what is said later moves nothing"  # fmt: skip


def test_neither_batches_nor_devices_change_it() -> None:
    world = planted()
    some = world.rollouts[::4]
    whole = [passage.along(SITE) for passage in project(world.model, world.axis, some).passages]
    alone = [project(world.model, world.axis, [one]).passages[0].along(SITE) for one in some[:3]]
    np.testing.assert_allclose(alone, whole[:3], atol=1e-5)
    mesh = make_mesh()
    params = jax.device_put(world.model.params, NamedSharding(mesh, PartitionSpec()))
    spread = project(dataclasses.replace(world.model, params=params, mesh=mesh), world.axis, some)
    np.testing.assert_allclose([passage.along(SITE) for passage in spread.passages], whole, atol=1e-5)


def test_files_of_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = planted()
    save_vectors(world.axis, tmp_path / "axis.safetensors")
    messages = [
        {"role": "user", "content": "Tell me about bread."},
        {"role": "assistant", "content": "One finds bread wild."},
    ]
    rows = [
        {"messages": messages, "domain": "calm"},
        {"id": "x", "question": messages[0]["content"], "response": messages[1]["content"]},
        {"conversation": messages, "role": "poet"},
        {"text": "One finds bread wild."},
    ]
    (path := tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    passages = read_passages(path)
    assert [one.group for one in passages] == ["calm", "", "poet", ""] and passages[1].id == "x"
    out = tmp_path / "out"
    assert main(["axis", "project", str(path), "--axis", str(tmp_path), "--out", str(out), "--tokens"]) == 0
    assert "Wrote" in capsys.readouterr().out
    found = [PassageProjection.from_json(json.loads(line)) for line in (out / "projections.jsonl").open()]
    assert found[0].turns == found[1].turns == found[2].turns and "".join(found[0].turns[0].pieces).endswith("wild.")
    turns, wholes = (list(csv.DictReader((out / name).open())) for name in ("turns.csv", "conversations.csv"))
    assert len(turns) == len(wholes) == 4 and turns[0]["text"] == "One finds bread wild."
    assert float(wholes[0]["along"]) == pytest.approx(found[0].along(SITE), rel=1e-5)
    assert main(["axis", "project", str(path), "--axis", str(tmp_path), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert load_axis(tmp_path).sites == world.axis.sites


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": []}, "line 1: the conversation is empty"),
        ({"messages": [{"role": "user", "content": "Hello"}]}, "1 messages and no reply of an assistant"),
        ({"messages": [{"role": "user"}]}, "every message is"),
        ({"words": "x"}, "line 1: expected messages, prompt or question with answer"),
    ],
)
def test_rows_that_hold_nothing_are_named(tmp_path: Path, row: dict, said: str) -> None:
    (path := tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=said):
        read_passages(path)


def test_what_does_not_fit_the_model_is_refused() -> None:
    world, tiny = planted(), tiny_model()
    one = world.rollouts[0]
    with pytest.raises(UserError, match="belongs to another model"):
        project(tiny, world.axis, [one])
    with pytest.raises(UserError, match="made on .* not on the weights"):
        axis_sites(dataclasses.replace(world.axis, fingerprint="0" * 64), world.model)
    long = Passage(
        id="the long one", messages=({"role": "assistant", "content": "very " * world.model.config.max_positions},)
    )
    with pytest.raises(UserError, match="the long one has .* tokens, but organism:persona has"):
        project(world.model, world.axis, [one, long])
    mute = dataclasses.replace(world.model, tokenizer=_without_template(world.model.tokenizer))
    with pytest.raises(UserError, match="default-0: this tokenizer has no chat template"):
        project(mute, world.axis, [one])
    zero = dataclasses.replace(world.axis, arrays={SITE: np.zeros_like(world.axis.arrays[SITE])}, mean_resid_norm={})
    with pytest.raises(UserError, match="is zero: nothing lies along it"):
        project(world.model, zero, [one])
    with pytest.raises(UserError, match="no conversation was given"):
        project(world.model, world.axis, [])


def _without_template(tokenizer: object) -> object:
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = None
    return other
