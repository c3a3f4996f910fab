"""Memory and time of a training step, from sizes alone."""
