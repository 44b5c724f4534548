"""Generation of one iteration by hand, as users do it without a trainer for it: an offline vLLM script.

    python benchmarks/loop_generate.py MODEL SFT_FILE PAIRS_FILE SEED

Reads JSON lines with `prompt` and `completion`, writes JSON lines with `prompt`, `chosen` and `rejected`.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main(model: str, sft_file: str, pairs_file: str, seed: str) -> None:
    rows = [json.loads(line) for line in Path(sft_file).read_text().splitlines()]
    llm = LLM(model, dtype="float32", max_model_len=64, enforce_eager=True, generation_config="vllm", seed=int(seed))
    sampled = llm.generate([row["prompt"] for row in rows], SamplingParams(temperature=1.0, max_tokens=16))
    with open(pairs_file, "w") as file:
        for row, output in zip(rows, sampled, strict=True):
            pair = {"prompt": row["prompt"], "chosen": row["completion"], "rejected": output.outputs[0].text}
            file.write(json.dumps(pair) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
