"""Hydra configuration groups, installed as the package dynmoe.conf."""
