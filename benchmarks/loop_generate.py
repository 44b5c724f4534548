"""Generation of one iteration by hand, as users do it without a trainer for it: an offline vLLM script.

    python benchmarks/loop_generate.py MODEL SFT_FILE PAIRS_FILE SEED [vllm|transformers]

Reads JSON lines with `prompt` and `completion`, writes JSON lines with `prompt`, `chosen` and `rejected`.
"""

import json
import sys
from pathlib import Path


def with_vllm(model: str, prompts: list[str], seed: int) -> list[str]:
    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype="float32", max_model_len=64, enforce_eager=True, generation_config="vllm", seed=seed)
    return [x.outputs[0].text for x in llm.generate(prompts, SamplingParams(temperature=1.0, max_tokens=16))]


def with_transformers(model: str, prompts: list[str], seed: int) -> list[str]:
    """For trials: it starts quicker."""
    from transformers import pipeline, set_seed

    set_seed(seed)
    answers = pipeline("text-generation", model)(prompts, do_sample=True, max_new_tokens=16, return_full_text=False)
    return [answer["generated_text"] for (answer,) in answers]


def main(model: str, sft_file: str, pairs_file: str, seed: str, engine: str = "vllm") -> None:
    rows = [json.loads(line) for line in Path(sft_file).read_text().splitlines()]
    generate = with_vllm if engine == "vllm" else with_transformers
    with open(pairs_file, "w") as file:
        for row, answer in zip(rows, generate(model, [row["prompt"] for row in rows], int(seed)), strict=True):
            file.write(json.dumps({"prompt": row["prompt"], "chosen": row["completion"], "rejected": answer}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
