"""``jaxsteer doctor``: what the machine has, what a model would need on it, and what would go better."""

from __future__ import annotations

import dataclasses

from jaxsteer.runs.files import document


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doctor:
    """Look at the machine: versions, devices, memory, disk, hub token, extras; and what a model takes on it."""

    model: str | None = None
    """organism:NAME, a config.json, a Hugging Face directory, a converted checkpoint, a .gguf file, or a hub id."""
    json: bool = False
    """Print JSON instead of text."""

    def run(self) -> int:
        """Look and print; 1 when the model does not fit."""
        from jaxsteer.planning.machine import examine

        found = examine(self.model)
        print(document(found.to_json()) if self.json else found.text())
        return 1 if found.needs is not None and not found.needs.rows else 0
