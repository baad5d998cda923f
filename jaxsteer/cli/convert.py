"""``jaxsteer convert``: published checkpoints into those that load straight into shards."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from jaxsteer.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert a Hugging Face directory into a checkpoint that jaxsteer loads, layer by layer; or verify one."""

    src: Positional[Path]
    """Directory with config.json and *.safetensors, a .gguf file, organism:NAME, or a hub id."""
    out: Positional[Path | None] = None
    """Directory to make; it appears only when it is complete. What was interrupted goes on when it is run again."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Of the stored weights (default: as they are)."""
    ignore_field: tuple[str, ...] = ()
    """Names of fields of config.json that change no number although jaxsteer does not know them."""
    delta: Path | None = None
    """Change of the weights to store with them (delta.safetensors of `jaxsteer rewrite run`)."""
    verify: bool = False
    """Compare OUT with SRC bit for bit instead (a single directory: with the hashes it recorded); exit status 1 if they
    differ."""

    def run(self) -> int:
        """Convert or verify, with a progress bar."""
        from jaxsteer.processes import from_first

        return int(from_first(self._run))  # of several processes the others wait

    def _run(self) -> int:
        from checkpoints_convert import convert, report, verify
        from checkpoints_convert.gguf import is_gguf
        from jaxsteer.checkpoints.loading import find_source

        if self.delta is not None and (self.verify or self.dtype):
            other = "--verify" if self.verify else "--dtype"
            raise UserError(
                f"--delta and {other} do not go together: a delta is added to the weights as they are stored"
            )
        source, name, revision = self.src, None, None
        if not (self.src.exists() or is_gguf(self.src)):
            source, name, revision = find_source(str(self.src))
        if self.verify:
            src, out = (None, source) if self.out is None else (source, self.out)
            return report(verify(out, src), out, src)
        if self.out is None:
            raise UserError(f"no output was given: jaxsteer convert {self.src} OUT")
        if self.delta is not None:
            from jaxsteer.checkpoints.changed import convert_with_delta

            print(f"Wrote {convert_with_delta(self.src, self.out, self.delta, ignore_fields=self.ignore_field)}")
            return 0
        options = {"dtype": self.dtype, "source": name, "revision": revision}
        print(f"Wrote {convert(source, self.out, ignore_fields=self.ignore_field, **options)}")  # type: ignore[arg-type]
        return 0
