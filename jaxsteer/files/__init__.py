"""Files, for every room: written whole or not at all, and those of torch read without torch and without risk."""

from jaxsteer.files.json_files import read_json
from jaxsteer.files.torchfile import TORCH_ADVICE, describe, read_torch
from jaxsteer.files.whole import write_bytes, write_text

__all__ = ["TORCH_ADVICE", "describe", "read_json", "read_torch", "write_bytes", "write_text"]
