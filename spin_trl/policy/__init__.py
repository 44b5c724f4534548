"""The weights: their forms, their log-probs, their optimizer. Knows nothing of servers and iterations."""
