"""Texts: GLUE and its kind."""
