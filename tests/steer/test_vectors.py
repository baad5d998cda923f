"""Vector files: round trips, what is refused, steering by a file, and persona directions as vectors."""

import dataclasses
import inspect
import json
import logging
import os

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxsteer import capture
from jaxsteer.errors import UserError
from jaxsteer.files.paths import user_path
from jaxsteer.personas import Direction, load_direction, save_direction
from jaxsteer.personas.signatures import load_signature
from jaxsteer.prompts.soft import load_soft
from jaxsteer.steer import add, ceiling
from jaxsteer.steer.vectors import Vectors, check_vectors, load_vectors, random_controls, save_vectors
from tests.helpers.tiny import tiny_model

STREAM, OTHER, HEADS = "blocks.1.hook_resid_post", "blocks.0.hook_resid_post", "blocks.1.attn.hook_z"


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def row(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def made_on(model, **changes):
    config = model.config
    arrays = {
        STREAM: row(config.d_model),
        HEADS: row(config.n_heads, config.d_head, seed=1),
        OTHER: row(config.d_model, seed=2),
    }
    return Vectors(**{"arrays": arrays, "model": model.name, "fingerprint": model.fingerprint} | changes)


def same(a, b):
    assert a.sites == b.sites
    for site in a.sites:
        np.testing.assert_array_equal(a.arrays[site], b.arrays[site])
    for field in dataclasses.fields(a):
        if field.name not in ("arrays", "mean_resid_norm"):
            assert getattr(a, field.name) == getattr(b, field.name), field.name
    assert a.mean_resid_norm == pytest.approx(b.mean_resid_norm)


def test_files_come_back_as_they_were(tmp_path, model):
    given = made_on(
        model,
        coefficient=-0.1,
        coefficient_units="mean_resid_norm",
        mean_resid_norm={STREAM: 3.25},
        sign="towards x",
        read_position="last",
        source_format="caa",
        metadata={"recipe": "é", "n": "3"},
    )
    path = save_vectors(given, tmp_path / "new" / "v.safetensors")
    assert [p.name for p in path.parent.iterdir()] == ["v.safetensors"]
    same(load_vectors(path, model=model), given)
    capped = made_on(model, operation="ceiling", values={STREAM: 1.5, HEADS: 0.1, OTHER: -2.0})
    same(load_vectors(save_vectors(capped, path)), capped)
    same(
        capped.at("layer_1"),
        dataclasses.replace(capped, arrays={STREAM: row(model.config.d_model)}, values={STREAM: 1.5}),
    )


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    coefficient=st.floats(allow_nan=False, allow_infinity=False),
    texts=st.dictionaries(st.text(min_size=1, max_size=8), st.text(max_size=20), max_size=4),
    sign=st.text(max_size=30),
)
def test_any_text_and_coefficient_come_back(tmp_path, coefficient, texts, sign):
    given = Vectors(arrays={STREAM: row(3)}, coefficient=coefficient, sign=sign, metadata=texts)
    same(load_vectors(save_vectors(given, tmp_path / "v.safetensors")), given)


def test_a_file_of_the_first_kind_is_still_read(tmp_path):
    """Written by hand as jaxsteer 0.1 wrote directions, with nothing but what it knew."""
    tensors = {STREAM: row(4), OTHER: row(4, seed=1), f"mean_resid_norm/{STREAM}": np.asarray(2.5, np.float32)}
    metadata = {
        "format": "jaxsteer.direction/1",
        "sites": json.dumps([STREAM, OTHER]),
        "read_position": "decision",
        "n_pairs": "7",
        "diagnostics": json.dumps({STREAM: {"norm": 1.0}}),
        "model": "m",
        "fingerprint": "f",
        "sign": "matching→not matching",
        "units": "residual stream, raw difference of means",
        "persona": "sycophancy",
    }
    save_file(tensors, tmp_path / "d.safetensors", metadata)
    found = load_vectors(tmp_path / "d.safetensors")
    assert found.sites == (STREAM, OTHER) and found.operation == "add" and found.coefficient == 1.0
    assert found.mean_resid_norm == {STREAM: 2.5} and found.sign == "matching→not matching"
    assert found.source_format == "" and found.metadata["persona"] == "sycophancy"
    direction = load_direction(tmp_path / "d.safetensors")
    assert direction.n == 7 and direction.diagnostics == {STREAM: {"norm": 1.0}}
    assert direction.metadata["persona"] == "sycophancy" and direction.metadata["model"] == "m"
    again = save_direction(direction, tmp_path / "again.safetensors")
    old, new = (load_file(p) for p in (tmp_path / "d.safetensors", again))
    assert old.keys() == new.keys() and all((old[k] == new[k]).all() for k in old)
    back = load_direction(again)
    assert back.metadata == direction.metadata and back.sites == direction.sites


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coefficient": np.nan}, "coefficient must be a finite number"),
        ({"coefficient": np.inf}, "coefficient must be a finite number"),
        ({"mean_resid_norm": {STREAM: np.nan}}, "mean norm of the stream at blocks.1.* above 0, got nan"),
        ({"mean_resid_norm": {STREAM: 0.0}}, "above 0"),
        ({"operation": "ceiling", "values": {STREAM: np.inf}}, "value of ceiling at blocks.1.* finite"),
        ({"arrays": {STREAM: np.asarray([1, np.inf], np.float32)}}, "NaN or infinite entries"),
        ({"positions": "somewhere"}, "positions 'somewhere' is not known"),
    ],
)
def test_numbers_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        Vectors(**({"arrays": {STREAM: row(2)}} | changes))


