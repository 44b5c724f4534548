"""Speed and memory of one self-play iteration on a GPU, next to DPOTrainer with its reference model: `make bench-gpu`.

Both sides train a Llama of 0.8 billion parameters, made from its configuration, for two epochs on as many pairs of as
many tokens, in bfloat16 with gradient checkpointing; once with a LoRA adapter and once with all weights. `DPOTrainer`
computes its reference in every step, with the adapter off or with a second model. `SPINTrainer` computes it once,
before the first step, which is part of its time; its answers are prepared. What answering in-process takes is timed
apart. Each side runs in a process of its own, in turn.

Without an NVIDIA GPU it says so and ends with success; `--device cpu --quick` shows that the code runs.
"""

from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from measure import as_text, fresh_processes, parse, parser, read_metrics, write_result
from training import Workload, compare, spin_to_dpo

from spin_trl import SPINConfig, SPINTrainer


MORE_PAIRS_PER_SECOND, LESS_MEMORY = 1.0, 1.0  # targets: at least, and at most, DPOTrainer's
FULL = Workload(
    hidden_size=1536,
    intermediate_size=4096,
    num_layers=24,
    vocab_size=32_000,
    num_pairs=256,
    prompt_length=128,
    answer_length=256,
    spread=0.0,
    longest=512,
    device="cuda",
    bf16=True,
)
QUICK = {"hidden_size": 64, "intermediate_size": 64, "num_layers": 1, "vocab_size": 512}
QUICK |= {"prompt_length": 8, "answer_length": 16}


def generated_tokens_per_second(workload: Workload) -> float:
    """Of the policy that answers in-process, with a batch of 64 prompts."""
    rows = [
        {"prompt": as_text(x["prompt_ids"]), "completion": as_text(x["chosen_ids"][:-1])} for x in workload.make_pairs()
    ]
    with TemporaryDirectory() as folder:
        workload.make_model(Path(folder, "model"))
        config = SPINConfig(
            **workload.settings(Path(folder, "run")),
            num_iterations=1,
            max_steps=1,
            max_completion_length=workload.answer_length,
            use_vllm=False,
            report=False,
        )
        trainer = SPINTrainer(
            str(Path(folder, "model")), config, train_dataset=Dataset.from_list(rows), peft_config=workload.adapter()
        )
        trainer.train()
        return read_metrics(Path(folder, "run"))[0]["tokens_per_second"]


def main() -> None:
    arguments = parser(__doc__, rounds=3)
    arguments.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments.add_argument("--pairs", type=int, default=FULL.num_pairs)
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print('Skipped: there is no NVIDIA GPU here. `ARGS="--device cpu --quick"` shows that the benchmark runs.')
        return
    full = replace(FULL, num_pairs=options.pairs, device=options.device)
    if options.quick:
        full = replace(full, num_pairs=8, num_epochs=1, **QUICK)
    result = {"device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU", **asdict(full)}
    for kind, workload in {"lora": replace(full, lora=True, dtype="bfloat16"), "full": full}.items():
        figures = compare(workload, ["spin", "dpo"], options.rounds)
        faster, larger = spin_to_dpo(figures, "pairs_per_second"), spin_to_dpo(figures, "peak_bytes")
        with fresh_processes("training") as pool:
            generated = pool.submit(generated_tokens_per_second, workload).result()
        print(f"{kind}: {faster:.2f} times DPOTrainer's pairs a second (target: at least {MORE_PAIRS_PER_SECOND})")
        print(f"{kind}: {larger:.2f} times its peak memory (target: at most {LESS_MEMORY})")
        print(f"{kind}: {generated:,.0f} tokens a second generated in-process", flush=True)
        ratios = {"pairs_per_second_ratio": faster, "peak_memory_ratio": larger}
        result[kind] = {"figures": figures, **ratios, "generated_tokens_per_second": generated}
    write_result(options, "gpu", result)


if __name__ == "__main__":
    main()
