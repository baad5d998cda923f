"""Rows of ids as arrays of few shapes."""

from __future__ import annotations

import numpy as np

from jaxsteer.models.padding import bucket, pad_rows


def test_buckets_are_few_and_never_too_small() -> None:
    assert [bucket(n) for n in (1, 16, 17, 25, 33, 49, 65, 97, 128)] == [16, 16, 24, 32, 48, 64, 96, 128, 128]
    assert all(n <= bucket(n) < 1.5 * n for n in range(17, 3000))
    assert len({bucket(n, 8) for n in range(1, 1025)}) == 15


def test_rows_are_padded_on_either_side() -> None:
    rows = [np.asarray([5, 6, 7]), np.zeros(0, np.int32), np.asarray([8])]
    ids, mask = pad_rows(rows)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 0], [8, 0, 0]] and ids.dtype == np.int32
    assert mask.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    ids, mask = pad_rows(rows, 4, left=True)
    assert ids.tolist() == [[0, 5, 6, 7], [0] * 4, [0, 0, 0, 8]] and mask.sum(-1).tolist() == [3, 0, 1]
    assert pad_rows([])[0].shape == (0, 0)
