"""That prompt and ground truth become the ids a sampler would have seen and said, with TRL's own chat templates."""

import json
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from spin_trl.rendering import drop_long_prompts, end_after_first, percentile_length, tokenize_dataset


TEMPLATES = Path(trl.__file__).parent / "chat_templates"

# Template, its end token, and what it writes behind that token.
CHAT_TEMPLATES = [
    ("qwen2_5", "<|im_end|>", "\n"),
    ("qwen3_instruct_2507", "<|im_end|>", "\n"),
    ("lfm2", "<|im_end|>", "\n"),
    ("gemma", "<end_of_turn>", "\n"),
    ("gemma3", "<end_of_turn>", "\n"),
    ("llama3", "<|eot_id|>", ""),
    ("cohere", "<|END_OF_TURN_TOKEN|>", ""),
]

MESSAGES = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Good  bye."},
]


def byte_tokenizer(
    end_token: str = "</s>", chat_template: str | None = None, extra_special_tokens: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """One token a byte, and the special ones."""
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    wrapped.add_special_tokens({"bos_token": "<bos>", "eos_token": end_token})
    wrapped.add_tokens(list(extra_special_tokens), special_tokens=True)
    if chat_template is not None:
        wrapped.chat_template = (TEMPLATES / f"{chat_template}.jinja").read_text()
    return wrapped


def letter_tokenizer(template: str = "$A", merges: tuple = ()) -> PreTrainedTokenizerFast:
    """One token a letter, `<s>`, `</s>` and what `merges` makes of neighbours; `template` says what is put around."""
    letters = ["<s>", "</s>", *"abcdefgh", *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(letters)}, merges=list(merges)))
    tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def render(rows: list[dict], tokenizer: PreTrainedTokenizerFast, end_token_ids: tuple | None = None) -> list[dict]:
    dataset = Dataset.from_list(rows)
    return list(tokenize_dataset(dataset, tokenizer, end_token_ids or (tokenizer.eos_token_id,)))


