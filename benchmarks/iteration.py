"""Three whole iterations on the pronunciation data: one run of `recipes/spin.py` against the loop done by hand.

    make bench ARGS=iteration

The loop by hand is what TRL#2958 describes: in each iteration an offline vLLM script (`loop_generate.py`), then a DPO
run (`loop_dpo.py`). Both start from the demo's SFT model (made first, if it is not there), in full fine-tuning, with
the settings of `recipes/pronunciation.yaml`, without evaluation. Target: at most 0.55 of the loop's wall-clock seconds.
About five minutes on two CPU cores.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import (
    RECIPES,
    ROOT,
    flags,
    in_turn,
    make_untrained_start,
    parse,
    parser,
    ratio,
    read_metrics,
    run,
    run_script,
    write_demo_config,
    write_result,
)


NUM_ITERATIONS = 3
TARGET = 0.55
START = ROOT / "runs" / "pronunciation" / "sft"
DATA = RECIPES / "data" / "pronunciation" / "accent_train.jsonl"
PHASES = ("publish", "generate", "score", "train")
Phases = dict[str, float]


def spin(start: Path, data: Path, options: argparse.Namespace) -> Phases:
    """One command for all iterations. Seconds in all, and of each phase."""
    without = ["eval_file", "generation_metrics"]
    changes = {"model_name_or_path": str(start), "train_file": str(data), "num_iterations": options.iterations}
    if options.quick:
        changes |= {"use_vllm": False, "max_completion_length": 4}
    with TemporaryDirectory(dir=options.output) as folder:
        write_demo_config(Path(folder, "spin.yaml"), without, **changes)
        arguments = flags(config=f"{folder}/spin.yaml", output_dir=f"{folder}/run")
        seconds = run_script("recipes/spin.py", *arguments, is_quick=options.quick)
        metrics = read_metrics(Path(folder, "run"))
    return {"all": seconds, **{phase: sum(m[f"seconds_{phase}"] for m in metrics) for phase in PHASES}}


def loop(start: Path, data: Path, options: argparse.Namespace) -> Phases:
    """Two commands in each iteration. Seconds in all, and of both."""
    generating = training = 0.0
    with TemporaryDirectory(dir=options.output) as folder:
        model = start
        for iteration in range(options.iterations):
            pairs, trained = Path(folder, f"{iteration}.jsonl"), Path(folder, f"model-{iteration}")
            by_hand = ["benchmarks/loop_generate.py", model, data, pairs, iteration]
            engine = "transformers" if options.quick else "vllm"
            generating += run_script(*by_hand, engine, is_quick=options.quick, launch=False)
            training += run_script("benchmarks/loop_dpo.py", model, pairs, trained, iteration, is_quick=options.quick)
            model = trained
    return {"all": generating + training, "generation scripts": generating, "DPO runs": training}


def main() -> None:
    options = parse(parser(__doc__, rounds=1))
    options.iterations = 1 if options.quick else NUM_ITERATIONS
    with TemporaryDirectory() as folder:
        start, data = START, DATA
        if options.quick:
            start, data = Path(folder, "start"), Path(folder, "train.jsonl")
            make_untrained_start(start)
            data.write_text("".join(DATA.read_text().splitlines(keepends=True)[:8]))
        elif not start.is_dir():
            run([sys.executable, "recipes/pronunciation_sft.py"])
        sides = {"spin": lambda: spin(start, data, options), "loop": lambda: loop(start, data, options)}
        phases = in_turn(sides, options.rounds)
    seconds = {name: [one["all"] for one in rounds] for name, rounds in phases.items()}
    for name, rounds in phases.items():
        for one in rounds:
            print(f"{name}: {', '.join(f'{phase} {value:.1f}' for phase, value in one.items())} s")
    share = ratio(seconds, "spin", to="loop")
    print(f"spin / loop: {share:.2f} (target: at most {TARGET})")
    write_result(options, "iteration", {"seconds": phases, "spin_to_loop": share, "at_most": TARGET})


if __name__ == "__main__":
    main()
