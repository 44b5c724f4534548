"""Writes the tables of `docs/configuration.md` from `SPINConfig`'s docstring: `make docs`. The rest stays."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

from spin_trl import SPINConfig
from spin_trl.config_checks import parameter_texts


PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
BEGIN, END = "<!-- fields: written by `make docs` -->\n", "<!-- end of fields -->\n"


def tables() -> str:
    """One Markdown table for each group of fields in the docstring."""
    docstring, texts = inspect.getdoc(SPINConfig).partition("> [!NOTE]")[0], parameter_texts(SPINConfig)
    defaults = {field.name: field.default for field in fields(SPINConfig)}
    lines = []
    for title, name in re.findall(r"^    > Parameters that control (.*)$|^    (\w+) \(", docstring, re.MULTILINE):
        if title:
            heading = f"## {title[0].upper()}{title[1:]}"
            lines += ["", heading, "", "| field | default | meaning |", "| --- | --- | --- |"]
        else:
            default = "unset" if defaults[name] is None else f"`{defaults[name]!r}`"
            meaning = texts[name].replace("|", "\\|")
            lines.append(f"| `{name}` | {default} | {meaning} |")
    return "\n".join(lines).lstrip("\n") + "\n"


def rewritten(page: str) -> str:
    """The page with its tables written anew."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
