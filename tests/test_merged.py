"""The merged model: what it is, when it is made, and what one does with it next."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from spin_trl import SPINTrainer


# What README shows as the next step after SPIN, but for `model` and the settings of a test.
NEXT_STEP = """
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer


def shorter_is_better(completions, **kwargs):
    return [-len(completion) for completion in completions]


trainer = GRPOTrainer(
    model="out/merged",
    reward_funcs=shorter_is_better,
    args=GRPOConfig(output_dir="out/grpo", learning_rate=1e-6),
    train_dataset=Dataset.from_list([{"prompt": "Why is the sky blue?"}, {"prompt": "Why is the grass green?"}]),
)
trainer.train()
"""


@pytest.fixture
def play(tiny_model, train_dataset, eval_dataset, make_config):
    def make(train: bool = True, peft_config=None, model=tiny_model, **overrides) -> SPINTrainer:
        settings = {"num_iterations": 1, "save_strategy": "epoch", "resume": "auto", "merge_adapter_at_end": True}
        trainer = SPINTrainer(
            model,
            make_config(**{**settings, **overrides}),
            train_dataset=train_dataset.select(range(16)),
            peft_config=peft_config or LoraConfig(r=4, target_modules="all-linear"),
        )
        if train:
            trainer.train()
        return trainer

    return make


def logits(model, tokenizer) -> torch.Tensor:
    batch = tokenizer(["spoon=S P UW1 N", "knife=N AY1 F"], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def test_merged_model_has_the_adapters_log_probs_and_no_adapter(play, tiny_model, tmp_path):
    trainer = play(learning_rate=1e-2)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "merged")
    checkpoint = trainer.store.checkpoints()[0]
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = logits(PeftModel.from_pretrained(base, checkpoint), tokenizer).log_softmax(-1)
    assert torch.allclose(logits(merged, tokenizer).log_softmax(-1), expected, atol=1e-5)
    unmerged = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert not torch.allclose(logits(unmerged, tokenizer).log_softmax(-1), expected, atol=1e-2)
    assert type(merged) is LlamaForCausalLM
    assert not list((tmp_path / "run").glob("merged-adapter*"))


def test_finished_run_that_lacks_the_merged_model_gets_it_and_a_played_on_one_a_new_one(play, tmp_path):
    directory = tmp_path / "run" / "merged"
    play(merge_adapter_at_end=False)
    assert not directory.exists()
    play()
    first = (directory / "model.safetensors").read_bytes()
    made = directory.stat().st_mtime_ns
    play()
    assert directory.stat().st_mtime_ns == made  # it was there
    play(num_iterations=2)
    assert (directory / "model.safetensors").read_bytes() != first


def test_merging_without_an_adapter_is_refused(tiny_model, train_dataset, make_config):
    config = make_config(merge_adapter_at_end=True)
    with pytest.raises(ValueError, match="there is none: all weights are trained"):
        SPINTrainer(tiny_model, config, train_dataset=train_dataset)


def test_merging_prompt_tuning_is_refused(play):
    with pytest.raises(ValueError, match="cannot merge an adapter with `peft_type=PROMPT_TUNING`"):
        play(train=False, peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def test_merging_into_a_base_that_was_saved_quantised_is_refused(play, tiny_model, tmp_path):
    folder = tmp_path / "quantised"
    folder.mkdir()
    for path in Path(tiny_model).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="are saved quantised"):
        play(train=False, model=str(folder))


def test_grpo_goes_on_from_the_merged_model(play, tmp_path):
    """The lines that README shows, with a tiny model's settings."""
    play()
    code = NEXT_STEP.replace("out/merged", str(tmp_path / "run" / "merged"))
    tiny = "max_steps=1, use_cpu=True, bf16=False, report_to='none', max_completion_length=4, num_generations=2,"
    tiny += "per_device_train_batch_size=2, gradient_checkpointing=False, "
    code = code.replace('output_dir="out/grpo", ', f"output_dir={str(tmp_path / 'grpo')!r}, {tiny}")
    code += "\nassert trainer.state.global_step == 1\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_next_step_of_readme_is_the_one_that_is_tested():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert NEXT_STEP.strip() in readme
