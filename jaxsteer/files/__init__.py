"""Files, for every room: JSON and text, files written whole or not at all, those of torch read without torch."""

from jaxsteer.files.json_files import (
    check_surrogates,
    csv_records,
    decoded,
    json_lines,
    json_records,
    kind_of,
    parse_json,
    read_json,
    read_json_lines,
    read_log,
    read_text,
)
from jaxsteer.files.tensors import read_tensors, tensor_bytes
from jaxsteer.files.torchfile import TORCH_ADVICE, describe, read_torch
from jaxsteer.files.whole import append_text, make_directory, reading, write_bytes, write_text, writing

__all__ = [
    "TORCH_ADVICE",
    "append_text",
    "check_surrogates",
    "csv_records",
    "decoded",
    "describe",
    "json_lines",
    "json_records",
    "kind_of",
    "make_directory",
    "parse_json",
    "read_json",
    "read_json_lines",
    "read_log",
    "read_tensors",
    "read_text",
    "read_torch",
    "tensor_bytes",
    "reading",
    "write_bytes",
    "write_text",
    "writing",
]
