"""All benchmarks of scale and speed, one after the other: `make bench [ARGS="--quick generation scale"]`.

Each is a script of its own, which prints its figures and writes them to `runs/benchmarks/NAME.json`.
"""

import subprocess
import sys

from measure import ROOT, parse, parser


BENCHMARKS = ("generation", "training", "iteration", "publish", "scale")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], help="by default all")
    options = parse(arguments)
    common = ["--output", str(options.output), *(["--quick"] if options.quick else [])]
    failed = []
    for name in options.names or BENCHMARKS:
        print(f"== {name}", flush=True)
        done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *common], cwd=ROOT)
        failed += [name] if done.returncode != 0 else []
    if failed:
        raise SystemExit(f"Failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
