"""
That no chat template lets the policy tell ground truth from generation by its formatting, for every one TRL ships.

A sampler that says the conversation's own text, word for word, is simulated on that text: from the end of the prompt to
the first token at which the model stops. What it says must be the ground truth, token for token.
"""

from functools import cache

import pytest
from datasets import Dataset
from tiny_tokenizers import TEMPLATES, byte_tokenizer, special_tokens

from spin_trl.data.rendering import tokenize_dataset


SINGLE = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Yes,  dear."}]
MULTI = [*SINGLE, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Good bye\nand so on"}]
CONVERSATIONS = {"single": SINGLE, "multi": MULTI}

# Templates that are refused: their prompt ends in '<think>\\n', and nothing makes it a prefix of a conversation
# without thinking.
REFUSED = {name + suffix for name in ("deepseek_r1_distill", "deepseekv3") for suffix in ("", "_training")}

# Templates that are refused as they are, and what `chat_template_kwargs` makes them play.
NEEDS_KWARGS = {
    name + suffix: {"enable_thinking": False}
    for name in ("nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra")
    for suffix in ("", "_training")
}

# Templates that drop a content which is not a list of parts.
WANTS_PARTS = {name + suffix for name in ("idefics3", "llava_next", "smolvlm") for suffix in ("", "_training")}

# The end token, where it is not the first special token behind the answer.
END_TOKENS = {"cohere2": "<|END_OF_TURN_TOKEN|>", "cohere2_training": "<|END_OF_TURN_TOKEN|>", "glm4moe": "<|user|>"}

NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
PLAYED = [name for name in NAMES if name not in REFUSED]


class Case:
    """One template with a tokenizer of its own, in which the end of its turns is not the tokenizer's end token."""

    def __init__(self, name: str):
        source = (TEMPLATES / f"{name}.jinja").read_text()
        self.name = name
        self.kwargs = NEEDS_KWARGS.get(name, {})
        self.tokenizer = byte_tokenizer("<tokenizers_own_end>", name, special_tokens(source))
        self.end_token = END_TOKENS.get(name) or self._first_special_token_after_the_answer()
        self.end_token_ids = tuple(self.tokenizer.convert_tokens_to_ids(["<tokenizers_own_end>", self.end_token]))

    def text(self, messages: list[dict], **kwargs) -> str:
        if self.name in WANTS_PARTS:
            messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **self.kwargs, **kwargs)

    def _first_special_token_after_the_answer(self) -> str:
        _, answer, behind = self.text(SINGLE).rpartition(SINGLE[-1]["content"])
        assert answer
        ids = self.tokenizer(behind, add_special_tokens=False)["input_ids"]
        return self.tokenizer.decode(next(i for i in ids if i in self.tokenizer.added_tokens_decoder))

    def say(self, messages: list[dict]) -> tuple[list[int], list[int]]:
        """What a sampler is asked, and what it says that repeats the last message."""
        prompt, text = self.text(messages[:-1], add_generation_prompt=True), self.text(messages)
        if self.name == "glm4moe":
            text += self.end_token  # the template leaves it to the next turn to open with it
        prompt_ids, whole_ids = self.tokenizer([prompt, text], add_special_tokens=False)["input_ids"]
        assert whole_ids[: len(prompt_ids)] == prompt_ids
        said = whole_ids[len(prompt_ids) :]
        ends = [i for i, token_id in enumerate(said) if token_id in self.end_token_ids]
        return prompt_ids, said[: ends[0] + 1]


case_of = cache(Case)


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", PLAYED)
def test_sampler_that_repeats_the_ground_truth_gives_the_same_ids(name, messages):
    case = case_of(name)
    dataset, tokens = Dataset.from_list([{"messages": messages}]), (case.tokenizer, case.end_token_ids)
    (row,) = tokenize_dataset(dataset, *tokens, chat_template_kwargs=case.kwargs).dataset
    prompt_ids, said = case.say(messages)
    assert row["prompt_ids"] == prompt_ids
    assert row["chosen_ids"] == said
    assert case.tokenizer.decode(said[-1]) == case.end_token and not set(said[:-1]) & set(case.end_token_ids)
    prompt, truth = map(case.tokenizer.decode, (prompt_ids, said))
    assert all(message["content"] in prompt for message in messages[:-1]) and messages[-1]["content"] in truth


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", sorted([*REFUSED, *NEEDS_KWARGS]))
def test_template_whose_prompt_is_no_prefix_of_its_conversation_is_refused(name, messages):
    source = (TEMPLATES / f"{name}.jinja").read_text()
    tokenizer = byte_tokenizer("<end>", name, special_tokens(source))
    end_token_ids = (tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(special_tokens(source)))
    with pytest.raises(ValueError, match="Row 0: .* the prompt of `messages` differently.*goes on with.*_kwargs`"):
        tokenize_dataset(Dataset.from_list([{"messages": messages}]), tokenizer, end_token_ids)


def test_lists_of_exceptions_name_templates_that_trl_ships():
    assert {*REFUSED, *NEEDS_KWARGS, *WANTS_PARTS, *END_TOKENS} <= set(NAMES)
    assert len(PLAYED) == len(NAMES) - 4 >= 60
