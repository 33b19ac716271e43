"""Scores of what the SLM says: strict parsing, matches with the reference, the Berkeley rule."""
