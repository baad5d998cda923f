"""Vectors of other tools: what an index means, known rows at known sites, signs, and files that fit nothing."""

import json

import ml_dtypes
import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.files import write_bytes
from jaxsteer.steer.capping import read_capping
from jaxsteer.steer.gguf import write_control_vector
from jaxsteer.steer.imports import import_vectors
from jaxsteer.steer.vectors import Vectors, load_vectors, save_vectors
from tests.helpers.torchzip import View, write

L, D = 4, 6


def post(i):
    return f"blocks.{i}.hook_resid_post"


def rows(n):
    """Row i is recognised by its hundreds."""
    return (100 * np.arange(n)[:, None] + np.arange(D)).astype(np.float32)


def save(tmp_path, name, value):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, value)


def saved_and_back(found, tmp_path):
    back = load_vectors(save_vectors(found, tmp_path / "back.safetensors"))
    assert back.sites == found.sites and back.sign == found.sign and back.metadata == found.metadata
    assert back.source_format == found.source_format and back.values == found.values
    assert back.positions == found.positions
    return back


def test_persona_vectors_are_shifted_by_one(tmp_path):
    path = save(tmp_path, "Qwen/sycophantic_response_avg_diff.pt", rows(L + 1))
    found = saved_and_back(import_vectors(path), tmp_path)
    assert found.sites == ("hook_embed", post(0), post(1), post(2))  # row L comes after the final norm
    np.testing.assert_array_equal(found.arrays["hook_embed"], rows(L + 1)[0])
    for i in range(1, L):
        np.testing.assert_array_equal(found.arrays[post(i - 1)], rows(L + 1)[i])
    assert "towards the trait" in found.sign and found.read_position == "response_avg"
    assert "row 4" in found.metadata["index_meaning"] and found.metadata["n_layers"] == "4"
    assert import_vectors(path, site="layer_2").sites == (post(2),)
    other = save(tmp_path, "x.pt", rows(L + 1))
    assert import_vectors(other, format="persona_vectors").sites == found.sites


def test_assistant_axis_is_by_block(tmp_path):
    path = save(tmp_path, "assistant_axis.pt", rows(L).astype(ml_dtypes.bfloat16))
    found = saved_and_back(import_vectors(path), tmp_path)
    assert found.sites == tuple(map(post, range(L)))
    np.testing.assert_array_equal(found.arrays[post(3)], rows(L)[3].astype(ml_dtypes.bfloat16).astype(np.float32))
    assert found.sign == "towards the Assistant: mean(default) - mean(roles)"
    boxed = save(tmp_path, "any.pt", {"axis": rows(L), "metadata": {"model": "m"}})
    found = import_vectors(boxed)
    np.testing.assert_array_equal(found.arrays[post(2)], rows(L)[2])
    assert json.loads(found.metadata["axis_metadata"]) == {"model": "m"}


def test_vectors_of_roles_say_that_they_contrast_with_nothing(tmp_path):
    role = save(tmp_path, "pirate.pt", {"vector": rows(L), "type": "pos_3", "role": "pirate"})
    found = import_vectors(role)
    assert found.sites[-1] == post(L - 1) and "'pirate', not a contrast" in found.sign
    for name in ("role_vectors/ghost.pt", "trait_vectors/calm.pt", "default_vector.pt"):
        assert "not a contrast" in import_vectors(save(tmp_path, name, rows(L))).sign


def test_two_dimensions_without_a_telling_name_are_asked_about(tmp_path):
    path = save(tmp_path, "vectors.pt", rows(L))
    with pytest.raises(UserError, match=r"float32 \[4, 6\].*persona_vectors.*assistant_axis"):
        import_vectors(path)
    assert len(import_vectors(path, format="assistant_axis").sites) == L
    assert len(import_vectors(path, format="persona_vectors").sites) == L - 1


CAPS = {
    "vectors": {f"layer_{i}/contrast_role_pos3_default1": {"layer": i, "vector": -rows(L)[i] - 1} for i in range(1, L)},
    "experiments": [
        {
            "id": "layers_1:3-p0.25",
            "interventions": [
                {"vector": "layer_1/contrast_role_pos3_default1", "cap": -7.5},
                {"vector": "layer_2/contrast_role_pos3_default1", "cap": -2},
                {"vector": "layer_3/contrast_role_pos3_default1"},
            ],
        },
        {"id": "twice", "interventions": [{"vector": "layer_1/contrast_role_pos3_default1", "cap": 1.0}] * 2},
    ],
}


