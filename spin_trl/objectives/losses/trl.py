"""The losses that DPOTrainer computes itself: their traits."""

from ..objective import Objective, register


# Functions of the difference between the two sides of each pair, which is 0 for equal ones.
for _name in ("sigmoid", "hinge", "exo_pair", "robust", "discopop"):
    register(Objective(_name, is_of_difference=True, learns_from_identical_pairs=False))

# The differences of a whole batch, sorted: a 0 has its place among them.
register(Objective("aot", is_of_difference=True))

# Differences of means over the tokens of each side.
for _name in ("sigmoid_norm", "ipo"):
    register(Objective(_name, learns_from_identical_pairs=False))

# Each side by itself. The gradients of the two terms of `apo_zero` cancel where the sides are equal.
register(Objective("apo_zero", learns_from_identical_pairs=False))
for _name in ("apo_down", "bco_pair", "nca_pair", "sppo_hard", "aot_unpaired"):
    register(Objective(_name))

register(Objective("sft", sees_reference=False))
