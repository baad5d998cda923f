"""Files that are almost right: bytes, JSON and headers changed at random, as damage and malice change them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 1e-300, 1e300, 2**31, 2**63, 10**12, 10**30, 10**299, float("nan"),
    float("inf"), "", " ", "5", "relu", "x" * 300, "../../etc/passwd", "~nobody", "a\0b", "\ud800", "\u2028", "{}",
    "blocks.0.hook_resid_post", "blocks.-1.hook_resid_post", "int99", "nan", [], [[]], [0], [1, "a", None], {},
    {"a": 1}, [10**12] * 3,
)  # fmt: skip
BYTES = (b"\x00", b"\xff", b"\x80", b"\n", b"\r", b'"', b"{", b"}", b"[", b"\xff" * 8, bytes(8), b"\xef\xbb\xbf")
STATEMENTS = (
    "{% for i in range(10**9) %}{{ i }}{% endfor %}", "{{ 'x' * 10**9 }}", "{{ messages.__class__.__mro__ }}",
    "{{ a.b }}", "{% include 'x' %}", "{{ raise_exception('no') }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ '\\ud800' }}", "{%", "{{ 1 / 0 }}", "{{ messages | tojson }}", "{% for m in messages %}", "{{ 10**10**8 }}",
    "{{ none + 1 }}",
)  # fmt: skip
"""What a chat template may hold."""
DEEP = "[" * 500 + "]" * 500


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside of a JSON value, itself included; at most 20 entries of a list."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:20]) if isinstance(value, list) else ()
    return [at, *(place for key, part in inner for place in places(part, (*at, key)))]


def changed(value: Any, at: tuple[Any, ...], what: Any, *, drop: bool = False) -> Any:
    """A JSON value with the part at a path replaced or left out."""
    if not at:
        return what
    if isinstance(value, dict):
        return {
            key: changed(part, at[1:], what, drop=drop) if key == at[0] else part
            for key, part in value.items()
            if not (drop and len(at) == 1 and key == at[0])
        }
    return [changed(part, at[1:], what, drop=drop) if i == at[0] else part for i, part in enumerate(value)]


def mutate_json(data: st.DataObject, value: Any) -> str:
    """A JSON text that differs from ``value`` in some places."""
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.sampled_from(places(value)))
        what = data.draw(st.sampled_from(ODD))
        value = changed(value, at, what, drop=data.draw(st.booleans()) and bool(at))
    text = json.dumps(value)
    match data.draw(st.integers(0, 19)):
        case 0:
            text = text.replace("1", DEEP, 1)
        case 1:
            text = text.replace("1", "9" * 5000, 1)
        case 2:
            text = text.replace("{", '{"a": 1, "a": 2, ', 1)
        case 3:
            text = text.replace('"', '"\\ud800', 1)
    return text


def mutate_bytes(data: st.DataObject, raw: bytes, *, head: int = 4096) -> bytes:
    """Bytes overwritten, inserted, cut out and cut off; mostly near the beginning, where formats keep their lengths."""
    out = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        limit = min(head, len(out)) if data.draw(st.booleans()) else len(out)
        at = data.draw(st.integers(0, max(0, limit - 1)))
        piece = data.draw(st.sampled_from(BYTES) | st.binary(min_size=1, max_size=4))
        match data.draw(st.integers(0, 3)):
            case 0:
                out[at : at + len(piece)] = piece
            case 1:
                out[at:at] = piece
            case 2:
                del out[at : at + data.draw(st.sampled_from([1, 2, 8, 100]))]
            case 3:
                if data.draw(st.booleans()):
                    del out[at:]
    return bytes(out)


def mutate_file(data: st.DataObject, raw: bytes, name: str) -> bytes:
    """The contents of a file of this name, changed as its format allows."""
    if not data.draw(st.integers(0, 9)):
        return data.draw(st.sampled_from([b"", b"\x00" * 100, raw + raw, raw[: len(raw) // 2], b"\xff\xfe" + raw]))
    if data.draw(st.booleans()):
        return mutate_bytes(data, raw)
    if name.endswith(".safetensors") and len(raw) > 8:
        length = int.from_bytes(raw[:8], "little")
        header = mutate_json(data, json.loads(raw[8 : 8 + length])).encode("utf-8", "surrogatepass")
        return len(header).to_bytes(8, "little") + header + raw[8 + length :]
    if name.endswith(".jsonl"):
        lines = raw.split(b"\n")
        at = data.draw(st.integers(0, len(lines) - 1))
        if lines[at].strip():
            lines[at] = mutate_json(data, json.loads(lines[at])).encode("utf-8", "surrogatepass")
        return b"\n".join(lines)
    if name.endswith((".yaml", ".toml")):
        lines, equals = raw.split(b"\n"), b": " if name.endswith(".yaml") else b" = "
        at = data.draw(st.sampled_from([i for i, line in enumerate(lines) if equals in line]))
        odd = data.draw(st.sampled_from([*ODD, DEEP, "[" * 10**5, "&a [*a]", "!!python/name:os.system", "9" * 5000]))
        value = odd if isinstance(odd, str) else json.dumps(odd)
        lines[at] = lines[at].lstrip(b"# ").split(equals)[0] + equals + value.encode("utf-8", "surrogatepass")
        return b"\n".join(lines)
    if name.endswith(".jinja"):
        at = data.draw(st.integers(0, len(raw)))
        return raw[:at] + data.draw(st.sampled_from(STATEMENTS)).encode() + raw[at:]
    if name.endswith((".json", ".svec", ".zarray")):
        return mutate_json(data, json.loads(raw)).encode("utf-8", "surrogatepass")
    return mutate_bytes(data, raw)


def mutate_folder(data: st.DataObject, source: Path, target: Path, *, often: tuple[str, ...] = ()) -> None:
    """Copy a folder with one of its files changed or left out; the names in ``often`` half of the time."""
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
    favoured = [name for name in names if name.endswith(often)] if often else []
    chosen = data.draw(st.sampled_from(favoured if favoured and data.draw(st.booleans()) else names))
    for name in names:
        raw = (source / name).read_bytes()
        if name == chosen:
            if not data.draw(st.integers(0, 14)):
                continue
            raw = mutate_file(data, raw, name)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(raw)