def test_caps_become_ceilings(tmp_path):
    path = save(tmp_path, "capping_config.pt", CAPS)
    caps = read_capping(path)
    assert list(caps) == ["layers_1:3-p0.25", "twice"]
    first, second = caps["layers_1:3-p0.25"]  # an intervention without a cap is left out
    assert (first.site, first.value, second.site, second.value) == (post(1), -7.5, post(2), -2.0)
    np.testing.assert_array_equal(first.vector, -rows(L)[1] - 1)
    found = saved_and_back(import_vectors(path, name="layers_1:3-p0.25"), tmp_path)
    assert found.operation == "ceiling" and found.values == {post(1): -7.5, post(2): -2.0}
    assert "away from the Assistant" in found.sign and found.metadata["experiment"] == "layers_1:3-p0.25"
    assert found.positions == "every"  # the released code caps position 0 too
    (edit,), (told,) = found.edits().edits, found.edits(positions="all").edits
    assert bool(edit.selector.include_first[0]) and not bool(told.selector.include_first[0])
    with pytest.raises(UserError, match="2 capping experiments.*--name"):
        import_vectors(path)
    with pytest.raises(UserError, match="2 caps at 1 sites.*read_capping"):
        import_vectors(path, name="twice")


def test_caps_are_compared_with_the_axis_beside_them(tmp_path):
    path = save(tmp_path, "capping_config.pt", CAPS)
    save(tmp_path, "assistant_axis.pt", rows(L) + 1)
    assert "do point against the axis" in import_vectors(path, name="layers_1:3-p0.25").sign
    save(tmp_path, "assistant_axis.pt", -rows(L) - 1)
    with pytest.raises(UserError, match="points to the Assistant"):
        import_vectors(path, name="layers_1:3-p0.25")


@pytest.mark.parametrize(
    "change",
    [
        {"vectors": {}},
        {"experiments": [{"interventions": []}]},
        {"experiments": 3},
        {"vectors": {"layer_1/contrast_role_pos3_default1": {"layer": 1, "vector": "x"}}},
        {"vectors": {"layer_1/contrast_role_pos3_default1": {"layer": -1, "vector": rows(1)[0]}}},
    ],
)
def test_damaged_capping_files_are_refused(tmp_path, change):
    path = save(tmp_path, "capping_config.pt", CAPS | change)
    for read in (read_capping, lambda p: import_vectors(p, name="layers_1:3-p0.25")):
        with pytest.raises(UserError) as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_refusal_direction_is_at_the_input_of_its_block(tmp_path):
    storage = np.arange(3 * D, dtype=np.float64)
    path = save(tmp_path, "run/direction.pt", View(storage, (D,), (1,), 2 * D))  # a view into mean_diffs, as released
    (tmp_path / "run/direction_metadata.json").write_text(json.dumps({"pos": -2, "layer": 2}))
    for given in (path, path.parent):
        found = saved_and_back(import_vectors(given), tmp_path)
        assert found.sites == ("blocks.2.hook_resid_pre",) and found.arrays[found.sites[0]].dtype == np.float32
        np.testing.assert_array_equal(found.arrays[found.sites[0]], storage[2 * D :])
        assert "towards refusal" in found.sign and "token -2" in found.read_position
    (tmp_path / "run/direction_metadata.json").write_text('{"pos": -2}')
    with pytest.raises(UserError, match="no layer"):
        import_vectors(path)
    assert import_vectors(path, site="hidden_states[3]").sites == ("blocks.3.hook_resid_pre",)


def test_mean_diffs_ask_for_a_position(tmp_path):
    grid = np.arange(3 * L * D, dtype=np.float64).reshape(3, L, D)
    path = save(tmp_path, "generate_directions/mean_diffs.pt", grid)
    with pytest.raises(UserError, match="-3, -2, -1"):
        import_vectors(path)
    found = import_vectors(path, name="-2")
    assert found.sites == tuple(f"blocks.{i}.hook_resid_pre" for i in range(L))
    np.testing.assert_array_equal(found.arrays["blocks.3.hook_resid_pre"], grid[1, 3])
    (tmp_path / "direction_metadata.json").write_text('{"pos": -3, "layer": 1}')
    np.testing.assert_array_equal(import_vectors(path).arrays["blocks.0.hook_resid_pre"], grid[0, 0])


