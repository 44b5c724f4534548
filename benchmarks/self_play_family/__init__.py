"""The parts of `benchmarks/quality.py`: tasks, methods, runs, the search for settings, tables and picture."""
