"""
That prompt and ground truth become the ids which a sampler would have seen and said, once, and what is refused.

Each chat template that TRL ships is in test_chat_templates.py.
"""

import json
import multiprocessing

import pytest
from datasets import Dataset, load_dataset
from tiny_tokenizers import TEMPLATES, CountingTokenizer, byte_tokenizer, letter_tokenizer, special_tokens

from spin_trl.data.rendering import tokenize_dataset


MESSAGES = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Good  bye."},
]


def render(rows: list[dict], tokenizer, end_token_ids: tuple | None = None, **options) -> list[dict]:
    end_token_ids = end_token_ids or (tokenizer.eos_token_id,)
    return list(tokenize_dataset(Dataset.from_list(rows), tokenizer, end_token_ids, **options).dataset)


# Conversations


def test_chat_template_kwargs_of_a_row_win_over_those_for_all():
    kwargs = {"enable_thinking": True}, {"enable_thinking": False}, None
    tokenizer = byte_tokenizer("<|im_end|>", "qwen3")
    rows = [{"messages": MESSAGES[:2], "chat_template_kwargs": own} for own in kwargs]
    rendered = render(rows, tokenizer, chat_template_kwargs=kwargs[1])
    thinking, *others = (tokenizer.decode(row["prompt_ids"]) for row in rendered)
    assert thinking.endswith("assistant\n")
    assert others == [thinking + "<think>\n\n</think>\n\n"] * 2


@pytest.mark.parametrize("encode", [lambda tools: tools, json.dumps], ids=["list", "json"])
def test_tools_column_reaches_the_prompt(encode):
    function = {"name": "get_weather", "description": "Weather of a city.", "parameters": {"type": "object"}}
    tools = [{"type": "function", "function": function}]
    tokenizer = byte_tokenizer("<|im_end|>", "qwen2_5")
    (row,) = render([{"messages": MESSAGES[:2], "tools": encode(tools)}], tokenizer)
    assert json.dumps(tools[0]) in tokenizer.decode(row["prompt_ids"])
    assert tokenizer.decode(row["chosen_ids"]) == "Yes?<|im_end|>"


def test_template_that_refuses_the_roles_is_named_by_row_field_and_roles():
    system = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    tokenizer = byte_tokenizer("<end_of_turn>", "gemma")
    with pytest.raises(ValueError, match=r"Row 1: .* refuses the prompt of .*\['system', 'user', .*System role"):
        render([{"messages": MESSAGES}, {"messages": system}], tokenizer)


def calling(content: str | None) -> list[dict]:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    return [MESSAGES[0], {"role": "assistant", "content": content, "tool_calls": [call]}]


def test_template_that_does_not_write_what_the_messages_say_is_refused():
    """Otherwise the ground truth were an answer of no words."""
    with pytest.raises(ValueError, match="Row 0: the chat template writes nothing of the ground truth of `messages`"):
        render([{"messages": calling(None)}], byte_tokenizer("<|eot_id|>", "llama3"))
    tokenizer = byte_tokenizer(chat_template="{% for m in messages %}<{{ m.role }}></s>{% endfor %}")
    with pytest.raises(ValueError, match="renders a conversation without what its messages say"):
        render([{"messages": MESSAGES}], tokenizer)


@pytest.mark.parametrize(
    ("template", "end"), [("glm4moe", "<|observation|>"), ("qwen2_5", "<|im_end|>"), ("llama3_1", "<|eot_id|>")]
)
def test_missing_content_beside_a_tool_call_is_written_as_nothing(template, end):
    source = (TEMPLATES / f"{template}.jinja").read_text()
    tokenizer = byte_tokenizer("<end>", template, special_tokens(source))
    end_token_ids = tuple(tokenizer.convert_tokens_to_ids(["<end>", end]))
    missing, empty = render([{"messages": calling(None)}, {"messages": calling("")}], tokenizer, end_token_ids)
    assert missing["chosen_ids"] == empty["chosen_ids"]
    assert tokenizer.decode(missing["chosen_ids"][-1]) == end
    assert "f" in tokenizer.decode(missing["chosen_ids"]) and "None" not in tokenizer.decode(missing["chosen_ids"])


# Text