def test_caa_by_file_and_by_folder(tmp_path):
    for i in (3, 1):
        save(tmp_path, f"normalized_vectors/sycophancy/vec_layer_{i}_Llama-2-7b-chat-hf.pt", rows(L)[i])
    folder = tmp_path / "normalized_vectors/sycophancy"
    found = saved_and_back(import_vectors(folder), tmp_path)
    assert found.sites == (post(1), post(3)) and found.model == "Llama-2-7b-chat-hf" and found.metadata["scaled"]
    np.testing.assert_array_equal(found.arrays[post(3)], rows(L)[3])
    one = import_vectors(folder / "vec_layer_3_Llama-2-7b-chat-hf.pt")
    assert one.sites == (post(3),) and "towards the behaviour" in one.sign
    save(tmp_path, "normalized_vectors/sycophancy/vec_layer_1_other.pt", rows(L)[1])
    with pytest.raises(UserError, match="several models.*--name: Llama-2-7b-chat-hf, other"):
        import_vectors(folder)
    assert import_vectors(folder, name="Llama-2-7b-chat-hf").sites == (post(1), post(3))
    assert import_vectors(folder, name="other").sites == (post(1),)
    with pytest.raises(UserError, match="fits no known format"):
        import_vectors(folder, name="absent")
    with pytest.raises(UserError, match="fits no known format: it holds back.safetensors, normalized_vectors"):
        import_vectors(tmp_path)


def svec(tmp_path, **changes):
    data = {
        "model_type": "llama",
        "directions": {str(i): rows(L)[i].tolist() for i in (2, 0)},
        "explained_variances": {"0": 0.5},
    }
    path = tmp_path / "x.svec"
    path.write_text(json.dumps(data | changes))
    return path


def test_svec_of_both_kinds(tmp_path):
    found = saved_and_back(import_vectors(svec(tmp_path)), tmp_path)
    assert found.sites == (post(0), post(2)) and found.source_format == "svec (activation-steering)"
    np.testing.assert_array_equal(found.arrays[post(2)], rows(L)[2])
    assert (
        "adds it at the input of block i" in found.metadata["index_meaning"]
        and "not stated" in found.sign
        and found.model == "llama"
    )
    nested = import_vectors(svec(tmp_path, directions={"1": [rows(L)[1].tolist()]}))
    assert nested.source_format == "svec (AISteer360)" and nested.arrays[post(1)].shape == (D,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"directions": {"1": [[1.0], [2.0]]}}, r"shape \[2, 1\]"),
        ({"directions": {"x": [1.0]}}, "direction 'x'"),
        ({"directions": {"1": [1.0], "01": [2.0]}}, "direction '01'"),
        ({"directions": {"1": [1.0, "a"]}}, "not a list of numbers"),
        ({"directions": {"1": [1.0, [2.0]]}}, "not a list of numbers"),
        ({"directions": {}}, "no .svec"),
        ({"directions": {"1": [float("nan")]}}, "NaN"),
        ({"num_heads": 4, "head_dim": 9}, r"num_heads, head_dim\] = \[4, 9\]"),
        ({"num_heads": 4}, r"num_heads, head_dim"),
    ],
)
def test_other_svec_files_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        import_vectors(svec(tmp_path, **changes))


def test_bare_vectors_need_a_site(tmp_path):
    torch_file, numpy_file = save(tmp_path, "v.pt", rows(1)[0]), tmp_path / "v.npy"
    np.save(numpy_file, rows(1)[0].astype(np.float16))
    for path in (torch_file, numpy_file):
        with pytest.raises(UserError, match=r"\[6\], a bare vector.*--site.*--sign"):
            import_vectors(path)
        found = saved_and_back(import_vectors(path, site="model.layers.2"), tmp_path)
        assert found.sites == (post(2),) and "not stated" in found.sign
        assert import_vectors(path, site="layer_1", sign="towards rudeness").sign == "towards rudeness"
        with pytest.raises(UserError, match="counts from the last layer"):
            import_vectors(path, site="layer_-1")
        with pytest.raises(UserError, match=r"\(heads, H\)"):
            import_vectors(path, site="blocks.1.attn.hook_z")
    heads = save(tmp_path, "h.pt", rows(2))
    assert import_vectors(heads, site="blocks.1.attn.hook_z").arrays["blocks.1.attn.hook_z"].shape == (2, D)
    with pytest.raises(UserError, match=r"\(D,\)"):
        import_vectors(heads, site="layer_1", format="bare")
    boxed = save(tmp_path, "d.pt", {"probe": rows(1)[0], "bias": rows(1)[0][:1]})
    with pytest.raises(UserError, match=r"'probe': float32 \[6\], 'bias': float32 \[1\]"):
        import_vectors(boxed, site="layer_1")
    assert import_vectors(boxed, site="layer_1", name="probe").sites == (post(1),)


