"""The directory of a piece of work that can be resumed, its progress, and the base of its result."""
