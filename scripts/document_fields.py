"""Writes the tables of the docs that say what the code says: `make docs`. The rest of the pages stays.

`docs/configuration.md` has `SPINConfig`'s docstring, `docs/metrics.md` the metrics' meanings.
"""

import inspect
import re
import textwrap
from dataclasses import fields
from pathlib import Path

from spin_trl import SPINConfig
from spin_trl.evaluation.metric_names import to_markdown


DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "configuration.md"
METRICS_PAGE = DOCS / "metrics.md"
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


def with_metrics(page: str) -> str:
    """The page on metrics with its table written anew."""
    before, rest = page.split("| metric |", 1)
    return f"{before}{to_markdown()}\n{rest.split(chr(10) * 2, 1)[1]}"


if __name__ == "__main__":
    METRICS_PAGE.write_text(with_metrics(METRICS_PAGE.read_text()))
    PAGE.write_text(rewritten(PAGE.read_text()))
