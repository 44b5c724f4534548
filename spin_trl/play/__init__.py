"""The steps of one iteration, and what is settled and checked before it. Knows nothing of any Trainer subclass."""
