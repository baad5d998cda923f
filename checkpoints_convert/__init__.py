"""Hugging Face checkpoints to sharded Orbax checkpoints, streaming; and back."""

from checkpoints_convert.convert import convert
from checkpoints_convert.export import write_hf

__all__ = ["convert", "write_hf"]
