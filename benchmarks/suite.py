"""All benchmarks of scale and speed, one after the other: `make bench [ARGS="generation client"]`, only some of them.

Each is a script of its own, which prints its figures and writes them to `runs/benchmarks/NAME.json`.
"""

import os
import subprocess
import sys

from measure import ROOT


BENCHMARKS = ("client", "generation", "training", "iteration", "publish", "scale")


def main(names: list[str]) -> None:
    unknown = set(names) - set(BENCHMARKS)
    if unknown:
        raise SystemExit(f"Unknown benchmark(s) {sorted(unknown)}; there are {', '.join(BENCHMARKS)}.")
    failed = []
    for name in names or BENCHMARKS:
        print(f"== {name}", flush=True)
        script = str(ROOT / "benchmarks" / f"{name}.py")
        done = subprocess.run([sys.executable, script], cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        if done.returncode != 0:
            failed.append(name)
    if failed:
        raise SystemExit(f"Failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main(sys.argv[1:])