def test_vectors_of_zeros_are_left_out_where_that_changes_nothing(caplog):
    arrays = {STREAM: row(4), OTHER: np.zeros(4, np.float32)}
    vectors = Vectors(arrays=arrays, mean_resid_norm={STREAM: 1.0, OTHER: 1.0})
    (one,) = vectors.edits().edits
    equal(one, add([STREAM], row(4)[None], 1.0))
    assert f"vectors of zeros are left out: {OTHER}" in caplog.text
    for doubtful in (
        dataclasses.replace(vectors, operation="ablate"),
        dataclasses.replace(vectors, coefficient_units="mean_resid_norm"),
        vectors.at(OTHER),
    ):
        with pytest.raises(UserError, match=f"the vector at {OTHER} is zero: .*--steer-sites"):
            doubtful.edits()


def test_directions_are_vectors_but_not_all_vectors_are_directions(tmp_path):
    direction = Direction(
        delta={STREAM: row(4)}, mean_resid_norm={STREAM: 2.0}, n=3, read_position="matched", metadata={"persona": "p"}
    )
    path = save_direction(direction, tmp_path / "d.safetensors")
    found = load_vectors(path)
    assert found.metadata["persona"] == "p" and found.read_position == "matched"
    foreign = save_vectors(Vectors(arrays={STREAM: row(4)}, source_format="caa"), tmp_path / "v.safetensors")
    with pytest.raises(UserError, match="another origin .caa.*load_vectors"):
        load_direction(foreign)


def test_files_that_are_not_ours_or_damaged_are_refused(tmp_path):
    path = tmp_path / "v.safetensors"
    with pytest.raises(UserError, match="there is no"):
        load_vectors(path)
    good = {"format": "jaxsteer.direction/1", "sites": json.dumps([STREAM])}

    def fails(tensors, metadata, message):
        save_file(tensors, path, metadata)
        with pytest.raises(UserError, match=message) as caught:
            load_vectors(path)
        assert str(path) in str(caught.value)

    tensors = {STREAM: row(4)}
    fails(tensors, {"format": "other"}, "format 'other'")
    fails(tensors, {"format": good["format"]}, "damaged.*no entry 'sites'")
    fails({OTHER: row(4)}, good, f"damaged.*no tensor '{STREAM}'")
    fails(tensors, good | {"sites": "3"}, "damaged.*sites must be a list of names, got 3")
    fails(tensors, good | {"sites": json.dumps([STREAM] * 2)}, f"damaged.*'{STREAM}' twice")
    fails(tensors | {"x": row(4)}, good, "damaged.*'x' belongs to no site")
    fails(tensors | {f"mean_resid_norm/{STREAM}": row(2)}, good, "damaged.*mean_resid_norm.*must be one number")
    for odd in ("blocks.01.hook_resid_post", "blocks.\u0661.hook_resid_post"):
        fails({odd: row(4)}, good | {"sites": json.dumps([odd])}, f"damaged.*'{odd}' is not the name of a site")
    fails(tensors, good | {"operation": "twist"}, "damaged.*'twist'")
    fails(tensors, good | {"operation": "ceiling"}, "damaged.*takes a value at")
    fails(tensors, good | {"operation": "ceiling", "values": "[]"}, "damaged.*an object of numbers by site, got")
    for odd, kind in (('"5"', "a string"), ("true", "true"), ("null", "null")):
        values = {"operation": "ceiling", "values": f'{{"{STREAM}": {odd}}}'}
        fails(tensors, good | values, f"damaged.*the value at {STREAM} must be a number, got {kind}")
    for odd in ("1_0", "\u0661", "true", '"1"'):
        fails(tensors, good | {"coefficient": odd}, "damaged.*coefficient")
    fails(tensors, good | {"values": json.dumps({STREAM: 1.0})}, "damaged.*takes a value at no site")
    fails(tensors, good | {"coefficient": "much"}, "damaged.*much")
    fails(tensors, good | {"coefficient_units": "cubits"}, "damaged.*cubits")
    fails({STREAM: row(4).astype(np.float64)}, good, "damaged.*float64")
    fails({STREAM: np.float32([1, np.inf])}, good, "damaged.*NaN or infinite")


