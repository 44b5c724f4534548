"""What is known of a run -> one HTML page that needs nothing else: no server, no network.

All text from data passes through Jinja's escaping or into a JSON block in which no tag can begin; the page's script
makes text nodes of it. The content security policy allows this style and this script, by their hashes, and nothing
else.
"""

import base64
import hashlib
import json
import logging
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup
from tqdm import tqdm

from ..run_directory.whole_files import write_text
from . import sections, summary
from .charts import TEMPLATES, table
from .pictures import write_pictures
from .run_data import RunData, read_run


logger = logging.getLogger(__name__)


def write_report(
    run_directory: str | Path,
    output: str | Path | None = None,
    max_completions: int = 2000,
    seed: int = 0,
    pictures: bool | None = None,
) -> Path:
    """
    Write the report of a run, also of one that is still going on.

    Args:
        output (`str` or `Path`, *optional*): Where to write it. By default `report.html` in the run directory.
        max_completions (`int`): Number of prompts whose completions are embedded, at most; `seed` chooses them.
        pictures (`bool`, *optional*): Whether to write the main charts as PNG files into the folder `report` beside the
            page, which needs matplotlib. By default where that is installed.

    Raises:
        [`RunDirectoryError`]: if there is no run.
        `ImportError`: if pictures are asked for and matplotlib is missing.
    """
    run = read_run(run_directory, max_completions, seed)
    path = Path(run_directory, "report.html") if output is None else Path(output)
    write_text(path.absolute(), render(run, seed))
    write_pictures(run, path.absolute().parent / "report", pictures)
    return path


def write_end_report(output_dir: str | Path) -> None:
    """The report that a run writes when it is over; whatever keeps it from being written is a warning."""
    try:
        path = write_report(output_dir)
    except Exception as error:
        logger.warning(
            f"The report is not written ({type(error).__name__}: {error}). The run is complete without it; to try "
            f"again: python -m spin_trl.report {output_dir}"
        )
    else:
        tqdm.write(f"Report: {path}")


def render(run: RunData, seed: int = 0) -> str:
    """The page as text."""
    style, script = _resource("page.css"), _resource("page.js")
    steps, more_steps = sections.step_charts(run)
    settings_title, settings = _settings(run)
    return TEMPLATES.get_template("page.html").render(
        name=run.directory.absolute().name,
        model=run.description.get("model"),
        directory=run.directory.absolute(),
        state=summary.state_of(run),
        now=time.strftime("%Y-%m-%d %H:%M %Z"),
        tiles=summary.tiles_of(run),
        remarks=summary.remarks_of(run),
        problems=run.problems,
        scores=sections.score_charts(run),
        steps=steps,
        more_steps=more_steps,
        lengths=sections.length_charts(run),
        iterations=sections.iteration_charts(run),
        time=sections.time_chart(run),
        metrics=sections.metrics_table(run),
        facts=_facts(run),
        settings_title=settings_title,
        settings=settings,
        num_shown=len(run.prompts),
        num_prompts=run.num_prompts,
        seed=seed,
        style=style,
        script=script,
        style_hash=_hash_of(style),
        script_hash=_hash_of(script),
        data=_json_block({"iterations": list(run.rejected_lengths), "prompts": run.prompts}),
    )


def _resource(name: str) -> Markup:
    return Markup(files(__package__).joinpath(name).read_text(encoding="utf-8"))


def _hash_of(text: str) -> Markup:
    """As a content security policy names what it allows."""
    return Markup("sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode())


def _json_block(value: Any) -> Markup:
    """JSON in which no tag can begin and none can end."""
    text = json.dumps(value, ensure_ascii=True)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _facts(run: RunData) -> list[tuple[str, str]]:
    names = ("model", "adapter", "sampler", "training", "data", "versions")
    facts = [(name.capitalize(), run.description.get(name)) for name in names]
    facts += [(f"Start {n}", start) for n, start in enumerate(run.description.get("starts") or [], 1)]
    return [(name, _text_of(value)) for name, value in facts if value]


def _text_of(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_text_of(inner)}" for name, inner in value.items() if inner is not None)
    return value if isinstance(value, str) else json.dumps(value)


def _settings(run: RunData) -> tuple[str, Markup]:
    names = run.description.get("changed_settings", [])
    title = f"{len(names)} settings that differ from the defaults"
    return title, table(["setting", "value"], [[name, _text_of(run.config.get(name))] for name in names])
