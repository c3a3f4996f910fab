"""Thin entry points: each builds objects from a config and calls them in order."""
