"""What the fields of a configuration may be, and what is said of them. Knows nothing of what they mean."""

import inspect
import json
import math
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin


@dataclass(frozen=True)
class NumberRule:
    """
    Which numbers a field takes. No field takes a boolean, infinity or not-a-number.

    Args:
        expected (`str`): Completes "must be ...", for the error.
        accepts (`Callable[[float], bool]`): Whether a number is allowed.
        whole (`bool`): Whether it has to be an integer.
        optional (`bool`): Whether `None` is allowed.
        remedy (`str`, *optional*): What to do. By default: leave the field unset.
        at_most (`str`, *optional*): Another field, whose value it must not exceed.
    """

    expected: str
    accepts: Callable[[float], bool]
    whole: bool = False
    optional: bool = False
    remedy: str | None = None
    at_most: str | None = None


def at_least(minimum: int, optional: bool = False) -> NumberRule:
    """Whole numbers from `minimum` on."""
    return NumberRule(f"at least {minimum}", lambda value: value >= minimum, whole=True, optional=optional)


def positive(expected: str = "positive", **others: Any) -> NumberRule:
    """Numbers above zero; `others` are arguments of the rule."""
    return NumberRule(expected, lambda value: value > 0, **others)


def not_negative(expected: str = "at least 0", optional: bool = False) -> NumberRule:
    """Zero and all above."""
    return NumberRule(expected, lambda value: value >= 0, optional=optional)


def share(remedy: str) -> NumberRule:
    """Numbers above 0 and up to 1."""
    return NumberRule("in (0, 1]", lambda value: 0 < value <= 1, remedy=remedy)


def check_numbers(config: Any, rules: Mapping[str, NumberRule]) -> None:
    """`ValueError` for the first field whose value is no number, or none that its rule allows."""
    for name, rule in rules.items():
        value = getattr(config, name)
        if value is None and rule.optional:
            continue
        remedy = rule.remedy or _leave_unset(config, name)
        if not is_number(value) or (rule.whole and not isinstance(value, Integral)):
            kind = "a whole number" if rule.whole else "a finite number"
            raise ValueError(f"`{name}` must be {kind}, got {value!r} (`{type(value).__name__}`). {remedy}")
        if not rule.accepts(value):
            raise ValueError(f"`{name}` must be {rule.expected}, got {value}. {remedy}")
        if rule.at_most is not None and value > (limit := getattr(config, rule.at_most)):
            raise ValueError(
                f"`{name}` must be at most `{rule.at_most}`, which is {limit}, got {value}. Lower the one, or raise "
                "the other."
            )


def is_number(value: Any) -> bool:
    """Whether this is a finite number, and no boolean."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_choices(config: Any, annotations: Mapping[str, Any]) -> None:
    """`ValueError` for the first field that is annotated as a `Literal`, or that or `None`, and is none of these."""
    for name, annotation in annotations.items():
        literals = [kind for kind in (annotation, *get_args(annotation)) if get_origin(kind) is Literal]
        is_optional = type(None) in get_args(annotation)
        value = getattr(config, name)
        if literals and value not in get_args(literals[0]) and not (is_optional and value is None):
            raise ValueError(
                f"`{name}` must be one of {list(get_args(literals[0]))}, got {value!r}. {_leave_unset(config, name)}"
            )


def check_weights(name: str, weights: Any, remedy: str, minimum: float = -math.inf) -> None:
    """`ValueError` if the weights are no list of finite numbers of at least `minimum`, or all of them are 0."""
    if weights is None:
        return
    numbers = weights if isinstance(weights, list | tuple) else []
    if not any(numbers) or not all(is_number(weight) and weight >= minimum for weight in numbers):
        kind = "finite numbers" if minimum == -math.inf else f"numbers of at least {minimum:g}"
        raise ValueError(f"`{name}` must be a list of {kind}, not all of them 0, got {weights!r}. {remedy}")


def take_mappings(config: Any, names: tuple[str, ...]) -> None:
    """Read dicts that are JSON, as the command line gives them; `ValueError` for the first field that is no dict."""
    for name in names:
        value = getattr(config, name)
        try:
            found = json.loads(value) if isinstance(value, str) else value
        except json.JSONDecodeError:
            found = value
        if not isinstance(found, dict | None):
            raise ValueError(
                f"`{name}` must be a dict or JSON of one, got {value!r} (`{type(value).__name__}`). Write it such as "
                "'{\"key\": 0.9}', with double quotes."
            )
        setattr(config, name, found)


def check_arguments(name: str, value: Any, own_flags: Mapping[str, str]) -> None:
    """`ValueError` if it is no string of arguments as in a shell, or has one of `own_flags` (-> what to do instead)."""
    if value is None:
        return
    try:
        words = shlex.split(value)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"`{name}` must be one string, written as in a shell, got {value!r} ({error}). Write it such as "
            "'--max-num-seqs 64', and close every quotation mark."
        ) from None
    for word in words:
        flag = word.partition("=")[0].replace("_", "-")
        for own, remedy in own_flags.items():
            if len(flag) > len("--h") and own.startswith(flag):  # argparse takes abbreviations too
                raise ValueError(f"`{name}` has {word!r}, but the run sets `{own}` itself. {remedy}")


def check_addresses(name: str, value: Any) -> None:
    """`ValueError` if it is neither the address of a server nor a list of some, each once."""
    if value is None or isinstance(value, str):
        return
    if not isinstance(value, list | tuple) or not value or not all(isinstance(url, str) for url in value):
        raise ValueError(
            f"`{name}` must be the address of a server, or a list of at least one, got {value!r}. Write it such as "
            "'http://localhost:8000', or leave it unset."
        )
    servers = [url.rstrip("/").removesuffix("/v1") for url in value]
    if twice := sorted({server for server in servers if servers.count(server) > 1}):
        raise ValueError(f"`{name}` names {twice} more than once: {list(value)}. Name every server once.")


def _leave_unset(config: Any, name: str) -> str:
    field = config.__dataclass_fields__[name]
    default = field.default if field.default is not MISSING else field.default_factory()
    return f"Leave it unset for the default, {default!r}."


def parameter_texts(cls: type) -> dict[str, str]:
    """What a class' docstring says of each parameter, and of each inherited one that it notes, in one line each."""
    docstring = inspect.getdoc(cls) + "\n"
    found = re.findall(r"^    (\w+) \(.*\):\n((?:        .*\n)+)", docstring, re.MULTILINE)
    found += re.findall(r"^> - `(\w+)`: (.*\n(?:>   .*\n)*)", docstring, re.MULTILINE)
    return {name: " ".join(re.sub(r"^>", "", text, flags=re.MULTILINE).split()) for name, text in found}


def help_from_docstring(cls: type) -> type:
    """A decorator of dataclasses: the command line's help for the fields of this class is their docstring's text."""
    texts = parameter_texts(cls)
    for field in fields(cls):
        if field.name in cls.__annotations__:  # the others are the parent's own
            help_text = texts[field.name].replace("%", "%%")  # argparse formats it
            field.metadata = MappingProxyType({**field.metadata, "help": help_text})
    return cls