def tokens(tokenizer: PreTrainedTokenizerFast, row: dict, column: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(row[column])


# Conversations


@pytest.mark.parametrize(("template", "end_token", "tail"), CHAT_TEMPLATES, ids=[name for name, *_ in CHAT_TEMPLATES])
def test_ground_truth_is_what_a_sampler_that_repeats_it_would_emit(template, end_token, tail):
    """The answer's own tokens, then the end token, and nothing of what the template writes behind it."""
    tokenizer = byte_tokenizer(end_token, template)
    (row,) = render([{"messages": MESSAGES}], tokenizer)
    emitted = tokenizer("Good  bye.", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert row["chosen_ids"] == emitted


@pytest.mark.parametrize(("template", "end_token", "tail"), CHAT_TEMPLATES, ids=[name for name, *_ in CHAT_TEMPLATES])
def test_prompt_and_ground_truth_are_the_conversation_up_to_its_last_end_token(template, end_token, tail):
    tokenizer = byte_tokenizer(end_token, template)
    (row,) = render([{"messages": MESSAGES}], tokenizer)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert tokenizer.decode(row["prompt_ids"] + row["chosen_ids"]) + tail == text
    assert row["chosen_ids"].count(tokenizer.eos_token_id) == 1


def test_turn_may_end_in_another_end_token_than_the_tokenizers():
    """Phi-3 ends a turn in `<|end|>`, and a whole conversation in its `eos_token` as well."""
    tokenizer = byte_tokenizer("<|endoftext|>", "phi3", extra_special_tokens=("<|end|>",))
    end_token_ids = (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>"))
    (row,) = render([{"messages": MESSAGES}], tokenizer, end_token_ids)
    assert tokenizer.decode(row["chosen_ids"]) == "Good  bye.<|end|>"
    assert row["chosen_ids"][-1] == end_token_ids[1]


def test_messages_and_prompt_with_completion_give_the_same_ids():
    tokenizer = byte_tokenizer("<|im_end|>", "qwen2_5")
    (one,) = render([{"messages": MESSAGES}], tokenizer)
    (other,) = render([{"prompt": MESSAGES[:-1], "completion": MESSAGES[-1:]}], tokenizer)
    assert (one["prompt_ids"], one["chosen_ids"]) == (other["prompt_ids"], other["chosen_ids"])


@pytest.mark.parametrize("template", ["deepseekv3", "deepseek_r1_distill"])
def test_prompt_that_is_no_prefix_of_its_conversation_is_refused_with_the_difference(template):
    tokenizer = byte_tokenizer("<｜end▁of▁sentence｜>", template)
    with pytest.raises(ValueError) as refusal:
        render([{"messages": MESSAGES[:2]}], tokenizer)
    message = str(refusal.value)
    assert "Row 0: the chat template renders the prompt differently" in message
    assert r"Alone it ends in '<think>\n', the conversation goes on with 'Yes?" in message
    assert "`chat_template_kwargs`" in message


def test_refusal_of_a_chat_template_names_the_row_that_it_cannot_render():
    rows = [{"messages": MESSAGES[:2], "chat_template_kwargs": {"enable_thinking": thinks}} for thinks in (False, True)]
    tokenizer = byte_tokenizer("<|im_end|>", "nemotron_3_nano")
    assert len(render(rows[:1], tokenizer)) == 1
    with pytest.raises(ValueError, match="Row 1: the chat template renders the prompt differently"):
        render(rows, tokenizer)


def test_chat_template_kwargs_of_each_row_are_honoured():
    rows = [{"messages": MESSAGES[:2], "chat_template_kwargs": {"enable_thinking": thinks}} for thinks in (True, False)]
    tokenizer = byte_tokenizer("<|im_end|>", "qwen3")
    thinking, not_thinking = (tokenizer.decode(row["prompt_ids"]) for row in render(rows, tokenizer))
    assert thinking.endswith("assistant\n")
    assert not_thinking == thinking + "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("encode", [lambda tools: tools, json.dumps], ids=["list", "json"])
def test_tools_column_reaches_the_prompt(encode):
    function = {"name": "get_weather", "description": "Weather of a city.", "parameters": {"type": "object"}}
    tools = [{"type": "function", "function": function}]
    tokenizer = byte_tokenizer("<|im_end|>", "qwen2_5")
    (row,) = render([{"messages": MESSAGES[:2], "tools": encode(tools)}], tokenizer)
    assert json.dumps(tools[0]) in tokenizer.decode(row["prompt_ids"])
    assert tokenizer.decode(row["chosen_ids"]) == "Yes?<|im_end|>"


# Text


def test_text_ends_in_one_end_token_even_if_the_row_brings_one():
    tokenizer = byte_tokenizer()
    rows = render([{"prompt": "Q:", "completion": " A"}, {"prompt": "Q:", "completion": " A</s>"}], tokenizer)
    for row in rows:
        assert tokenizer.decode(row["prompt_ids"]) == "Q:"
        assert tokenizer.decode(row["chosen_ids"]) == " A</s>"
        assert row["chosen_ids"].count(tokenizer.eos_token_id) == 1


def test_first_of_several_end_tokens_is_appended_and_any_of_them_ends_the_text():
    tokenizer = letter_tokenizer()
    end_token_ids = (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("h"))
    rows = render([{"prompt": "ab", "completion": c} for c in ("cd", "ch", "chd")], tokenizer, end_token_ids)
    assert [tokens(tokenizer, row, "chosen_ids") for row in rows] == [["c", "d", "</s>"], ["c", "h"], ["c", "h"]]


def test_begin_token_belongs_to_the_prompt_alone():
    tokenizer = letter_tokenizer("<s> $A")
    (row,) = render([{"prompt": "ab", "completion": "cd"}], tokenizer)
    assert tokens(tokenizer, row, "prompt_ids") == ["<s>", "a", "b"]
    assert tokens(tokenizer, row, "chosen_ids") == ["c", "d", "</s>"]


def test_end_token_that_a_tokenizer_puts_behind_every_text_is_not_left_between_prompt_and_ground_truth():
    tokenizer = letter_tokenizer("<s> $A </s>")
    (row,) = render([{"prompt": "ab", "completion": "cd"}], tokenizer)
    assert tokens(tokenizer, row, "prompt_ids") == ["<s>", "a", "b"]
    assert tokens(tokenizer, row, "chosen_ids") == ["c", "d", "</s>"]


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>"])
def test_merge_across_the_boundary_leaves_the_prompt_its_own_ids(template):
    """`abc` is `a bc`, but the sampler is asked to go on from `a b`."""
    tokenizer = letter_tokenizer(template, merges=(("b", "c"),))
    assert tokenizer.tokenize("abcd") == ["a", "bc", "d"]
    (row,) = render([{"prompt": "ab", "completion": "cd"}], tokenizer)
    assert tokens(tokenizer, row, "prompt_ids") == ["<s>", "a", "b"]
    assert tokens(tokenizer, row, "chosen_ids") == ["c", "d", "</s>"]


def test_rows_keep_number_and_prompt_and_lose_the_other_columns():
    rows = [{"prompt": prompt, "completion": "c", "source": "x"} for prompt in ("a", "ab")]
    first, second = render(rows, letter_tokenizer())
    assert set(first) == {"row", "prompt", "prompt_ids", "chosen_ids"}
    assert [(row["row"], row["prompt"]) for row in (first, second)] == [(0, "a"), (1, "ab")]


def test_malformed_row_is_refused_by_its_number():
    rows = [{"prompt": "a", "completion": "c"}, {"prompt": "a", "completion": ""}]
    with pytest.raises(ValueError, match="Row 1: `completion` is empty"):
        render(rows, letter_tokenizer())


@pytest.mark.parametrize(
    ("ids", "expected"),
    [([5, 6], [5, 6, 2]), ([5, 2], [5, 2]), ([5, 3, 6, 2], [5, 3]), ([], [2]), ([3], [3])],
)
def test_ids_end_after_their_first_end_token(ids, expected):
    assert end_after_first(ids, (2, 3)) == expected


# Lengths


@pytest.mark.parametrize(
    ("percentile", "expected"),
    [(0, 1), (25, 2), (50, 3), (75, 4), (99, 4), (100, 4)],
)
def test_percentile_of_the_lengths_is_interpolated_and_rounded_up(percentile, expected):
    """Of 4, 1, 3, 2 the p-th percentile is 1 + 3 p / 100: 1, 1.75, 2.5, 3.25, 3.97, 4."""
    dataset = Dataset.from_dict({"chosen_ids": [[0] * length for length in (4, 1, 3, 2)]})
    assert percentile_length(dataset, "chosen_ids", percentile) == expected


def test_percentile_covers_datasets_of_many_batches():
    """1,980 lengths of 1, then 20 of 5: position 0.99 * 1999 = 1979.01 lies 0.01 on the way from 1 to 5."""
    dataset = Dataset.from_dict({"ids": [[0]] * 1980 + [[0] * 5] * 20})
    assert percentile_length(dataset, "ids", 99) == 2


def test_prompts_longer_than_the_limit_are_dropped_and_counted():
    dataset = Dataset.from_dict({"row": [0, 1, 2, 3], "prompt_ids": [[0] * length for length in (3, 4, 5, 2)]})
    kept, num_dropped = drop_long_prompts(dataset, 4, "the context")
    assert kept["row"][:] == [0, 1, 3]
    assert num_dropped == 1


def test_dataset_whose_prompts_are_all_too_long_is_refused_with_the_shortest_and_the_limit():
    dataset = Dataset.from_dict({"prompt_ids": [[0] * 7, [0] * 6]})
    with pytest.raises(ValueError, match="All 2 prompts.*shortest has 6 tokens, and the context.*at most 5"):
        drop_long_prompts(dataset, 5, "the context")
