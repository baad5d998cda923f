"""Files of torch written without torch."""

from pathlib import Path

import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.files import read_torch
from jaxsteer.files.torchwrite import write_torch

ARRAY = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)


def test_what_is_written_is_read_and_is_the_same_every_time(tmp_path: Path) -> None:
    for name, array in (("a.pt", ARRAY), ("b.pt", ARRAY[:, 1:3]), ("c.pt", ARRAY[0])):
        write_torch(tmp_path / name, array)
        np.testing.assert_array_equal(read_torch(tmp_path / name), array)
    first = (tmp_path / "a.pt").read_bytes()
    write_torch(tmp_path / "a.pt", ARRAY)
    assert (tmp_path / "a.pt").read_bytes() == first


NESTED = {
    "vectors": {"layer_1/über": {"vector": ARRAY[0], "layer": 1}, "b": {"vector": ARRAY[1], "layer": 70000}},
    "experiments": [{"id": "e", "interventions": [{"vector": "b", "cap": -1.828125}]}, {}],
    "rest": [None, True, False, -5, 1e300, [], ""],
}


def same(found: object, wanted: object) -> None:
    """Containers, types and numbers are equal, to the bit."""
    if isinstance(wanted, np.ndarray):
        np.testing.assert_array_equal(found, wanted)
    elif isinstance(wanted, dict):
        assert isinstance(found, dict) and list(found) == list(wanted)
        for key, value in wanted.items():
            same(found[key], value)
    elif isinstance(wanted, list):
        assert isinstance(found, list) and len(found) == len(wanted)
        for a, b in zip(found, wanted):
            same(a, b)
    else:
        assert found == wanted and type(found) is type(wanted)


def test_tensors_in_dicts_and_lists_come_back(tmp_path: Path) -> None:
    write_torch(tmp_path / "a.pt", NESTED)
    same(read_torch(tmp_path / "a.pt"), NESTED)
    first = (tmp_path / "a.pt").read_bytes()
    write_torch(tmp_path / "a.pt", NESTED)
    assert (tmp_path / "a.pt").read_bytes() == first


@pytest.mark.parametrize("value", [{"a": {1, 2}}, [2**31], b"bytes"])
def test_what_no_such_file_holds_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        write_torch(tmp_path / "a.pt", value)  # type: ignore[arg-type]
    assert not (tmp_path / "a.pt").exists()


@pytest.mark.parity
def test_torch_reads_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    write_torch(tmp_path / "a.pt", ARRAY)
    np.testing.assert_array_equal(torch.load(tmp_path / "a.pt", weights_only=True).numpy(), ARRAY)
    write_torch(tmp_path / "b.pt", NESTED)
    found = torch.load(tmp_path / "b.pt", weights_only=True)
    for name in ("layer_1/über", "b"):
        found["vectors"][name]["vector"] = found["vectors"][name]["vector"].numpy()
    same(found, NESTED)
