"""A run directory -> one page that shows it, `report.html`. Knows nothing of the trainer, of torch and of models.

It reads files only, so it works while the run goes on, and on a machine without a GPU. The parts of
the page: `run_data` (everything that it shows), `decoding` (token ids -> text), `sections` and `summary` (what of it),
`charts` (numbers -> SVG), `page` (all of it -> HTML), `pictures` (PNG files). Beside it: logs, model card and hub.
"""

from pathlib import Path
from typing import Any


def write_report(run_directory: str | Path, output: str | Path | None = None, **options: Any) -> Path:
    """Write the report of a run; see [`report.page.write_report`]."""
    from .page import write_report  # on first use: a page needs Arrow, which takes its time to load

    return write_report(run_directory, output, **options)