def test_first_of_several_end_tokens_is_appended_and_any_of_them_ends_the_text():
    tokenizer = letter_tokenizer()
    end_token_ids = (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("h"))
    rows = render([{"prompt": "ab", "completion": c} for c in ("cd", "ch", "chd")], tokenizer, end_token_ids)
    said = [tokenizer.convert_ids_to_tokens(row["chosen_ids"]) for row in rows]
    assert said == [["c", "d", "</s>"], ["c", "h"], ["c", "h"]]
    rows = render([{"prompt": "Q:", "completion": " A"}, {"prompt": "Q:", "completion": " A</s>"}], byte_tokenizer())
    assert rows[0]["chosen_ids"] == rows[1]["chosen_ids"]


TEXT = {"prompt": "ab", "completion": "cd"}
CONVERSATION = {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]}


@pytest.mark.parametrize("given", [TEXT, CONVERSATION], ids=["text", "conversation"])
@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("merges", [(), (("b", "c"),)], ids=["no merge", "merge across the boundary"])
def test_ground_truth_is_what_a_sampler_that_repeats_it_would_say(given, template, merges):
    """
    The begin token belongs to the prompt alone, and an end token behind every text to neither; conversations have what
    their template writes. `abc` may be `a bc`, but the sampler is asked to go on from `a b`.
    """
    chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chat_template += "{% if not add_generation_prompt %}</s>{% endif %}"
    tokenizer = letter_tokenizer(template, merges, chat_template)
    (row,) = render([given], tokenizer)
    begins = "<s>" in template and given is TEXT
    assert tokenizer.convert_ids_to_tokens(row["prompt_ids"]) == [*(["<s>"] if begins else []), "a", "b"]
    assert tokenizer.convert_ids_to_tokens(row["chosen_ids"]) == ["c", "d", "</s>"]


# Rows


def test_every_assistant_turn_is_a_row_of_its_own_with_the_turns_before_it_as_prompt():
    tokenizer = byte_tokenizer("<|im_end|>", "qwen2_5")
    given = [{"messages": MESSAGES, "source": "x"}, {"messages": MESSAGES[:2], "source": "y"}]
    rows = render(given, tokenizer, train_on_turns="all")
    assert set(rows[0]) == {"row", "source_row", "prompt", "prompt_ids", "chosen_ids"}
    assert [(row["row"], row["source_row"]) for row in rows] == [(0, 0), (1, 0), (2, 1)]
    assert [tokenizer.decode(row["chosen_ids"][:-1]) for row in rows] == ["Yes?", "Good  bye.", "Yes?"]
    for row, messages in zip(rows, (MESSAGES[:1], MESSAGES[:3], MESSAGES[:1]), strict=True):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(row["prompt_ids"]) == text
        assert row["prompt"] == messages


def test_keys_that_only_later_rows_fill_are_kept_in_the_prompts():
    """The first thousand rows have no tool calls, by which the type of the column must not be guessed."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    calling = [MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": [call]}, *MESSAGES[:2]]
    tokenizer = byte_tokenizer("<|im_end|>", "qwen2_5")
    rows = render([{"messages": MESSAGES[:2]}] * 1001 + [{"messages": calling}], tokenizer)
    assert rows[-1]["prompt"][1]["tool_calls"] == [call]
    assert '"arguments": {"x": 1}' in tokenizer.decode(rows[-1]["prompt_ids"])


def test_dataset_without_a_single_valid_row_is_refused_with_the_first_reason():
    dataset = Dataset.from_list([{"prompt": "a", "completion": ""}] * 2)
    with pytest.raises(ValueError, match="None of the 2 rows is valid. Row 0: `completion` is empty"):
        tokenize_dataset(dataset, letter_tokenizer(), (1,), skip_invalid_rows=True)


def broken_bytes(tmp_path) -> Dataset:
    """A file whose second row is no UTF-8, and whose third is empty."""
    lines = [b'{"prompt": "a", "completion": "c"}', b'{"prompt": "a", "completion": "c\xff"}']
    lines += [b'{"prompt": "a", "completion": ""}', b'{"prompt": "b", "completion": "d"}']
    path = tmp_path / "broken.jsonl"
    path.write_bytes(b"\n".join(lines))
    return load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))


def test_malformed_rows_are_refused_by_number_and_field_or_left_out_and_the_others_keep_their_numbers(tmp_path):
    with pytest.raises(ValueError, match="Row 1: `completion` is not valid Unicode.*0xff"):
        tokenize_dataset(broken_bytes(tmp_path), letter_tokenizer(), (1,))
    tokenized = tokenize_dataset(broken_bytes(tmp_path), letter_tokenizer(), (1,), skip_invalid_rows=True)
    assert tokenized.dataset["source_row"][:] == [0, 3]
    (first, broken), (second, empty) = tokenized.invalid_rows
    assert (first, second) == (1, 2) and "0xff" in broken and empty.startswith("`completion` is empty")
    assert tokenized.dataset["row"][:] == [0, 1]


# End tokens


def test_unknown_token_at_the_end_of_a_turn_is_refused_by_name_and_not_followed_by_another():
    """Gemma ends a turn in `<end_of_turn>` and a newline, its tokenizer's end token is `<eos>`."""
    tokenizer = byte_tokenizer("<eos>", "gemma", extra_special_tokens=("<end_of_turn>", "<start_of_turn>"))
    row = {"messages": MESSAGES}
    end_of_turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    found = rf"Row 0: .* '<end_of_turn>'.*end tokens are \['<eos>'\].*{end_of_turn}.*eos_token_id"
    with pytest.raises(ValueError, match=found):
        render([row], tokenizer)
    (rendered,) = render([row], tokenizer, (tokenizer.eos_token_id, end_of_turn))
    assert tokenizer.decode(rendered["chosen_ids"]) == "Good  bye.<end_of_turn>"