@pytest.mark.parametrize("load", [load_vectors, load_signature, load_soft])
@pytest.mark.parametrize(("dtype", "size"), [("F8_E4M3", 4), ("F4", 2), ("F6_E2M3", 3)])
def test_dtypes_that_numpy_does_not_have_are_named(tmp_path, load, dtype, size):
    header = json.dumps({"a": {"dtype": dtype, "shape": [4], "data_offsets": [0, size]}}).encode()
    (tmp_path / "v").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises(UserError, match=f"tensor 'a' has dtype {dtype}"):
        load(tmp_path / "v")


@pytest.mark.parametrize("load", [load_vectors, load_signature, load_soft])
def test_what_is_no_regular_file(tmp_path, load):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe", tmp_path):
        with pytest.raises(UserError, match=f"{path} is no regular file"):
            load(path)
    with pytest.raises(UserError, match="a path was expected, got None"):
        inspect.unwrap(user_path)(None)  # without the check of types that tests have


def test_vectors_that_do_not_fit_together_are_refused():
    with pytest.raises(UserError, match="metadata may not use the keys format, sign"):
        Vectors(arrays={STREAM: row(3)}, metadata={"sign": "x", "format": "y"})
    with pytest.raises(UserError, match=r"float32 \(1, 1, 3\)"):
        Vectors(arrays={STREAM: row(1, 1, 3)})
    with pytest.raises(UserError, match="counts from the last layer"):
        Vectors(arrays={STREAM: row(3)}).at("blocks.-1.hook_resid_post")


def test_vectors_of_another_model_are_refused(tmp_path, model, caplog):
    vectors = made_on(model)
    path = save_vectors(vectors, tmp_path / "v.safetensors")
    narrow = dataclasses.replace(model, config=dataclasses.replace(model.config, d_model=48))
    with pytest.raises(UserError, match=f"blocks.1.hook_resid_post has shape .*width 48.*{model.name}"):
        load_vectors(path, model=narrow)
    heads = dataclasses.replace(model, config=dataclasses.replace(model.config, n_heads=64))
    with pytest.raises(UserError, match=r"hook_z has shape .*the shape \(64, "):
        load_vectors(path, model=heads)
    with pytest.raises(UserError, match="beyond the last layer"):
        check_vectors(Vectors(arrays={"blocks.9.hook_resid_post": row(model.config.d_model)}), model)
    with pytest.raises(UserError, match="numbers for keys"):
        check_vectors(Vectors(arrays={"blocks.1.attn.hook_pattern": row(model.config.d_model)}), model)
    other = dataclasses.replace(model, fingerprint="1" * 64)
    with pytest.raises(UserError, match="any_weights=True"):
        load_vectors(path, model=other)
    with caplog.at_level(logging.WARNING):
        check_vectors(vectors, model)
        assert not caplog.text
        load_vectors(path, model=other, any_weights=True)
    assert f"made on {model.name}" in caplog.text
    caplog.clear()
    check_vectors(dataclasses.replace(vectors, fingerprint="", model=""), model)
    assert "made on an unknown model (weights unknown)" in caplog.text


def equal(a, b):
    leaves, others = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(leaves) == len(others)
    for x, y in zip(leaves, others, strict=True):
        np.testing.assert_array_equal(x, y)


