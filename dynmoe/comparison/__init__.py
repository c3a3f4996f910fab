"""Many runs side by side, from their records: does DynMoE beat the grid, and at what cost."""
