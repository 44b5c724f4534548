"""That a completion ends in the end token that was sampled, whichever it is, and a cut-off one in none."""

from contextlib import nullcontext

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spin_trl.generation.policy_sampler import PolicySampler
from spin_trl.generation.sampler import CompletionRequest, SamplingParams


EOS, END_OF_TURN = 1, 2


@pytest.fixture(scope="module")
def counting_model() -> LlamaForCausalLM:
    """Says the token after the last one, going down: 6, 5, 4, ... Only embeddings and head say anything."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(16))
        model.lm_head.weight.copy_(torch.eye(16).roll(-1, dims=0))
    return model


def complete(model, max_completion_length: int, end_token_ids: tuple[int, ...], max_length=99) -> tuple[list[int], str]:
    sampler = PolicySampler(lambda: nullcontext(model), pad_token_id=EOS, batch_size=2, max_length=max_length)
    params = SamplingParams(max_completion_length, end_token_ids, temperature=0.0)
    # The longer companion keeps the batch going after the first has ended.
    requests = [CompletionRequest((0, 0), [9, 6], seed=0), CompletionRequest((1, 0), [14], seed=0)]
    completion, companion = sorted(sampler.sample(requests, params), key=lambda completion: completion.key)
    assert companion.token_ids[0] == 13  # although its prompt was padded
    return completion.token_ids, completion.finish_reason


def test_policy_is_opened_even_by_a_process_without_requests(counting_model):
    """Processes gather the weights together, so one with nothing to do has to take part."""
    opened = []
    sampler = PolicySampler(
        lambda: nullcontext(opened.append(True) or counting_model), pad_token_id=EOS, batch_size=1, max_length=8
    )
    assert list(sampler.sample([], SamplingParams(1, (EOS,)))) == []
    assert opened == [True]


@pytest.mark.parametrize(
    ("max_completion_length", "end_token_ids", "expected"),
    [
        (10, (EOS,), ([5, 4, 3, 2, 1], "stop")),
        (10, (EOS, END_OF_TURN), ([5, 4, 3, 2], "stop")),
        (10, (EOS, 5), ([5], "stop")),
        (4, (EOS, END_OF_TURN), ([5, 4, 3, 2], "stop")),
        (3, (EOS, END_OF_TURN), ([5, 4, 3], "length")),
        (1, (EOS,), ([5], "length")),
    ],
    ids=["the tokenizer's", "another of the model's", "at once", "on the last token", "cut off", "cut off at once"],
)
def test_completion_ends_in_the_end_token_that_was_sampled_and_a_cut_off_one_in_none(
    counting_model, max_completion_length, end_token_ids, expected
):
    assert complete(counting_model, max_completion_length, end_token_ids) == expected


def test_no_sequence_is_longer_than_model_and_training_hold(counting_model):
    assert complete(counting_model, 10, (EOS,), max_length=5) == ([5, 4, 3], "length")


def test_checkpoints_own_way_to_generate_is_left_to_it(counting_model):
    own = counting_model.generation_config
    own.suppress_tokens, own.num_beams = [5], 2
    assert complete(counting_model, 10, (EOS,)) == ([5, 4, 3, 2, 1], "stop")
    assert counting_model.generation_config is own
