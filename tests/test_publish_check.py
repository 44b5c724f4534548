"""When what a sampler says of its tokens is taken for the log-probs of the opponent that was published to it."""

import math

import pytest

from spin_trl import Completion, SamplerError
from spin_trl.generation.sampler import OpponentSampler


class Claims(OpponentSampler):
    """Says a token and the end token, and that each has this log-prob."""

    def __init__(self, logprobs: list[float]):
        self.logprobs = logprobs

    def publish(self, iteration, checkpoint, earlier=None): ...

    def sample(self, requests, params, logprobs=False):
        for request in requests:
            yield Completion(request.key, [5, *params.end_token_ids[:1]], "stop", self.logprobs)

    def sample_each(self, requests, params, logprobs=False):
        return {"http://b:8000": list(self.sample(requests, params, logprobs))}


@pytest.mark.parametrize("logprobs", [[0.0, 0.0], [-1.0, -math.inf], [-1.0, math.nan]])
def test_sampler_whose_log_probs_are_not_the_policys_is_refused(play_run, logprobs):
    with pytest.raises(SamplerError) as refusal:
        play_run(sampler=Claims(logprobs), num_iterations=1)
    message = str(refusal.value)
    assert "http://b:8000 does not play the base model: over 16 tokens of 8 sampled completions" in message
    assert "`publish_check_tolerance` (0.05)" in message and "`--dtype`" in message


def test_difference_is_the_mean_of_absolute_ones_over_all_tokens(play_run):
    """Log-probs of 0, which no token of the policy reaches, differ by its mean negative log-prob."""
    settings = {"num_iterations": 1, "publish_check_tolerance": 100.0, "overwrite_output_dir": True}
    found, other = (
        play_run(sampler=Claims(logprobs), **settings).store.read_metrics(0)["publish_check_difference"]
        for logprobs in ([0.0, 0.0], [-1.0, 1.0])
    )
    assert 0.5 < found < 50
    # One is nearer by up to 1, the other further by 1: if signs cancelled, the two runs would agree.
    assert other > found - 1
