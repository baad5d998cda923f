"""Vectors in a line, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxsteer.steer.vectors import Vectors


def summary(vectors: Vectors) -> str:
    """What the vectors are: operation, sites, sizes, strength, the model that they were made on."""
    sites = list(vectors.arrays)
    shown = ", ".join(sites if len(sites) <= 2 else (sites[0], "...", sites[-1]))
    sizes = sorted({" x ".join(map(str, array.shape)) for array in vectors.arrays.values()})
    units = "mean norms of the stream" if vectors.coefficient_units == "mean_resid_norm" else "times the vector"
    made = f", made on {vectors.model}" if vectors.model else ""
    gate = ", behind a gate" if vectors.gate is not None else ""
    return (
        f"Vectors({vectors.operation} at {len(sites)} sites: {shown}; size {' and '.join(sizes)}; coefficient "
        f"{vectors.coefficient:g} {units}{made}{gate})"
    )
