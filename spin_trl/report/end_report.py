"""The report that a run writes when it is over. A run whose report fails is a run all the same."""

import logging
from pathlib import Path

from tqdm import tqdm


logger = logging.getLogger(__name__)


def write_end_report(output_dir: str | Path) -> None:
    """Write `report.html`; whatever keeps it from being written is a warning."""
    try:
        from . import write_report

        path = write_report(output_dir)
    except Exception as error:
        logger.warning(
            f"The report is not written ({type(error).__name__}: {error}). The run is complete without it; to try "
            f"again: python -m spin_trl.report {output_dir}"
        )
    else:
        tqdm.write(f"Report: {path}")
