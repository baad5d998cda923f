"""Whoever writes text on request, and judges of what was written."""
