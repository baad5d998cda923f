"""Folders of role vectors as the paper's authors publish them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from jaxsteer.axis.released import read_released, write_released
from jaxsteer.errors import UserError
from jaxsteer.steer import import_vectors
from tests.helpers.torchzip import write

L, D, NAMES = 3, 5, ("clerk", "ghost", "oak")
RNG = np.random.default_rng(0)
ROLES, DEFAULT = RNG.standard_normal((len(NAMES), L, D)).astype(np.float32), RNG.standard_normal((L, D)).astype("f4")


@pytest.fixture
def folder(tmp_path):
    """Tensors of the three kinds: raw, in bfloat16, and in the pipeline's dict."""
    place = tmp_path / "gemma"
    (place / "role_vectors").mkdir(parents=True)
    write(place / "default_vector.pt", DEFAULT)
    write(place / "role_vectors" / "clerk.pt", ROLES[0].astype(ml_dtypes.bfloat16))
    write(place / "role_vectors" / "ghost.pt", {"vector": ROLES[1], "type": "pos_3", "role": "ghost"})
    write(place / "role_vectors" / "oak.pt", ROLES[2])
    return place


def test_a_released_folder_gives_its_roles_and_their_axis(folder):
    found = read_released(folder)
    assert found.names == NAMES and found.model == "gemma" and len(found.arrays) == L
    for i, (site, array) in enumerate(found.arrays.items()):
        assert site == f"blocks.{i}.hook_resid_post"
        np.testing.assert_array_equal(array[1:], np.stack([ROLES[1, i], ROLES[2, i], DEFAULT[i]]))
        np.testing.assert_allclose(array[0], ROLES[0, i], rtol=2**-8)
        assert np.isnan(found.errors[site]).all()
    ghost = found.vectors("ghost")
    np.testing.assert_array_equal(ghost.arrays["blocks.2.hook_resid_post"], ROLES[1, 2] - DEFAULT[2])


def test_what_is_written_is_read_again_with_the_axis_beside_it(folder, tmp_path):
    found = read_released(folder)
    back = read_released(write_released(found, tmp_path / "out" / "gemma"))
    assert back.names == found.names and back.model == found.model
    axis = import_vectors(tmp_path / "out" / "gemma" / "assistant_axis.pt")
    assert "towards the Assistant" in axis.sign
    for site, array in found.arrays.items():
        np.testing.assert_array_equal(back.arrays[site], array)
        exact = array[-1].astype(np.float64) - array[:-1].astype(np.float64).mean(0)
        np.testing.assert_allclose(axis.arrays[site], exact, atol=1e-6)


def test_a_folder_with_a_fault_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"has 0 files role_vectors/<role>.pt"):
        read_released(tmp_path)
    write(folder / "role_vectors" / "ghost.pt", ROLES[1, :, :4])
    with pytest.raises(
        UserError, match=r"ghost.pt has 3 blocks of width 4, and default_vector.pt beside it 3 blocks of width 5"
    ):
        read_released(folder)
    (folder / "default_vector.pt").unlink()
    with pytest.raises(UserError, match="there is no file.*default_vector.pt"):
        read_released(folder)