def test_ours_and_gguf_pass_through(tmp_path):
    given = Vectors(arrays={post(1): rows(L)[1], post(2): rows(L)[2]}, sign="towards x", model="m")
    ours = save_vectors(given, tmp_path / "ours.bin")  # the contents decide, not the name
    assert import_vectors(ours).sites == given.sites and import_vectors(ours).sign == "towards x"
    assert import_vectors(ours, site=post(2)).sites == (post(2),)
    with pytest.raises(UserError, match=f"no vector at {post(3)}"):
        import_vectors(ours, site=post(3))
    other = write_control_vector(given, tmp_path / "x.bin", model_hint="llama")
    np.testing.assert_array_equal(import_vectors(other).arrays[post(2)], rows(L)[2])
    assert import_vectors(other, sign="s").sign == "s"
    for path in (ours, other):
        with pytest.raises(UserError, match="chooses nothing"):
            import_vectors(path, name="x")
        with pytest.raises(UserError, match="not 'caa'"):
            import_vectors(path, format="caa")


def test_what_fits_nothing_is_described(tmp_path):
    unknown = save(tmp_path, "x.pt", {"weights": rows(2), "steps": [1, 2], "config": {"a": 1}})
    with pytest.raises(UserError, match=r"'weights': float32 \[2, 6\].*'steps': list of length 2.*Known are jaxsteer"):
        import_vectors(unknown)
    with pytest.raises(UserError, match=r"int64 \[2, 2, 2, 2\]"):
        import_vectors(save(tmp_path, "four.pt", np.zeros((2, 2, 2, 2), int)))
    with pytest.raises(UserError, match="no vectors"):
        import_vectors(save(tmp_path, "bool.pt", np.zeros(3, bool)))
    with pytest.raises(UserError, match="NaN"):
        import_vectors(save(tmp_path, "nan.pt", np.float32([1, np.nan])), site="layer_1")
    with pytest.raises(UserError, match="chooses nothing"):
        import_vectors(save(tmp_path, "assistant_axis.pt", rows(2)), name="x")
    with pytest.raises(UserError, match="no file"):
        import_vectors(tmp_path / "absent.pt")
    for name, raw in (("a.npy", b"\x93NUMPY\x01\x00garbage"), ("b", b""), ("c.json", b"{oops"), ("d", b"\x00" * 40)):
        write_bytes(tmp_path / name, raw)
        with pytest.raises(UserError, match=name):
            import_vectors(tmp_path / name)
    np.save(tmp_path / "o.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(UserError, match="o.npy is no readable .npy"):
        import_vectors(tmp_path / "o.npy")


@pytest.mark.parity
def test_files_that_torch_wrote(tmp_path):
    import torch

    torch.save(torch.from_numpy(rows(L + 1)), tmp_path / "evil_response_avg_diff.pt")
    found = import_vectors(tmp_path / "evil_response_avg_diff.pt")
    np.testing.assert_array_equal(found.arrays[post(0)], rows(L + 1)[1])
    torch.save(torch.from_numpy(rows(L))[2].double(), tmp_path / "vec_layer_2_m.pt")
    np.testing.assert_array_equal(import_vectors(tmp_path / "vec_layer_2_m.pt").arrays[post(2)], rows(L)[2])
    config = {
        "vectors": {"a": {"layer": 1, "vector": torch.ones(D).bfloat16()}},
        "experiments": [{"id": "e", "interventions": [{"vector": "a", "cap": torch.tensor(2.0).item()}]}],
    }
    torch.save(config, tmp_path / "capping_config.pt")
    assert import_vectors(tmp_path / "capping_config.pt", name="e").values == {post(1): 2.0}
