"""Published MoE-LLaVA and DynMoE-LLaVA checkpoints as ours, and ours as theirs."""
