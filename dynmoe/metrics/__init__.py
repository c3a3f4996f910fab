"""Measures and the rules by which a protocol selects a model."""
