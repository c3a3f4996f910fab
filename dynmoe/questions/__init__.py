"""Questions with answers: reading published sets, scoring, files for their own evaluators."""
