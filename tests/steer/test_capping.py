"""Caps along the assistant axis: the sign of published ones, floors and ceilings, files out and in."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxsteer import steer
from jaxsteer.errors import UserError
from jaxsteer.files import read_torch
from jaxsteer.models.taps import make_where
from jaxsteer.steer import Vectors, check_caps, import_vectors, write_by_block, write_capping
from tests.helpers.torchzip import write

PUBLISHED = dict(
    zip(
        range(32, 56),
        [
            -1.234375, -1.5703125, -2.21875, -1.703125, -1.796875, -1.7421875, -1.765625, -1.5078125, -1.875,
            -1.6640625, -1.6015625, -1.46875, -1.6875, -1.875, -1.8984375, -1.859375, -1.9140625, -1.9140625,
            -1.8203125, -1.921875, -1.9765625, -1.828125, -1.59375, -1.984375,
        ],
        strict=True,
    )
)  # fmt: skip
"""Caps by block that Neuronpedia's preset ``assistant-cap`` has for Llama-3.3-70B-Instruct, as ceilings."""
L, D = 80, 16
EXPERIMENT = "layers_32:56-p0.25"
SITE = "blocks.0.hook_resid_post"
ALL = dict(positions=slice(0, None))


def post(i: int) -> str:
    return f"blocks.{i}.hook_resid_post"


def apply(edits, value, layer=0):
    """What becomes of values [B, T, D] at the output of a block, in their dtype."""
    rows, length = value.shape[:2]
    where = make_where(jnp.ones((rows, length), jnp.int32), jnp.arange(length)[None], None)
    return np.asarray(edits.tap(where)("hook_resid_post", layer, jnp.asarray(value)))


@pytest.fixture
def axis() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((L, D)).astype(np.float32)


@pytest.fixture
def released(tmp_path, axis):
    """A folder with the published caps on synthetic vectors: role minus default, with noise across the axis."""
    noise = np.random.default_rng(1).standard_normal((L, D)) * 0.2
    stored = {
        f"layer_{i}/contrast_role_pos3_default1": {"vector": (noise[i] - axis[i]).astype(np.float32), "layer": i}
        for i in range(L)
    }
    items = [{"vector": f"layer_{i}/contrast_role_pos3_default1", "cap": cap} for i, cap in PUBLISHED.items()]
    write(tmp_path / "assistant_axis.pt", axis.astype(ml_dtypes.bfloat16))
    path = tmp_path / "capping_config.pt"
    write(path, {"vectors": stored, "experiments": [{"id": EXPERIMENT, "interventions": items}]})
    return path


def test_published_caps_are_ceilings_in_24_blocks(released, axis):
    found = import_vectors(released, name=EXPERIMENT)
    assert found.operation == "ceiling" and found.sites == tuple(post(i) for i in range(32, 56))
    assert found.values == {post(i): cap for i, cap in PUBLISHED.items()}
    assert max(found.values.values()) < 0 and "do point against the axis" in found.sign
    assert all(vector @ axis[int(site.split(".")[1])] < 0 for site, vector in found.arrays.items())


def test_published_caps_on_the_axis_itself_are_refused(released, axis):
    write(released.parent / "assistant_axis.pt", -axis)
    with pytest.raises(UserError, match="would push the model away from the Assistant") as error:
        import_vectors(released, name=EXPERIMENT)
    assert str(released) in str(error.value) and post(32) in str(error.value)


def test_an_axis_of_another_width_or_depth_is_refused(released, axis):
    write(released.parent / "assistant_axis.pt", axis[:, :8])
    with pytest.raises(UserError, match=r"shape \(8,\), and the cap \(16,\)"):
        import_vectors(released, name=EXPERIMENT)
    write(released.parent / "assistant_axis.pt", axis[:40])
    with pytest.raises(UserError, match="there is no vector at blocks.40"):
        import_vectors(released, name=EXPERIMENT)


def one(operation: str, vector: np.ndarray, value: float | None = 1.0) -> Vectors:
    values = {} if value is None else {SITE: value}
    return Vectors(arrays={SITE: vector.astype(np.float32)}, operation=operation, values=values)


@pytest.mark.parametrize(("operation", "sign"), [("floor", 1), ("ceiling", -1)])
def test_the_sign_of_a_cap_is_compared_with_the_axis(axis, operation, sign):
    towards = one("add", axis[0], None)
    check_caps(one(operation, sign * axis[0]), towards)
    with pytest.raises(UserError, match="away from the Assistant"):
        check_caps(one(operation, -sign * axis[0]), towards)
    with pytest.raises(UserError, match="no floor and no ceiling"):
        check_caps(towards, towards)


def test_floor_and_ceiling_of_the_negative_are_the_same_to_the_bit():
    rng = np.random.default_rng(2)
    for _ in range(20):
        value, vector, number = rng.normal(0, 3, (4, 6, 8)).astype(np.float32), rng.standard_normal(8) * 5, rng.normal()
        floor = apply(steer.floor(SITE, vector, number, **ALL), value)
        assert np.array_equal(floor, apply(steer.ceiling(SITE, -vector, -number, **ALL), value))
        assert (floor != value).any() and (floor == value).any()


