"""What a run directory holds besides its iterations: the description, the lock, what is there at all.

Knows nothing of what lies in an iteration.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .arrow_directory import arrow_checksum
from .checkpoints import PLACE_FILE
from .description import without_secrets
from .disk import writing
from .run_paths import RunDirectoryError, is_numbered, numbered, own_path
from .whole_files import is_temporary, make_directory, remove, write_json, write_text


_FILES_OF_A_RUN = ("self_play.json", "invalid_rows.jsonl", "log.jsonl", "report.html", "report", "merged")
_KINDS = ("generations", "evaluation")


class RunFiles:
    """
    The files of one self-play run that are of no iteration.

    Args:
        output_dir (`str` or `Path`): The run directory. Nothing is written before the first write.
    """

    def __init__(self, output_dir: str | Path):
        self.output_dir = Path(output_dir).absolute()

    def path(self, iteration: int, *names: str) -> Path:
        """
        Path of an iteration's directory, or of something in it.

        Raises:
            [`RunDirectoryError`]: if a link leads out of the run directory on the way.
        """
        return self._own(f"iteration-{iteration:d}", *names)

    @property
    def server_log(self) -> Path:
        return self._own("vllm-server.log")

    @property
    def served_base(self) -> Path:
        """The base model as a managed server is to have it, where that is not the one that was passed."""
        return self._own("served-base")

    @property
    def log_file(self) -> Path:
        return self._own("log.jsonl")

    def _own(self, *names: str) -> Path:
        return own_path(self.output_dir, *names)

    # What is there

    def iterations(self) -> list[int]:
        """Numbers of the iterations that have been begun, ascending."""
        return list(numbered(self.output_dir, "iteration"))

    def checkpoints(self) -> list[Path]:
        """Trainer's checkpoints that are whole, the newest (the one of most steps) first."""
        found = numbered(self.output_dir, "checkpoint").values()
        return [path for path in found if (path / PLACE_FILE).exists()][::-1]

    # Run

    @contextmanager
    def lock(self) -> Iterator[None]:
        """
        Keep other processes from running here. A process that ends, in whatever way, lets go.

        Raises:
            [`RunDirectoryError`]: if another process runs here.
        """
        lock = FileLock(self.output_dir / ".lock")
        try:
            with writing(self.output_dir):
                make_directory(self.output_dir)
                lock.acquire(timeout=0)
        except Timeout:
            raise RunDirectoryError(
                f"Another process is running in `output_dir` ({self.output_dir}): it holds {lock.lock_file}. Wait for "
                "it, end it, or choose another `output_dir`."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def write_run(self, description: dict[str, Any]) -> None:
        write_json(self.output_dir / "self_play.json", without_secrets(description))

    def has_run(self) -> bool:
        return (self.output_dir / "self_play.json").exists()

    def mark_finished(self, **outcome: Any) -> None:
        """Note that nothing of the run is left to do, and what came of it."""
        self.write_run({**self.read_run(), **outcome, "finished": True})

    def read_run(self) -> dict[str, Any]:
        path = self.output_dir / "self_play.json"
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise RunDirectoryError(
                f"{path} is not JSON ({error}), so what was run here is not known. Choose another `output_dir`, or set "
                "`overwrite_output_dir=True` to delete this run."
            ) from error

    def write_invalid_rows(self, rows: list[dict[str, Any]]) -> None:
        """List the rows that were left out, one a line; no file where there are none."""
        path = self.output_dir / "invalid_rows.jsonl"
        if rows:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_text(path, text)
        else:
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete the self-play run that lies here, and Trainer's checkpoints of it. Anything else stays."""
        for path in self.output_dir.iterdir():
            if is_numbered(path) and (path.is_dir() or path.is_symlink()):
                remove(path)
        remove(self.served_base)
        self.clear_temporary()
        for name in ("train_data", "preference_data"):
            data = self.output_dir / name
            if data.is_symlink() or arrow_checksum(data) is not None:
                remove(data)
        for name in _FILES_OF_A_RUN:
            remove(self.output_dir / name)

    def clear_temporary(self) -> None:
        """Delete what an earlier process did not write to its end."""
        own = [self.path(number) for number in self.iterations()]
        for directory in (self.output_dir, *own, *(self.path(i) / kind for i in self.iterations() for kind in _KINDS)):
            if directory.is_dir() and not directory.is_symlink():
                for path in directory.iterdir():
                    if is_temporary(path):
                        remove(path)

    def forget_from(self, iteration: int) -> None:
        """Delete `iteration` and all later ones."""
        for number in self.iterations():
            if number >= iteration:
                remove(self.path(number))

    def forget_checkpoints_after(self, step: int) -> None:
        """Delete checkpoints of later steps, whole or not. Those that were there before the run are not its own."""
        data = self.output_dir / "train_data"
        for number, path in numbered(self.output_dir, "checkpoint").items():
            if number > step and data.exists() and path.stat().st_mtime > data.stat().st_mtime:
                remove(path)
