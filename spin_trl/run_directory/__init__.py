"""Where things lie on disk, whole or not at all, and how a run goes on. Knows nothing of models and HTTP."""
