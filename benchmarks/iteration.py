"""Three whole iterations on the pronunciation data: one run of `recipes/spin.py` against the loop done by hand.

    make bench ARGS=iteration

The loop by hand is what TRL#2958 describes: in each iteration an offline vLLM script (`loop_generate.py`), then a DPO
run (`loop_dpo.py`). Both start from the demo's SFT model (made first, if it is not there), in full fine-tuning, with
the settings of `recipes/pronunciation.yaml`, without evaluation. Target: at most 0.55 of the loop's wall-clock seconds.
About five minutes on two CPU cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import RESULTS, ROOT, in_turn, ratio, write_result


NUM_ITERATIONS = 3
TARGET = 0.55
START = ROOT / "runs" / "pronunciation" / "sft"
DATA = ROOT / "recipes" / "data" / "pronunciation" / "accent_train.jsonl"
LAUNCH = [str(Path(sys.executable).parent / "accelerate"), "launch", "--num_processes", "1", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--cpu"]
LAUNCH += ["--num_cpu_threads_per_process", str(os.cpu_count())]


def run(command: list[str | Path]) -> float:
    """Seconds that a command takes. Ends the benchmark if it fails."""
    started = time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run([str(word) for word in command], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{command} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return time.perf_counter() - started


class SpinRun:
    """One command for all iterations. `phases` holds the seconds of each phase, added up, of every round."""

    def __init__(self):
        self.phases: list[dict[str, float]] = []

    def __call__(self) -> float:
        with tempfile.TemporaryDirectory(dir=RESULTS) as folder:
            # The recipe's evaluation needs its file; a configuration without it is written.
            recipe = (ROOT / "recipes" / "pronunciation.yaml").read_text().splitlines(keepends=True)
            config = Path(folder, "spin.yaml")
            config.write_text("".join(x for x in recipe if not x.startswith(("eval_file", "generation_metrics"))))
            output_dir = Path(folder, "run")
            settings = ["--config", config, "--num_iterations", str(NUM_ITERATIONS), "--output_dir", output_dir]
            seconds = run([*LAUNCH, "recipes/spin.py", *settings])
            phases: dict[str, float] = {}
            for path in output_dir.glob("iteration-*/metrics.json"):
                for name, value in json.loads(path.read_text()).items():
                    if name.startswith("seconds_"):
                        phases[name] = phases.get(name, 0.0) + value
            self.phases.append({name: round(value, 1) for name, value in phases.items()})
        return seconds


class LoopByHand:
    """Two commands in each iteration. `phases` holds the seconds of both, added up, of every round."""

    def __init__(self):
        self.phases: list[dict[str, float]] = []

    def __call__(self) -> float:
        generating = training = 0.0
        with tempfile.TemporaryDirectory(dir=RESULTS) as folder:
            model = START
            for iteration in range(NUM_ITERATIONS):
                pairs, trained = Path(folder, f"{iteration}.jsonl"), Path(folder, f"model-{iteration}")
                arguments = [model, DATA, pairs, str(iteration)]
                generating += run([sys.executable, "benchmarks/loop_generate.py", *arguments])
                training += run([*LAUNCH, "benchmarks/loop_dpo.py", model, pairs, trained, str(iteration)])
                model = trained
        self.phases.append({"generation scripts": round(generating, 1), "DPO runs": round(training, 1)})
        return generating + training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if not START.is_dir():
        run([sys.executable, "recipes/pronunciation_sft.py"])
    sides = {"spin": SpinRun(), "loop": LoopByHand()}
    seconds = in_turn(sides, options.rounds)
    share = ratio(seconds, "spin", to="loop")
    for name, side in sides.items():
        print(f"{name}: {', '.join(f'{s:.0f} s' for s in seconds[name])}; of these {side.phases}")
    print(f"spin / loop: {share:.2f} (target: at most {TARGET})")
    phases = {name: side.phases for name, side in sides.items()}
    write_result("iteration", {"seconds": seconds, "phases": phases, "spin_to_loop": share, "at_most": TARGET})


if __name__ == "__main__":
    main()
