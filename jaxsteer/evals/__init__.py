"""Behaviour rates with their controls, statistics, the probe, and the gates of the shipped organisms."""
