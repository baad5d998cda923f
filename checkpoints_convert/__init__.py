"""Hugging Face checkpoints to sharded Orbax checkpoints, streaming; and back."""

from checkpoints_convert.export import write_hf
from checkpoints_convert.streaming import convert

__all__ = ["convert", "write_hf"]
