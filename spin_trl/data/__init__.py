"""Rows -> tokens -> pairs. Knows nothing of models, servers and paths."""
