"""When a server's log-probs are taken for those of the opponent that was published to it."""

import math

import pytest

from spin_trl.generation.sampler import Completion, SamplerError
from spin_trl.play.publish_check import PublishCheck, compare_logps


def completion(*logprobs: float) -> Completion:
    return Completion((0, 0), [5] * len(logprobs), "stop", list(logprobs))


def test_difference_is_the_mean_of_absolute_ones_over_all_tokens():
    """|-1 + 1.5| = 0.5, |-2 + 1.75| = 0.25, |-3 + 3| = 0: 0.75 / 3 over tokens, not over completions."""
    check = compare_logps([completion(-1.0, -2.0), completion(-3.0)], [[-1.5, -1.75], [-3.0]])
    assert check.mean_difference == pytest.approx(0.25)
    assert (check.num_tokens, check.num_completions) == (3, 2)


def test_differences_of_opposite_sign_do_not_cancel():
    check = compare_logps([completion(-1.0, -1.0)], [[-2.0, 0.0]])
    assert check.mean_difference == pytest.approx(1.0)


@pytest.mark.parametrize("difference", [0.0, 0.04, 0.05])
def test_difference_up_to_the_tolerance_passes(difference):
    PublishCheck(difference, 10, 2).require(0.05, "the base model")


@pytest.mark.parametrize("difference", [0.051, math.inf, math.nan])
def test_larger_difference_is_refused_with_both_numbers_and_what_to_do(difference):
    with pytest.raises(SamplerError) as refusal:
        PublishCheck(difference, 37, 8).require(0.05, "iteration 2's opponent")
    message = str(refusal.value)
    assert "The server does not play iteration 2's opponent: over 37 tokens of 8 sampled completions" in message
    assert f"differ from the policy's by {difference:.3g} nats" in message
    assert "`publish_check_tolerance` (0.05)" in message
    assert "`python -m spin_trl.serve`" in message and "`--dtype`" in message


def test_log_prob_that_is_not_a_number_is_not_averaged_away():
    check = compare_logps([completion(-1.0, math.nan, -1.0)], [[-1.0, -1.0, -1.0]])
    with pytest.raises(SamplerError, match="by nan nats"):
        check.require(0.05, "the base model")


def test_server_of_several_that_plays_another_opponent_is_named():
    with pytest.raises(SamplerError, match="The server at http://b:8000 does not play iteration 2's opponent"):
        PublishCheck(0.2, 37, 8).require(0.05, "iteration 2's opponent", "http://b:8000")
