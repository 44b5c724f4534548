"""Tokenizers made on the spot: of bytes or of letters, with whatever special tokens a test asks for."""

import re
from collections.abc import Iterable
from pathlib import Path

import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


TEMPLATES = Path(trl.__file__).parent / "chat_templates"

# <|im_end|>, <｜User｜>, <|turn>, <turn|>, <end_of_turn>, </s>, [INST]
_SPECIAL_TOKEN = re.compile(r"<[|｜][^\s<>{}'\"|｜]+[|｜]>|<\|\w+>|<\w+\|>|</?\w+>|\[/?[A-Z]+\]")


def special_tokens(template: str) -> list[str]:
    """Everything in a template's source that looks like a special token."""
    return sorted(set(_SPECIAL_TOKEN.findall(template)))


def byte_tokenizer(
    end_token: str | None = "</s>", chat_template: str | None = None, extra_special_tokens: Iterable[str] = ()
) -> PreTrainedTokenizerFast:
    """One token a byte, and the special ones. `chat_template` is the name of one of TRL's, or a template's source."""
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    wrapped.add_special_tokens({"bos_token": "<bos>", **({"eos_token": end_token} if end_token else {})})
    wrapped.add_tokens(list(extra_special_tokens), special_tokens=True)
    if chat_template is not None:
        path = TEMPLATES / f"{chat_template}.jinja"
        wrapped.chat_template = path.read_text() if "{" not in chat_template else chat_template
    return wrapped


class CountingTokenizer(PreTrainedTokenizerFast):
    """Counts how often it is called."""

    num_calls = 0

    def __call__(self, *args, **kwargs):
        self.num_calls += 1
        return super().__call__(*args, **kwargs)


def letter_tokenizer(
    template: str = "$A",
    merges: tuple = (),
    chat_template: str | None = None,
    kind: type[PreTrainedTokenizerFast] = PreTrainedTokenizerFast,
) -> PreTrainedTokenizerFast:
    """One token a letter, `<s>`, `</s>` and what `merges` makes of neighbours; `template` says what is put around."""
    letters = ["<s>", "</s>", *"abcdefgh", *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(letters)}, merges=list(merges)))
    tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=[("<s>", 0), ("</s>", 1)])
    wrapped = kind(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = chat_template
    return wrapped