@pytest.mark.parametrize(("also", "expected"), [((), "</s>"), (("<|user|>",), "<|user|>")])
def test_turn_without_an_end_token_ends_in_the_next_turns_first_if_the_model_stops_there(also, expected):
    """As GLM-4, whose template writes no end token, and whose model stops by opening the user's turn."""
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tokenizer = byte_tokenizer(chat_template=template, extra_special_tokens=("<|user|>", "<|assistant|>"))
    end_token_ids = (tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(token) for token in also))
    (row,) = render([{"messages": MESSAGES}], tokenizer, end_token_ids)
    assert tokenizer.decode(row["chosen_ids"]) == "Good  bye." + expected


# Rendered once


def tokenise(rows: str, cache: str, was_used: bool) -> tuple[int, list]:
    """How often the tokenizer was called for the ground truths of a file, and what they are."""
    tokenizer = letter_tokenizer(kind=CountingTokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    if was_used:  # which changes its state, but not what it renders
        tokenizer(["a", "aaa"], padding=True, truncation=True, max_length=2)
    dataset = load_dataset("json", data_files=rows, split="train", cache_dir=cache)
    before = tokenizer.num_calls
    chosen_ids = tokenize_dataset(dataset, tokenizer, (1,)).dataset["chosen_ids"][:]
    return tokenizer.num_calls - before, chosen_ids


def test_another_process_does_not_tokenise_again(tmp_path):
    rows, cache = str(tmp_path / "rows.jsonl"), str(tmp_path / "cache")
    Dataset.from_list([{"prompt": f"{letter}a", "completion": "b"} for letter in "abc"]).to_json(rows)
    num_calls, chosen_ids = tokenise(rows, cache, False)
    assert num_calls > 0
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(tokenise, (rows, cache, True)) == (0, chosen_ids)


def num_rendered(**settings) -> int:
    """Calls of the tokenizer, two a row, when rows of letters are tokenised."""
    tokenizer = settings.setdefault("tokenizer", letter_tokenizer(kind=CountingTokenizer))
    settings.setdefault("dataset", Dataset.from_list([{"prompt": "ab", "completion": "c"}] * 2))
    tokenized = tokenize_dataset(**{"end_token_ids": (1,), **settings}).dataset
    assert tokenized.cache_files  # they lie in a file, not in memory
    return tokenizer.num_calls // 2


def test_same_rows_are_tokenised_once_in_a_process_even_in_memory():
    assert [num_rendered(prompt_column="prompt", completion_column="completion") for _ in range(3)] == [2, 0, 0]


def test_rows_are_tokenised_again_where_they_could_come_out_otherwise():
    num_rendered()
    for change in (
        {"dataset": Dataset.from_list([{"prompt": "ab", "completion": "d"}] * 2)},
        {"end_token_ids": (2,)},
        {"tokenizer": letter_tokenizer(kind=CountingTokenizer, chat_template="{{ messages }}")},
        {"skip_invalid_rows": True},
        {"prompt_column": "completion", "completion_column": "prompt"},
    ):
        assert (num_rendered(), num_rendered(**change)) == (0, 2), change
