"""Which sides may make a pair, and which losses that goes with. Knows nothing of rewards and of data."""

from collections.abc import Sequence


PAIRINGS = ("ground_truth", "best_of", "reward_ranked")

# Losses whose optimum is the data's distribution because every chosen side is of the data, every rejected one a sample
# of the opponent: of others they say nothing.
_OF_DATA_AND_OPPONENT = ("space", "t_spin", "iris")


def check_pairing(pairing: str, num_generations: int, loss_types: Sequence[str]) -> None:
    """
    Args:
        pairing (`str`): One of `PAIRINGS`.
        num_generations (`int`): Answers to each prompt.
        loss_types (`Sequence[str]`): The losses that are mixed.

    Raises:
        `ValueError`: if the three contradict each other.
    """
    if pairing == "reward_ranked" and num_generations < 2:
        raise ValueError(
            "`pairing='reward_ranked'` takes the best and the worst of several answers to a prompt, but "
            f"`num_generations` is {num_generations}. Set it to 2 or more, or use `pairing='best_of'`."
        )
    if pairing != "ground_truth":
        _require_any_pairs(loss_types, f"`pairing={pairing!r}`", "Leave `pairing` unset")


def check_goes_with_preferences(loss_types: Sequence[str]) -> None:
    """
    Raises:
        `ValueError`: if a loss cannot use the preference pairs of a user.
    """
    _require_any_pairs(loss_types, "a `preference_dataset`", "Leave the dataset out")


def max_pairs_per_prompt(pairing: str, num_generations: int) -> int:
    """How many pairs the answers to a prompt make at most."""
    return 1 if pairing == "reward_ranked" else num_generations


def _require_any_pairs(loss_types: Sequence[str], setting: str, remedy: str) -> None:
    for name in _OF_DATA_AND_OPPONENT:
        if name in loss_types:
            raise ValueError(
                f"`loss_type={name!r}` contradicts {setting}: it leads to the data's distribution where every chosen "
                "side is a ground truth and every rejected one the opponent's answer, and these pairs are others. "
                f"{remedy}, or use a loss that compares any two sides, such as 'sigmoid'."
            )