def test_steering_by_a_file(model):
    """The edits are those that the constructors make from the same numbers."""
    vectors = made_on(model, coefficient=2.0)
    in_stream, in_heads = vectors.edits(positions="response").edits
    arrays = vectors.arrays
    both = np.stack([arrays[STREAM], arrays[OTHER]])
    equal(in_stream, add([STREAM, OTHER], both, 2.0, positions="response"))
    equal(in_heads, add([HEADS], arrays[HEADS][None], 2.0, positions="response"))
    (one,) = vectors.at(STREAM).edits(coefficient=-1.0).edits
    equal(one, add([STREAM], arrays[STREAM][None], -1.0))
    in_norms = dataclasses.replace(vectors, coefficient_units="mean_resid_norm", mean_resid_norm={STREAM: 5.0})
    (one,) = in_norms.at(STREAM).edits().edits
    equal(one, add([STREAM], arrays[STREAM][None], 2.0, mean_norm=5.0))
    with pytest.raises(UserError, match="does not hold at blocks.0"):
        in_norms.edits()
    capped = dataclasses.replace(vectors.at(STREAM), operation="ceiling", values={STREAM: -0.5})
    (one,) = capped.edits(positions=slice(0, None)).edits
    equal(one, ceiling([STREAM], arrays[STREAM][None], -0.5, positions=slice(0, None)))
    assert (
        one.operation == "ceiling"
        and dataclasses.replace(capped, operation="floor").edits().edits[0].operation == "floor"
    )
    (gone,) = dataclasses.replace(vectors.at(STREAM), operation="ablate").edits(coefficient=1.0).edits
    assert gone.operation == "ablate" and float(gone.amount[0, 0]) == 1.0


def test_a_file_that_keeps_the_norm(tmp_path, model):
    vectors = made_on(model, operation="add_keep_norm", coefficient=2.0).at(STREAM)
    edits = load_vectors(save_vectors(vectors, tmp_path / "norm.safetensors"), model=model).edits()
    tokens = np.asarray([[1, 40, 41, 42]])
    found, plain = (np.asarray(capture(model, tokens, [STREAM], edits=e)[STREAM][0]) for e in (edits, None))
    moved = plain + 2.0 * vectors.arrays[STREAM]
    expected = moved * np.linalg.norm(plain, axis=-1, keepdims=True) / np.linalg.norm(moved, axis=-1, keepdims=True)
    np.testing.assert_allclose(found[1:], expected[1:], atol=1e-5)


def test_vectors_of_another_family(model):
    arrays = {STREAM: row(model.config.d_model)}
    for family, refused in (("gemma3_text", True), ("qwen2", True), ("Llama", False), ("mamba", False), ("", False)):
        vectors = Vectors(arrays=arrays, metadata={"family": family} if family else {})
        check_vectors(vectors, model, any_weights=True)
        if refused:
            with pytest.raises(UserError, match=f"family {family.removesuffix('_text')}.*is of llama"):
                check_vectors(vectors, model)
        else:
            check_vectors(vectors, model)


def test_random_controls_have_the_norms_and_the_form_of_the_vectors(model) -> None:
    given = made_on(model, coefficient=-0.5, positions="last")
    first, second = random_controls(given, 2, seed=3)
    for one in (first, second):
        assert one.sites == given.sites and (one.coefficient, one.positions) == (-0.5, "last")
        assert [one.norm(site) for site in one.sites] == pytest.approx([given.norm(site) for site in given.sites])
        assert jax.tree.structure(one.edits()) == jax.tree.structure(given.edits())
        unit = [v.arrays[STREAM] / v.norm(STREAM) for v in (one, given)]
        assert abs(unit[0] @ unit[1]) < 0.6
    assert np.abs(first.arrays[STREAM] - second.arrays[STREAM]).max() > 0.1
    same(first, random_controls(given, 1, seed=3)[0])
    with pytest.raises(UserError, match="floor has no random control"):
        random_controls(made_on(model, operation="floor", values=dict.fromkeys(given.sites, 0.0)))


def test_what_vectors_are_is_said_in_a_line() -> None:
    arrays = {f"blocks.{layer}.hook_resid_post": np.ones(8, np.float32) for layer in range(4)}
    said = repr(Vectors(arrays=arrays, coefficient=0.3, coefficient_units="mean_resid_norm", model="some/model"))
    assert said == (
        "Vectors(add at 4 sites: blocks.0.hook_resid_post, ..., blocks.3.hook_resid_post; size 8; coefficient 0.3 mean "
        "norms of the stream, made on some/model)"
    )
