"""Writes the tables of the docs that say what the code says: `make docs`. The rest of the pages stays.

`docs/configuration.md` has `SPINConfig`'s docstring, `docs/metrics.md` the metrics' meanings.
"""

import inspect
import re
from dataclasses import fields
from pathlib import Path

from spin_trl import SPINConfig
from spin_trl.config_checks import parameter_texts
from spin_trl.evaluation.metric_names import to_markdown


DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "configuration.md"
METRICS_PAGE = DOCS / "metrics.md"
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


def with_metrics(page: str) -> str:
    """The page on metrics with its table written anew."""
    before, rest = page.split("| metric |", 1)
    return f"{before}{to_markdown()}\n{rest.split(chr(10) * 2, 1)[1]}"


if __name__ == "__main__":
    METRICS_PAGE.write_text(with_metrics(METRICS_PAGE.read_text()))
    PAGE.write_text(rewritten(PAGE.read_text()))
