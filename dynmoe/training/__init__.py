"""Building, training and evaluating runs: what the commands do."""
