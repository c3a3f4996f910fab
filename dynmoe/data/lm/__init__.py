"""Documents for causal language modelling: read, dealt to sets, packed into blocks of tokens."""