def test_a_cap_leaves_what_is_across_it_and_changes_nothing_the_second_time():
    rng = np.random.default_rng(3)
    value, vector = rng.normal(0, 3, (4, 6, 64)).astype(np.float32), rng.standard_normal(64) * 5
    unit = vector / np.linalg.norm(vector)
    across = lambda x: x - (x @ unit)[..., None] * unit  # noqa: E731
    for cap, side in ((steer.floor, 1), (steer.ceiling, -1)):
        once = apply(cap(SITE, vector, 0.5, **ALL), value)
        assert np.abs(across(once) - across(value)).max() <= 1e-6
        assert (side * (once @ unit - 0.5)).min() >= -1e-6
        np.testing.assert_allclose(apply(cap(SITE, vector, 0.5, **ALL), once), once, rtol=0, atol=1e-6)


def test_a_ceiling_holds_in_bfloat16_up_to_the_rounding_of_the_stream():
    """The edit itself keeps the bound; what is left is one rounding of every entry to 8 bits."""
    rng = np.random.default_rng(4)
    value = jnp.asarray(rng.normal(0, 1, (4, 6, 64)), jnp.bfloat16)
    unit = rng.standard_normal(64)
    unit /= np.linalg.norm(unit)
    cap = -1.828125
    exact = np.asarray(value, np.float32)
    held = np.asarray(apply(steer.ceiling(SITE, unit, cap, **ALL), value), np.float32)
    projected = held.astype(np.float64) @ unit
    rounding = (np.abs(held) * 2.0**-8) @ np.abs(unit)
    assert (projected <= cap + 1e-4 * abs(cap) + rounding).all()
    assert projected.mean() == pytest.approx(cap, abs=0.02) and (exact @ unit > cap).mean() > 0.9


def test_caps_go_out_as_ceilings_and_come_back(tmp_path, axis):
    arrays = {post(i): axis[i] for i in (3, 4)}
    floors = Vectors(arrays=arrays, operation="floor", values={post(3): 1.5, post(4): -0.25})
    lower = Vectors(arrays=arrays, operation="floor", values={post(3): 0.5, post(4): 0.0})
    other = Vectors(arrays={post(3): -axis[5]}, operation="ceiling", values={post(3): -2.0})
    path = write_capping({"layers_3:5-p0.25": floors, "p0.01": lower, "other": other}, tmp_path / "capping_config.pt")
    assert len(read_torch(path)["vectors"]) == 3  # two experiments share theirs
    write_by_block(Vectors(arrays={post(i): axis[i] for i in range(L)}), tmp_path / "assistant_axis.pt")
    found = import_vectors(path, name="layers_3:5-p0.25")
    assert found.operation == "ceiling" and found.values == {post(3): -1.5, post(4): 0.25}
    assert found.sites == floors.sites and "do point against the axis" in found.sign
    value = np.random.default_rng(5).normal(0, 3, (2, 3, D)).astype(np.float32)
    for i in (3, 4):
        here = apply(floors.edits(positions="every"), value, i)
        assert np.array_equal(here, apply(found.edits(), value, i)) and (here != value).any()
    assert list(import_vectors(path, name="p0.01").values.values()) == [-0.5, 0.0]
    (tmp_path / "assistant_axis.pt").unlink()  # the third lies along another row of it
    np.testing.assert_array_equal(import_vectors(path, name="other").arrays[post(3)], -axis[5])


def test_an_axis_and_a_role_go_out_and_come_back(tmp_path, axis):
    vectors = Vectors(arrays={post(i): axis[i] for i in reversed(range(L))}, coefficient=0.1)
    back = import_vectors(write_by_block(vectors, tmp_path / "assistant_axis.pt"))
    assert back.sites == tuple(post(i) for i in range(L)) and "towards the Assistant" in back.sign
    assert all(np.array_equal(back.arrays[post(i)], axis[i]) for i in range(L)) and back.coefficient == 1
    role = import_vectors(write_by_block(vectors, tmp_path / "role_vectors" / "ghost.pt", role="ghost"))
    assert role.metadata["role"] == "ghost" and role.metadata["type"] == "pos_3" and "'ghost'" in role.sign
    assert all(np.array_equal(role.arrays[post(i)], axis[i]) for i in range(L))
    default = read_torch(write_by_block(vectors, tmp_path / "d.pt", role="default"))
    assert default["type"] == "mean"


def test_what_the_formats_do_not_hold_is_refused(tmp_path, axis):
    out = tmp_path / "x.pt"
    with pytest.raises(UserError, match="no vector at the output of block 0"):
        write_by_block(Vectors(arrays={post(1): axis[1]}), out)
    with pytest.raises(UserError, match="is 'floor'"):
        write_by_block(one("floor", axis[0]), out)
    with pytest.raises(UserError, match="not at blocks.1.hook_resid_pre"):
        write_by_block(Vectors(arrays={"blocks.1.hook_resid_pre": axis[1]}), out)
    with pytest.raises(UserError, match="e: a capping configuration holds floors and ceilings.*'clamp'"):
        write_capping({"e": one("clamp", axis[0])}, out)
    assert not out.exists()
