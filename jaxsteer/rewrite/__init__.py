"""Knowledge rewriting: ROME, MEMIT, and weight deltas as files."""
