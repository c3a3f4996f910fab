"""What ``dynmoe-bench`` measures, with what, and how its results are kept and compared."""
