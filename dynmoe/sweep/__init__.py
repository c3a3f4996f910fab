"""Sweeps: which runs one command asks for, where each of them stands, and what is left to do."""
