"""`python -m spin_trl.report RUN_DIR`: write the report of a run, also of one that is still going on."""

import argparse
import sys

from ..run_directory.run_paths import RunDirectoryError
from .page import write_report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m spin_trl.report", description=__doc__)
    parser.add_argument("run_directory", metavar="RUN_DIR", help="`output_dir` of the run")
    parser.add_argument("--output", metavar="FILE", help="where to write; by default RUN_DIR/report.html")
    parser.add_argument(
        "--max_completions", type=int, default=2000, metavar="N", help="prompts to embed, at most (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of prompts (%(default)s)")
    parser.add_argument(
        "--pictures",
        action=argparse.BooleanOptionalAction,
        help="write charts as PNG files into the folder `report` beside the page; by default if matplotlib is there",
    )
    options = vars(parser.parse_args(arguments))
    try:
        print(write_report(**options))
    except (RunDirectoryError, OSError, ImportError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
