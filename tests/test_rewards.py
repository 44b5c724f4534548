"""Reward functions: how they are called, what they may return, and what is refused before a model is loaded."""

import asyncio
import functools

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from tiny_tokenizers import byte_tokenizer
from transformers import TrainerState

from spin_trl.data.pairs import ANSWER_SCHEMA
from spin_trl.data.rewards.functions import RewardFunctions
from spin_trl.data.rewards.judged_answers import REWARD_COLUMNS, AnswerRewards


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


def constant(value):
    def reward(completions, **kwargs):
        return [value] * len(completions)

    return reward


def ask(*functions, weights=None, completions=("a", "bbb")) -> list[float]:
    completions = list(completions)
    rewards, _ = RewardFunctions(functions, weights)([f"to {c}" for c in completions], completions, [[1]] * 2)
    return rewards.tolist()


def test_reward_is_the_weighted_sum_and_none_does_not_count():
    def only_long(completions, **kwargs):
        return [10.0 if len(text) > 1 else None for text in completions]

    assert ask(length, only_long) == [1.0, 13.0]
    assert ask(length, only_long, weights=[2.0, -0.5]) == [2.0, 1.0]
    of_nobody, of_one = ask(constant(None), only_long)
    assert np.isnan(of_nobody) and of_one == 10.0


def test_whatever_holds_one_number_a_completion_is_taken():
    numbers_of_arrays = [np.float32(1), torch.tensor(0.0)]
    for values in ([True, False], (1, 0), np.array([1.0, 0.0]), torch.tensor([1, 0]), numbers_of_arrays):
        assert ask(lambda values=values, **kwargs: values) == [1.0, 0.0]


def test_asynchronous_functions_wait_together_and_always_in_one_loop():
    """Each of the two waits until the other has been called. A synchronous one may be between them."""
    loops, meeting = [], {}

    async def reward(completions, name, other, **kwargs):
        loops.append(asyncio.get_running_loop())
        for key in (name, other):
            meeting.setdefault(key, asyncio.Event())
        meeting[name].set()
        await asyncio.wait_for(meeting[other].wait(), 20)
        return [0.5] * len(completions)

    first, second = (functools.partial(reward, name=a, other=b) for a, b in ("xy", "yx"))
    functions = RewardFunctions([first, length, second])

    async def notebook():  # has a loop of its own
        return functions(["p", "q"], ["a", "bbb"], [[1], [2]])

    for _ in range(2):
        rewards, each = asyncio.run(notebook())
        assert rewards.tolist() == [2.0, 4.0] and each.tolist() == [[0.5, 1.0, 0.5], [0.5, 3.0, 0.5]]
    assert len(set(loops)) == 1 and functions.names == ["reward", "length", "reward_2"]


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (constant(float("nan")), "returned nan for completion 0 of its list"),
        (constant("good"), "returned 'good' for completion 0"),
        (lambda **kwargs: [1.0], "`<lambda>` returned 1 rewards for 2 completions"),
        (lambda **kwargs: 1.0, r"`<lambda>` returned 1.0 \(`float`\), but expected is a list"),
    ],
)
def test_what_is_no_reward_is_refused_with_the_functions_name_and_what_it_returned(function, found):
    with pytest.raises((ValueError, TypeError), match=found) as refusal:
        ask(function)
    assert "Correct the function and start the same command again" in str(refusal.value)


def test_sum_that_is_no_finite_number_is_refused():
    with pytest.raises(ValueError, match=r"rewards \[1e\+308, 1e\+308\].* lower `reward_weights`"):
        ask(constant(1e308), constant(1e308))


def test_error_in_an_asynchronous_function_is_shown_as_it_is_with_the_functions_name():
    """As that of a synchronous one, which stops a run in test_reward_runs.py."""

    async def broken(completions, **kwargs):
        return [1 / 0]

    with pytest.raises(ZeroDivisionError) as error:
        ask(broken)
    assert error.value.__notes__[0].startswith("In the reward function `broken`. Correct the function")


def test_numbers_that_a_function_logs_are_averaged():
    def reward(completions, log_metric, log_extra, **kwargs):
        log_extra("column", completions)
        for text in completions:
            log_metric("length", len(text))
        return [0.0] * len(completions)

    functions = RewardFunctions([reward])
    functions(["p", "q"], ["a", "bbb"], [[1], [2]])
    assert functions.take_logged() == {"rewards/length": 2.0}
    assert functions.take_logged() == {}


