"""LightningModules: what is learnt and measured. They know nothing of the adaptation of experts."""
