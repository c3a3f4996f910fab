"""Pretrained or fresh Transformers, and the surgery that turns chosen FFNs into MoE layers."""
