"""Writes the tables of `docs/configuration.md` from `SPINConfig`'s docstring: `make docs`. The rest of it stays."""

import inspect
import re
import textwrap
from dataclasses import fields
from pathlib import Path

from spin_trl import SPINConfig


PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
BEGIN, END = "<!-- fields: written by `make docs` -->\n", "<!-- end of fields -->\n"


def tables() -> str:
    """One Markdown table for each group of fields in the docstring."""
    docstring = inspect.getdoc(SPINConfig).partition("Parameters:")[2].partition("> [!NOTE]")[0]
    defaults = {field.name: field.default for field in fields(SPINConfig)}
    lines = []
    for block in re.split(r"\n\s*\n", textwrap.dedent(docstring)):
        block = textwrap.dedent(block.strip("\n"))
        if block.startswith("> Parameters that control "):
            title = block.removeprefix("> Parameters that control ").strip()
            lines += [
                "",
                f"## {title[0].upper()}{title[1:]}",
                "",
                "| field | default | meaning |",
                "| --- | --- | --- |",
            ]
        else:
            lines += [_row(name, text, defaults) for name, text in re.findall(_ENTRY, block + "\n", re.MULTILINE)]
    return "\n".join(lines).lstrip("\n") + "\n"


_ENTRY = r"^(\w+) \(.*\):\n((?:    .*\n)+)"


def _row(name: str, text: str, defaults: dict) -> str:
    default = "unset" if defaults[name] is None else f"`{defaults[name]!r}`"
    meaning = " ".join(text.split()).replace("|", "\\|")
    return f"| `{name}` | {default} | {meaning} |"


def rewritten(page: str) -> str:
    """The page with its tables written anew."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
