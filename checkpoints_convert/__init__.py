"""Hugging Face checkpoints to sharded checkpoints (Zarr arrays, by TensorStore), streaming; and back."""

from checkpoints_convert.export import write_hf
from checkpoints_convert.streaming import convert
from checkpoints_convert.verify import report, verify

__all__ = ["convert", "report", "verify", "write_hf"]
