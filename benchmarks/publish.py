"""Seconds to publish an opponent, from its save until the server has loaded it: a LoRA adapter against full weights.

    make bench ARGS=publish

Two runs of a Llama of 113 million parameters in float32, each with a real vLLM server and one training step an
iteration. What is counted is each iteration's `seconds_publish`, without the check of log-probs that belongs to it: the
policy is saved and the server loads it. Adapters are to be at least five times quicker.
"""

from contextlib import nullcontext
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
from datasets import Dataset
from measure import ON_THE_CPU, as_text, instant_server, make_model, parse, parser, read_metrics, write_result
from peft import LoraConfig

from spin_trl import SPINConfig, SPINTrainer


TARGET = 5.0
VOCAB_SIZE = 100
LORA = LoraConfig(r=16, target_modules="all-linear")


def seconds_of_publishing(
    model: Path, folder: Path, num_rounds: int, adapter: LoraConfig | None, address: str | None
) -> list[float]:
    """Of every opponent but the base model and the first, with a server at an address or one of its own."""
    server = {"use_vllm": True} if address is None else {"vllm_server_base_url": address}
    config = SPINConfig(
        output_dir=str(folder),
        **ON_THE_CPU,
        **server,
        num_iterations=num_rounds + 2,
        num_history_iterations=0,
        identical_pairs="keep",
        learning_rate=1e-4,
        per_device_train_batch_size=8,
        max_completion_length=8,
        publish_check_tolerance=None,
    )
    source = np.random.default_rng(0)
    texts = [as_text(source.integers(2, VOCAB_SIZE, 8).tolist()) for _ in range(16)]
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in zip(texts[:8], texts[8:], strict=True)]
    SPINTrainer(str(model), config, train_dataset=Dataset.from_list(rows), peft_config=adapter).train()
    return [metrics["seconds_publish"] for metrics in read_metrics(folder)[2:]]


def main() -> None:
    options = parse(parser(__doc__, rounds=5))
    hidden_size, num_layers = (64, 1) if options.quick else (768, 12)
    with TemporaryDirectory(dir=options.output) as temporary:
        folder, model = Path(temporary), Path(temporary, "model")
        num_parameters = make_model(model, VOCAB_SIZE, hidden_size, num_layers, longest=128)
        with instant_server(model) if options.quick else nullcontext() as address:
            seconds = {
                name: seconds_of_publishing(model, folder / name, options.rounds, adapter, address)
                for name, adapter in (("lora", LORA), ("full", None))
            }
    print(f"{num_parameters / 1e6:.0f} M parameters in float32, median of {options.rounds} opponents, seconds:")
    for name, values in seconds.items():
        print(f"{name}: {median(values):.2f}")
    speedup = median(seconds["full"]) / median(seconds["lora"])
    print(f"LoRA is {speedup:.1f} times quicker; the target is {TARGET:.0f}")
    figures = {"num_parameters": num_parameters, "seconds": seconds, "speedup": speedup, "target": TARGET}
    write_result(options, "publish", figures)


if __name__ == "__main__":
    main()
