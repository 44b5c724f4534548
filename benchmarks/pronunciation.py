"""What the demo gives, over several seeds, next to further SFT with the same number of gradient steps.

    python benchmarks/pronunciation.py [--seeds 42 1 2] [--output runs/benchmarks/pronunciation.json]

Plays `recipes/pronunciation.yaml` once per seed, and trains the same starting model with `recipes/pronunciation_sft.py`
on the same 1,000 words for as many steps of the same batch size. Prints a Markdown table and writes JSON. Everything is
measured on the 1,000 words of `accent_test.jsonl`, answered greedily. About 15 minutes on two CPU cores.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
DATA = RECIPES / "data" / "pronunciation"
START = ROOT / "runs" / "pronunciation" / "sft"
SFT_LEARNING_RATES = ("3e-5", "3e-4")  # that of the demo, and the best known for SFT on these words
MEASURES = {"word_accuracy": "words right, %", "phone_error_rate": "phone error rate, %", "nll": "nats per token"}
LAUNCH = "accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --cpu"

sys.path.insert(0, str(RECIPES))


def run(command: list[str]) -> None:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def play_spin(seed: int, folder: Path) -> tuple[list[dict[str, float]], int]:
    """The scores at the start and after each iteration, and the number of gradient steps."""
    threads = ["--num_cpu_threads_per_process", str(os.cpu_count())]
    script = ["recipes/spin.py", "--config", "recipes/pronunciation.yaml", "--overwrite_output_dir", "true"]
    script += ["--seed", str(seed), "--output_dir", str(folder), "--disable_tqdm", "true"]
    run([*LAUNCH.split(), *threads, *script])
    metrics = [json.loads(path.read_text()) for path in sorted(folder.glob("iteration-*/metrics.json"))]
    config = json.loads((folder / "self_play.json").read_text())["config"]
    batches = [math.ceil(m["num_training_pairs"] / config["per_device_train_batch_size"]) for m in metrics[:-1]]
    return [m["evaluation"] for m in metrics], sum(batches) * config["epochs_per_iteration"]


def train_further(seed: int, learning_rate: str, num_steps: int, folder: Path) -> dict[str, float]:
    """The scores of the starting model after more SFT."""
    arguments = {
        "init_from": START,
        "train_file": DATA / "accent_train.jsonl",
        "output_dir": folder,
        "overwrite": "true",
        "seed": seed,
        "max_steps": num_steps,
        "learning_rate": learning_rate,
        "per_device_train_batch_size": 32,
        "warmup_steps": 0.1,
        "disable_tqdm": "true",
    }
    flags = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    run([sys.executable, "recipes/pronunciation_sft.py", *flags])
    return score(folder)


def score(folder: Path) -> dict[str, float]:
    """The demo's measures of a model in a folder."""
    import torch
    from datasets import Dataset
    from pronunciation_metrics import compute_generation_metrics
    from pronunciation_sft import pronounce
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = Dataset.from_json(str(DATA / "accent_test.jsonl"))
    prompts, references = list(rows["prompt"]), list(rows["completion"])
    total, num_tokens = 0.0, 0
    for prompt, reference in zip(prompts, references, strict=True):
        ids = tokenizer(prompt + reference + tokenizer.eos_token)["input_ids"]
        start = len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(logps[i - 1, ids[i]].item() for i in range(start, len(ids)))
        num_tokens += len(ids) - start
    return {
        **compute_generation_metrics(prompts, references, pronounce(model, tokenizer, prompts)),
        "nll": total / num_tokens,
    }


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: mean and sample standard deviation over the seeds."""
    lines = [f"| | {' | '.join(MEASURES.values())} |", "|---|" + "---|" * len(MEASURES)]
    for label, scores in rows.items():
        cells = []
        for name in MEASURES:
            factor, digits = (1, 3) if name == "nll" else (100, 1)
            values = [factor * s[name] for s in scores]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "benchmarks" / "pronunciation.json")
    options = parser.parse_args()
    if not START.is_dir():
        raise SystemExit(f"{START} is missing: make it with `python recipes/pronunciation_sft.py` (or `make demo`).")

    folder = options.output.parent / "pronunciation"
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:
        spin, num_steps = play_spin(seed, folder / f"spin-{seed}")
        for i, scores in enumerate(spin):
            rows.setdefault("start" if i == 0 else f"SPIN, after iteration {i - 1}", []).append(scores)
        for learning_rate in SFT_LEARNING_RATES:
            scores = train_further(seed, learning_rate, num_steps, folder / f"sft-{learning_rate}-{seed}")
            rows.setdefault(f"further SFT, {num_steps} steps at {learning_rate}", []).append(scores)
        print(f"seed {seed} done", flush=True)
    rows = dict(sorted(rows.items(), key=lambda item: item[0].startswith("further")))  # SPIN's rows first
    print(table(rows))
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    result = {"date": date.today().isoformat(), "machine": machine, "seeds": options.seeds, "rows": rows}
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{result['date']}, {machine}, seeds {options.seeds}. Written to {options.output}")


if __name__ == "__main__":
    main()
