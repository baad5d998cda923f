"""Checkpoints: found, downloaded, converted on first use, described, and restored straight into shardings."""
