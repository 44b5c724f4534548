"""What an opponent is worth, and when to end. Knows nothing of how answers are generated."""
