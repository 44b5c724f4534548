"""Answers that are wrong in content: none of them becomes a completion."""

import pytest

from spin_trl.generation.sampler import Completion, CompletionRequest, SamplerError, SamplingParams
from spin_trl.generation.vllm.completion import read_completion


REQUEST = CompletionRequest(key=(17, 1), prompt_ids=[5, 6, 7], seed=0)
RIGHT = {"token_ids": [8, 9, 2], "finish_reason": "stop", "logprobs": {"token_logprobs": [-1.0, -2.0, -3.0]}}


def read(choice: dict, logprobs: bool = False, vocab_size: int | None = 10, **extra) -> Completion:
    params = SamplingParams(max_completion_length=4, end_token_ids=(2, 3), extra=extra)
    return read_completion(choice, REQUEST, params, 4, vocab_size, logprobs)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Completion((17, 1), [8, 9, 2], "stop", [-1.0, -2.0, -3.0])),
        ({"token_ids": [0, 9, 3]}, Completion((17, 1), [0, 9, 3], "stop", [-1.0, -2.0, -3.0])),
        ({"finish_reason": "length"}, Completion((17, 1), [8, 9, 2], "length", [-1.0, -2.0, -3.0])),
    ],
    ids=["stopped", "at another end token", "cut off"],
)
def test_right_answer_is_a_completion(changes, expected):
    assert read({**RIGHT, **changes}, logprobs=True) == expected


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"token_ids": None}, r"`token_ids` None.*`return_token_ids`"),
        ({"token_ids": []}, r"`token_ids` \[\]"),
        ({"token_ids": "8 9 2"}, r"`token_ids` '8 9 2'"),
        ({"token_ids": [8, -1, 2]}, r"token id -1, but the model has a vocabulary of 10"),
        ({"token_ids": [8, 10, 2]}, r"token id 10, but the model has a vocabulary of 10"),
        ({"token_ids": [8, 9.5, 2]}, r"token id 9\.5"),
        ({"token_ids": [8, 9, 8, 9, 2]}, r"5 tokens, but at most 4 were asked for"),
        ({"finish_reason": "repetition"}, r"`finish_reason` 'repetition' instead of 'stop' or 'length'"),
        ({"finish_reason": None}, r"`finish_reason` None"),
        ({"token_ids": [8, 9, 9]}, r"stopped at token 9, but the end tokens are \[2, 3\]\. .*`eos_token_id`"),
        ({"logprobs": None}, r"log-probs None instead of a finite number for each of 3 tokens"),
        ({"logprobs": {"token_logprobs": [-1.0, -2.0]}}, r"log-probs \[-1\.0, -2\.0\]"),
        ({"logprobs": {"token_logprobs": [-1.0, None, -2.0]}}, r"log-probs \[-1\.0, None"),
        ({"logprobs": {"token_logprobs": [-1.0, float("nan"), -2.0]}}, r"log-probs \[-1\.0, nan"),
    ],
)
def test_wrong_answer_is_refused_with_what_it_holds_and_the_row_it_is_for(changes, found):
    with pytest.raises(SamplerError, match=rf"answer to row 17 \(sample 1, prompt of 3 tokens\).* {found}"):
        read({**RIGHT, **changes}, logprobs=True)


def test_vocabulary_that_is_not_known_has_no_upper_end():
    assert read({**RIGHT, "token_ids": [10_000, 2]}, vocab_size=None).token_ids == [10_000, 2]


def test_log_probs_that_were_not_asked_for_are_not_looked_at():
    assert read({**RIGHT, "logprobs": "none"}).logprobs is None


def test_answer_may_stop_elsewhere_only_where_the_user_said_so():
    for extra in ({"stop": ["\n"]}, {"stop_token_ids": [9]}):
        assert read({**RIGHT, "token_ids": [8, 9]}, **extra).token_ids == [8, 9]
    with pytest.raises(SamplerError, match="stopped at token 9"):
        read({**RIGHT, "token_ids": [8, 9]}, frequency_penalty=0.5)
