"""A conversation through the tokenizer's chat template -> the ids which a sampler would have seen and said.

Knows nothing of datasets and of row numbers.
"""

import os
from collections.abc import Collection
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import remove_none_values

from .games import Game, InvalidRowError


_QUESTION = {"role": "user", "content": "What is the question?"}
_ANSWER = {"role": "assistant", "content": "This is the answer."}
_CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": "y"}}}]}
_RESULT = {"role": "tool", "name": "f", "content": "This is the result."}


class ChatTemplate:
    """
    Renders conversations, such that a sampler which repeats the ground truth gives the same ids.

    Two things that templates differ in are found out once, with a conversation of two messages: whether a content must
    be given as a list of parts (some vision models' templates silently drop plain text), and which token ends a turn
    where the template writes none (GLM-4: the one that opens the next turn, the user's or the tool's).

    Raises:
        `ValueError`: if the tokenizer has no template, or one that leaves out what the messages say.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        end_token_ids: Collection[int],
        template_kwargs: dict[str, Any] | None = None,
    ):
        if tokenizer.chat_template is None:
            raise ValueError(
                "The dataset is conversational, but the tokenizer has no chat template. Set `tokenizer.chat_template` "
                "to the model's own and pass the tokenizer as `processing_class`; for a base model give the prompts "
                "and ground truths as text, or add a template with `trl.clone_chat_template`."
            )
        self.tokenizer = tokenizer
        self.end_token_ids = tuple(end_token_ids)
        self.template_kwargs = template_kwargs or {}
        self.wants_parts = self._wants_parts()
        self.answer_end = self._find_opening_of([_QUESTION, _ANSWER], _QUESTION)
        self.call_end = self._find_opening_of([_QUESTION, _CALL], _RESULT)

    def render(self, game: Game, /, **template_kwargs) -> tuple[list[int], list[int]]:
        """
        Prompt and ground truth of a game of messages as token ids; the ground truth ends in exactly one end token.
        `template_kwargs` are for this conversation and win over those for every one.

        Raises:
            `InvalidRowError`: if the template refuses the messages, renders the prompt differently from the beginning
            of the conversation, leaves out the ground truth, or ends it in a token at which the model does not stop.
        """
        prompt = self._text(game.prompt, game.prompt_name, add_generation_prompt=True, **template_kwargs)
        whole = self._text(game.prompt + game.completion, game.completion_name, **template_kwargs)
        prompt_ids, whole_ids = self._ids(prompt), self._ids(whole)
        if whole_ids[: len(prompt_ids)] == prompt_ids:
            completion_ids = whole_ids[len(prompt_ids) :]
        elif whole.startswith(prompt):  # tokens merge across the boundary; the sampler goes on from the prompt's
            completion_ids = self._ids(whole[len(prompt) :])
        else:
            common = len(os.path.commonprefix([prompt, whole]))
            raise InvalidRowError(
                f"the chat template renders {game.prompt_name} differently from the beginning of the whole "
                f"conversation. Alone it ends in {prompt[common:]!r}, the conversation goes on with "
                f"{whole[common : common + 20]!r}. The policy would be trained on a context that the opponent never "
                "saw. Set `chat_template_kwargs`, in the config or as a column, such that the two agree (for example "
                "{'enable_thinking': False}), or use another chat template."
            )
        chosen_ids = self._end_turn(completion_ids, bool(game.completion[0].get("tool_calls")))
        if not self.tokenizer.decode(chosen_ids[:-1]).strip():
            raise InvalidRowError(
                f"the chat template writes nothing of {game.completion_name}. It may not support tool calls; use one "
                "that does, or remove the row."
            )
        return prompt_ids, chosen_ids

    def _text(self, messages: list[dict], name: str, **template_kwargs) -> str:
        try:
            return self._apply(messages, **template_kwargs)
        except (TemplateError, TypeError) as error:
            raise InvalidRowError(
                f"the chat template refuses {name}, whose conversation has the roles "
                f"{[message['role'] for message in messages]}: {error}"
            ) from error

    def _apply(self, messages: list[dict], /, **template_kwargs) -> str:
        # Arrow fills what this message has not, and others have, with None. Templates loop over it, or write "None".
        messages = [{"content": "", **remove_none_values(message)} for message in messages]
        if self.wants_parts:
            messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, **{**self.template_kwargs, **template_kwargs}
        )

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _end_turn(self, completion_ids: list[int], is_call: bool) -> list[int]:
        next_turn_opens_with = self.call_end if is_call else self.answer_end
        if next_turn_opens_with is not None:
            completion_ids = [*completion_ids, next_turn_opens_with]
        ended = end_after_first(completion_ids, self.end_token_ids)
        last = next((i for i in reversed(completion_ids) if self.tokenizer.decode([i]).strip()), None)
        if len(ended) > len(completion_ids) and last in self.tokenizer.added_tokens_decoder:
            token, *known = self.tokenizer.convert_ids_to_tokens([last, *self.end_token_ids])
            raise InvalidRowError(
                f"the chat template ends the assistant's turn in {token!r}, at which the model does not stop (its end "
                f"tokens are {known}), so no answer could ever equal the ground truth. If the model does end its turns "
                f"with it, add its id, {last}, to `eos_token_id` in the model's `generation_config`; otherwise the "
                "template belongs to another model."
            )
        return ended

    def _wants_parts(self) -> bool:
        said, texts = [_QUESTION["content"], _ANSWER["content"]], []
        for self.wants_parts in (False, True):
            texts.append(self._try([_QUESTION, _ANSWER]))
            if texts[-1] is not None and all(content in texts[-1] for content in said):
                return self.wants_parts
        if texts == [None, None]:  # the rows will show what it takes
            return False
        raise ValueError(
            f"The tokenizer's chat template renders a conversation without what its messages say ({said}). Set "
            "`tokenizer.chat_template` to the model's own, and pass the tokenizer as `processing_class`."
        )

    def _find_opening_of(self, conversation: list[dict], next_message: dict) -> int | None:
        """The token that the template puts before the next message, if it is one at which the model stops."""
        texts = [self._try(conversation), self._try([*conversation, next_message])]
        if None in texts:
            return None
        before, after = map(self._ids, texts)
        opening = after[len(before) : len(before) + 1] if after[: len(before)] == before else []
        return opening[0] if opening and opening[0] in self.end_token_ids else None

    def _try(self, messages: list[dict]) -> str | None:
        try:
            return self._apply(messages)
        except (TemplateError, TypeError):
            return None


def end_after_first(completion_ids: list[int], end_token_ids: Collection[int]) -> list[int]:
    """
    Cut a ground truth after its first end token, or add one: a sampler emits exactly one, and nothing after it. From
    what templates write behind it, such as a newline, the policy would learn to tell ground truth from generation.
    """
    for position, token_id in enumerate(completion_ids):
        if token_id in end_token_ids:
            return completion_ids[: position + 1]
    return [*completion_ids, next(iter(end_token_ids))]
