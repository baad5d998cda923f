"""Vectors of libraries: files that steering-vectors 0.12.2 and pyvene 0.1.8 wrote, and the layouts of the others.

``written/`` holds ``torch.save(SteeringVector({1: arange(6), 3: arange(6) + 100}))`` and what pyvene's ``save`` made of
an addition of arange(8) at block_output 1 and a subtraction of arange(8) + 100 at mlp_output 2 of a Llama.
EasyEdit's and axbench's vectors are bare tensors by ``torch.save``, AISteer360's JSON: their layouts are those of their
sources, because no release of theirs that writes vectors installs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.files import read_torch
from jaxsteer.steer import import_vectors, load_vectors, save_vectors
from tests.helpers.torchzip import Raw, write
from tests.steer.test_imports import D, L, post, rows

WRITTEN = Path(__file__).parent / "written"


def save(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, value)


def test_steering_vectors(tmp_path: Path) -> None:
    found = import_vectors(WRITTEN / "steering_vectors.pt")
    assert found.sites == (post(1), post(3)) and found.positions == "every" and "positive examples" in found.sign
    np.testing.assert_array_equal(found.arrays[post(3)], np.arange(6.0) + 100)
    back = load_vectors(save_vectors(found, tmp_path / "back.safetensors"))
    assert back.metadata == found.metadata and back.source_format == "steering_vectors"
    fields = {"layer_activations": {2: rows(L)[2]}, "layer_type": "mlp"}
    assert import_vectors(save(tmp_path / "fields.pt", fields)).sites == ("blocks.2.mlp.hook_out",)
    bare = save(tmp_path / "bare.pt", {0: rows(L)[0], 2: rows(L)[2]})
    assert import_vectors(bare, format="steering_vectors").sites == (post(0), post(2))
    with pytest.raises(UserError, match="fits no known format"):
        import_vectors(bare)
    with pytest.raises(UserError, match="'input_layernorm', which is no site"):
        import_vectors(save(tmp_path / "norm.pt", fields | {"layer_type": "input_layernorm"}))
    with pytest.raises(UserError, match="expected layer_activations"):
        import_vectors(save(tmp_path / "none.pt", fields | {"layer_activations": {}}))


def test_a_record_of_fields_runs_nothing(tmp_path: Path) -> None:
    """The class is not imported, whatever the file does with it; another class of the same library is refused."""
    name = b"csteering_vectors.steering_vector\nSteeringVector\n"
    made = read_torch(save(tmp_path / "a.pt", Raw(name + b")\x81}b")))
    assert made == {}
    for code, message in (
        (name, "as a value"),
        (name + b")\x81N" + b"b", "damaged"),
        (name.replace(b"SteeringVector", b"SteeringPatchHandle") + b")\x81}b", "SteeringPatchHandle"),
    ):
        with pytest.raises(UserError, match=message):
            read_torch(save(tmp_path / "b.pt", Raw(code)))


def test_pyvene(tmp_path: Path) -> None:
    found = import_vectors(WRITTEN / "pyvene")
    assert found.sites == (post(1), "blocks.2.mlp.hook_out") and found.positions == "every"
    np.testing.assert_array_equal(found.arrays[post(1)], np.arange(8.0))
    np.testing.assert_array_equal(found.arrays["blocks.2.mlp.hook_out"], -np.arange(8.0) - 100)
    assert import_vectors(WRITTEN / "pyvene", site=post(1)).sites == (post(1),)
    copy = tmp_path / "pyvene"
    shutil.copytree(WRITTEN / "pyvene", copy)
    config = json.loads((copy / "config.json").read_text())
    for changes, message in (
        ({"intervention_types": ["<class 'x.Rotated'>"] * 2}, "additions and"),
        ({"representations": [[1, "head_attention_value_output"]] * 2}, "additions and"),
        ({"sorted_keys": ["elsewhere"] * 2}, "elsewhere"),
        ({"sorted_keys": "x"}, "not one of pyvene"),
    ):
        (copy / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=message):
            import_vectors(copy)


def test_easyedit(tmp_path: Path) -> None:
    for i in (1, 3):
        save(tmp_path / f"caa_vector/layer_{i}.pt", rows(L)[i])
        for trim in ("0.65", "0.5"):
            save(tmp_path / f"sta_vector/layer_{i}_act_and_freq_trim{trim}.pt", rows(L)[i] + 1)
    one = import_vectors(tmp_path / "caa_vector" / "layer_3.pt")
    assert one.sites == (post(3),) and one.metadata["method"] == "CAA" and "answer" in one.read_position
    every = import_vectors(tmp_path / "caa_vector")
    assert every.sites == (post(1), post(3)) and every.source_format == "easyedit"
    sta = import_vectors(tmp_path / "sta_vector", name="act_and_freq_trim0.65")
    np.testing.assert_array_equal(sta.arrays[post(3)], rows(L)[3] + 1)
    assert sta.metadata["method"] == "STA"
    assert import_vectors(tmp_path / "sta_vector" / "layer_1_act_and_freq_trim0.5.pt").sites == (post(1),)
    with pytest.raises(UserError, match=r"act_and_freq_trim0\.5, act_and_freq_trim0\.65: choose one with --name"):
        import_vectors(tmp_path / "sta_vector")
    other = save(tmp_path / "elsewhere" / "layer_3.pt", rows(L)[3])
    assert import_vectors(other, format="easyedit").sites == (post(3),)
    with pytest.raises(UserError, match="bare vector"):
        import_vectors(other)


def test_axbench(tmp_path: Path) -> None:
    path = save(tmp_path / "train" / "DiffMean_weight.pt", rows(L))
    with pytest.raises(UserError, match=r"4 concepts.*row \(0 to 3\)"):
        import_vectors(path, site=post(2))
    with pytest.raises(UserError, match="does not say its layer"):
        import_vectors(path, name="1")
    found = import_vectors(path, name="1", site=post(2))
    np.testing.assert_array_equal(found.arrays[post(2)], rows(L)[1])
    (tmp_path / "generate").mkdir()
    lines = [json.dumps({"concept_id": i, "concept": f"words about {i}", "ref": ""}) for i in range(L)]
    (tmp_path / "generate" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    found = import_vectors(path, name="words about 3", site=post(2))
    np.testing.assert_array_equal(found.arrays[post(2)], rows(L)[3])
    assert found.metadata["concept"] == "words about 3" and found.metadata["method"] == "DiffMean"
    with pytest.raises(UserError, match="0: words about 0"):
        import_vectors(path, name="nothing", site=post(2))


def test_heads_of_aisteer360(tmp_path: Path) -> None:
    heads = rows(L).reshape(4, 2, D // 2)[:2]
    data = {
        "model_type": "llama", "num_heads": 2, "head_dim": D // 2,
        "directions": {"0": heads[0].tolist(), "2": heads[1].tolist()}, "probe_accuracies": {"2:1": 0.9},
    }  # fmt: skip
    (tmp_path / "iti.svec").write_text(json.dumps(data))
    found = import_vectors(tmp_path / "iti.svec")
    assert found.sites == ("blocks.0.attn.hook_z", "blocks.2.attn.hook_z")
    np.testing.assert_array_equal(found.arrays["blocks.2.attn.hook_z"], heads[1])
    assert json.loads(found.metadata["probe_accuracies"]) == {"2:1": 0.9}
