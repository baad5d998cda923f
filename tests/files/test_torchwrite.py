"""Files of torch written without torch."""

from pathlib import Path

import numpy as np
import pytest

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


@pytest.mark.parity
def test_torch_reads_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    write_torch(tmp_path / "a.pt", ARRAY)
    np.testing.assert_array_equal(torch.load(tmp_path / "a.pt", weights_only=True).numpy(), ARRAY)