# What functions are shown


def judged(prompts: list, source: Dataset, function) -> tuple[list[dict], list[dict]]:
    """Two rows, of the user's rows 3 and 1, two generations each. Returns the calls and the answers with rewards."""
    tokenizer, calls = byte_tokenizer(), []

    def ids(text: str) -> list[int]:
        return tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]

    truths = [ids("truth 0"), ids("truth 7")]
    data = Dataset.from_dict({"row": [0, 7], "source_row": [3, 1], "prompt": prompts, "chosen_ids": truths})
    keys = [(0, 3, 0), (0, 3, 1), (7, 1, 0), (7, 1, 1)]
    columns = dict(zip(("row", "source_row", "sample"), zip(*keys, strict=True), strict=True))
    columns |= {"iteration": [0] * 4, "rejected_ids": [ids(f"answer {row} {n}") for row, _, n in keys]}
    answers = pa.table({name: list(columns[name]) for name in ANSWER_SCHEMA.names}, schema=ANSWER_SCHEMA)

    def recording(**kwargs):
        calls.append(kwargs)
        return function(**kwargs)

    rewards = AnswerRewards(RewardFunctions([recording]), tokenizer, source, num_generations=2)
    tables = list(rewards.add(data, [answers], TrainerState(global_step=4), 0))
    assert all(table.column_names == [*ANSWER_SCHEMA.names, *REWARD_COLUMNS] for table in tables)
    return calls, pa.concat_tables(tables).to_pylist()


SOURCE = Dataset.from_dict({"prompt": ["?"] * 4, "completion": ["!"] * 4, "level": [10, 11, 12, 13]})


def test_ground_truths_are_judged_first_and_then_each_generation_with_its_own_columns():
    calls, answers = judged(["p 0", "p 7"], SOURCE, lambda completions, **_: [len(t) for t in completions])
    truths, generations = calls
    assert truths["prompts"] == ["p 0", "p 7"] and truths["completions"] == ["truth 0", "truth 7"]
    assert generations["prompts"] == ["p 0", "p 0", "p 7", "p 7"]
    assert generations["completions"] == ["answer 0 0", "answer 0 1", "answer 7 0", "answer 7 1"]
    assert generations["ground_truth"] == ["truth 0", "truth 0", "truth 7", "truth 7"]
    assert (truths["level"], generations["level"]) == ([13, 11], [13, 13, 11, 11])
    assert generations["completion_ids"] == [answer["rejected_ids"] for answer in answers]
    assert generations["trainer_state"].global_step == 4
    assert not {"prompt", "completion"} & set(generations)
    assert [(a["chosen_reward"], a["rejected_reward"]) for a in answers] == [(7.0, 10.0)] * 4


def test_conversations_are_shown_as_messages_and_a_column_named_ground_truth_wins():
    prompts = [[{"role": "user", "content": f"p {n}"}] for n in (0, 7)]
    source = SOURCE.rename_column("level", "ground_truth")
    calls, _ = judged(prompts, source, lambda completions, **_: [0.0] * len(completions))
    assert calls[0]["completions"][0] == [{"role": "assistant", "content": "truth 0"}]
    assert calls[1]["completions"][3] == [{"role": "assistant", "content": "answer 7 1"}]
    assert calls[1]["prompts"][3] == [{"role": "user", "content": "p 7"}]
    assert calls[1]["ground_truth"] == [13, 13, 11, 11]


def test_ground_truths_that_are_judged_to_see_whether_a_function_can_count_nowhere():
    seen = []

    def reward(completions, level, log_metric, **kwargs):
        seen.append((completions, level))
        log_metric("length", 99.0)
        return [1.0] * len(completions)

    tokenizer = byte_tokenizer()
    rewards = AnswerRewards(RewardFunctions([reward, length]), tokenizer, SOURCE, num_generations=2)
    ids = [tokenizer(f"truth {row}")["input_ids"] for row in range(3)]
    rewards.try_on(Dataset.from_dict({"source_row": [3, 1, 0], "prompt": ["p"] * 3, "chosen_ids": ids}))
    assert seen == [(["truth 0", "truth 1"], [13, 11])]
    list(rewards.add(Dataset.from_dict({"row": [0]}), [], TrainerState(), 0))
    assert set(rewards.take_metrics()) == {"seconds_rewards"}
