"""``jaxsteer attention``: what every head attends to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxsteer.cli.texts import Reading, write_plot
from jaxsteer.errors import UserError
from jaxsteer.ranges import CountFrom0, Seed
from jaxsteer.runs.files import document


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention(Reading):
    """Statistics of every head's attention over texts: entropy, sinks, roles, previous-token and induction heads."""

    span: str = ""
    """Also tell the share on this text (a prompt, a name), which every text must contain."""
    repeated: CountFrom0 = 16
    """Rows of random tokens that come twice, on which induction is told as well; 0 for none."""
    length: int = 48
    """Random tokens of such a row, before they come again."""
    seed: Seed = 0
    """Of the random tokens."""
    patterns: Path | None = None
    """Write the patterns of --layers in the first text here (.npz: weights [layer, head, query, key], tokens)."""
    layers: tuple[CountFrom0, ...] = ()
    """Layers of --patterns."""

    def run(self) -> int:
        """Measure and print."""
        from jaxsteer.lens.attention import AttentionOptions, attention_patterns, attention_statistics
        from jaxsteer.runs.bars import load, progress_bar

        if (self.patterns is None) != (not self.layers):
            raise UserError("--patterns FILE and --layers belong together: give both or none")
        texts = [record.said for record in self.records()]
        model = load(self.model, dtype=self.dtype, delta=self.delta, quiet=self.json)
        edits = self.edits(model)
        options = AttentionOptions(span=self.span, repeated=self.repeated, length=self.length, seed=self.seed)
        notes = []
        if self.patterns is not None:
            found = attention_patterns(model, texts[0], self.layers, edits=edits)
            notes.append(f"Wrote {found.write(self.patterns)}")
        with progress_bar("attention", unit="text", quiet=self.json) as advance:
            statistics = attention_statistics(model, texts, options, edits=edits, progress=advance)
        print(document(statistics.to_json()) if self.json else statistics.table())
        if self.plot is not None:
            notes.append(write_plot(statistics.plot(), self.plot))
        if notes and not self.json:
            print("\n" + "\n".join(notes))
        return 0
