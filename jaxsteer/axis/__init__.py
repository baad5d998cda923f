"""The assistant axis (arXiv 2601.10387): where characters lie, where the Assistant does, and how to hold it."""
