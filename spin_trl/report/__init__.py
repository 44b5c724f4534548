"""A run directory -> one page that shows it, `report.html`. Knows nothing of the trainer, of torch and of models.

It reads files only, so it works while the run goes on, and on a machine without a GPU. The parts: `rows` (prompts and
completions on disk), `run_data` (everything a page shows), `decoding` (token ids -> text), `charts` (numbers -> SVG),
`page` (all of it -> HTML), `pictures` (PNG files).
"""

from pathlib import Path
from typing import Any


def write_report(run_directory: str | Path, output: str | Path | None = None, **options: Any) -> Path:
    """Write the report of a run; see [`report.page.write_report`]."""
    from .page import write_report  # on first use: a page needs Arrow, which takes its time to load

    return write_report(run_directory, output, **options)
