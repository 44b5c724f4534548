"""What reward functions say of answers, and the pairs that they make."""
