"""Losses and log-probs that are no numbers: where the run stops, and what the error says."""

import math

import pytest
import torch
from conftest import read_rows
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.trainer.dpo_trainer import DataCollatorForPreference

from spin_trl.policy.finite import require_finite_loss


NAN, INF = math.nan, math.inf
OK, ROWS = [-1.0, -2.0], "of these rows of `train_dataset`:"
TWO = [(3, 0), (5, 1)]


@pytest.mark.parametrize(
    ("sides", "origins", "loss", "found"),
    [
        (
            {"chosen": [NAN, -2.0], "rejected": [-INF, NAN]},
            TWO,
            NAN,
            [
                "The loss of step 7, in iteration 1, is nan.",
                f"the chosen side in 1 of 2, {ROWS} 3 (answered in iteration 0);",
                f"the rejected side in 2 of 2, {ROWS} 3 (answered in iteration 0), 5.",
                "Lower `learning_rate`",
            ],
        ),
        # -log sig(inf) = 0: the loss looks perfect.
        ({"chosen": OK, "rejected": [-3.0, -INF]}, TWO, 0.0, ["is 0.0", f"the rejected side in 1 of 2, {ROWS} 5."]),
        ({"chosen": OK, "rejected": OK, "initial": [-1.0, NAN]}, TWO, NAN, [f"the initial side in 1 of 2, {ROWS} 5."]),
        ({"chosen": OK, "rejected": OK}, TWO, INF, ["log-probs are finite", "`beta`", f"{ROWS} 3 (answered in"]),
        ({"chosen": [NAN]}, None, NAN, ["rows that are not known"]),
        ({"chosen": [NAN] * 40}, [(row, 1) for row in range(40)], NAN, [f"40 of 40, {ROWS} 0, 1, 2", "9 and 30 more."]),
    ],
    ids=["both sides", "finite loss", "third side", "loss alone", "unknown rows", "many rows"],
)
def test_error_names_step_loss_side_and_rows(sides, origins, loss, found):
    sides = {side: torch.tensor(logps) for side, logps in sides.items()}
    origins = None if origins is None else torch.tensor(origins)
    with pytest.raises(FloatingPointError) as error:
        require_finite_loss(torch.tensor(loss), sides, origins, step=7, iteration=1)
    assert all(part in str(error.value) for part in found), str(error.value)


# Whole runs


class BreakWeights(TrainerCallback):
    """Sets a weight of the policy to NaN before a step, and counts those of the optimizer."""

    def __init__(self, step: int):
        self.step = step
        self.num_optimizer_steps = 0

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                model.get_input_embeddings().weight.fill_(NAN)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.num_optimizer_steps += 1


@pytest.mark.parametrize("overrides", [{}, {"dataloader_num_workers": 1}], ids=str)
def test_broken_weight_stops_the_run_before_the_optimizer_step_and_names_rows_of_history_too(play_run, overrides):
    """24 pairs are 3 steps; of iteration 1's 48 pairs, half are history."""
    breaking = BreakWeights(5)
    with pytest.raises(FloatingPointError, match="The loss of step 5, in iteration 1, is nan") as error:
        play_run(24, callbacks=[breaking], **overrides)
    assert "the chosen side in 8 of 8" in str(error.value)
    assert "(answered in iteration 0)" in str(error.value)
    assert breaking.num_optimizer_steps == 4


def test_rows_are_those_of_the_users_dataset_and_the_users_collator_gets_what_it_always_got(play_run, tokenizer):
    """Row 0 is invalid, so every pair's `row` is one less than its row in the dataset."""
    columns = set()

    class Collator(DataCollatorForPreference):
        def __call__(self, examples, *args, **kwargs):
            columns.update(*examples)
            return super().__call__(examples, *args, **kwargs)

    rows = Dataset.from_list([{"prompt": "", "completion": "B"}, *read_rows("accent_train.jsonl", 3)])
    settings = {"skip_invalid_rows": True, "per_device_train_batch_size": 3, "num_iterations": 1}
    parts = {"data_collator": Collator(pad_token_id=tokenizer.pad_token_id), "callbacks": [BreakWeights(1)]}
    with pytest.raises(FloatingPointError) as error:
        play_run(train_dataset=rows, **settings, **parts)
    named = str(error.value).split("`train_dataset`: ")[1].split(";")[0]
    assert sorted(named.split(", ")) == ["1", "2", "3"]
    assert {"prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"} <= columns


def broken_for(letter: str, tiny_model, tokenizer):
    """A model that can compute nothing of a text with this letter."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(letter)] = NAN
    return model


@pytest.mark.parametrize(
    ("letter", "expected"),
    [
        ("k", "the pairs of iteration 0.*chosen side in {count} of 48, of these rows of `train_dataset`: {rows}"),
        ("e", "not finite: .*{count} of 16, of these rows of `eval_dataset`: {rows}"),
    ],
    ids=["pairs", "evaluation data"],
)
def test_policy_that_cannot_score_stops_the_run_before_anything_is_written(
    build_trainer, tiny_model, train_dataset, eval_dataset, tokenizer, letter, expected
):
    evaluates = "eval_dataset" in expected
    prompts = (eval_dataset if evaluates else train_dataset)["prompt"]
    rows = [str(row) for row, prompt in enumerate(prompts) if letter in prompt]
    evaluated = {"eval_dataset": eval_dataset} if evaluates else {}
    trainer = build_trainer(model=broken_for(letter, tiny_model, tokenizer), temperature=0.0, **evaluated)
    with pytest.raises(FloatingPointError, match=expected.format(count=len(rows), rows=", ".join(rows[:10]))):
        trainer.train()
    assert 0 < len(rows) < len(prompts) and not trainer.store.has_pairs(0) and trainer.state.global_step == 0
    assert "evaluation" not in trainer.store.read_metrics(0)


def test_adapter_that_was_loaded_frozen_is_refused(build_trainer, tiny_model, tmp_path):
    PeftModel(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig()).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"are frozen.*is_trainable=True"):
        build_trainer(model=model)


def test_new_adapter_to_a_frozen_model_is_trained(build_trainer, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).requires_grad_(False)
    trainer = build_trainer(model=model, peft_config=LoraConfig())
    assert any(parameter.requires_grad for parameter in trainer.model.parameters())
