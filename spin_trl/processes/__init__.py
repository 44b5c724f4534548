"""Several processes failing, stopping and showing progress as one. Knows nothing of pairs and models."""
