"""A run directory -> one page that shows it, `report.html`. Knows nothing of the trainer, of torch and of models.

It reads files only, so it works while the run goes on, and on a machine without a GPU. The parts of
the page: `run_data` (everything that it shows), `decoding` (token ids -> text), `sections` and `summary` (what of it),
`charts` (numbers -> SVG), `page` (all of it -> HTML), `pictures` (PNG files). Beside it: logs, model card and hub.
"""

from .page import write_report


__all__ = ["write_report"]
