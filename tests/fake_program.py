"""A small program in place of vLLM's: `fake_program.py FOLDER SOCKET`.

Files in the folder say how it fares: with "broken" it ends at once, with "slow" it does not come up, and it refuses
paths that contain what "refuse" holds. It writes down what it is asked to do in "asked".
"""

import sys
import threading
import time
from pathlib import Path

from fault_server import Answer, FakeVLLM, FaultyServer


_TO_DO = ("/sleep", "/wake_up", "/reset_prefix_cache")


def main(folder: Path, path: str) -> None:
    print("starting", flush=True)
    if (folder / "broken").exists():
        sys.exit("RuntimeError: out of memory")
    while (folder / "slow").exists():
        time.sleep(0.05)
    fake = FakeVLLM()

    def answer(path: str, body: dict | None) -> Answer:
        if path.startswith(_TO_DO):
            with (folder / "asked").open("a") as file:
                file.write(f"{path}\n")
        refused = folder / "refuse"
        return (400, "refused") if refused.exists() and refused.read_text() in path else fake(path, body)

    FaultyServer(path, answer)
    threading.Event().wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
