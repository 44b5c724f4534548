"""Losses and log-probs that are no numbers: where the run stops, and what the error says."""

import math

import numpy as np
import pytest
import torch
from conftest import read_rows
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.trainer.dpo_trainer import DataCollatorForPreference

from spin_trl import SPINTrainer
from spin_trl.data.pair_dataset import PairDataset
from spin_trl.policy.finite import (
    OriginCollator,
    StepNumbers,
    require_finite_scores,
    require_finite_truths,
    take_origins,
)


NAN, INF = math.nan, math.inf
ROWS = "of these rows of `train_dataset`:"


def numbers(logps: list[float], origins=((3, 0), (5, 1))) -> StepNumbers:
    return StepNumbers(torch.tensor(logps), None if origins is None else torch.tensor(origins))


def error_of(numbers: StepNumbers, loss: float) -> str:
    with pytest.raises(FloatingPointError) as error:
        numbers.require_finite(torch.tensor(loss), step=7, iteration=1)
    return str(error.value)


def test_finite_numbers_pass():
    numbers([-1.0, -2.0, -3.0, -4.0]).require_finite(torch.tensor(0.7), step=7, iteration=1)


def test_error_names_step_iteration_loss_side_and_rows_of_either_iteration():
    message = error_of(numbers([NAN, -2.0, -INF, NAN]), NAN)
    assert "The loss of step 7, in iteration 1, is nan." in message
    assert f"the chosen side in 1 of 2 pair(s), {ROWS} 3 (answered in iteration 0);" in message
    assert (
        "the rejected side in 2 of 2 pair(s), of these rows of `train_dataset`: 3 (answered in iteration 0), 5."
        in message
    )
    assert "Lower `learning_rate`, use bf16 instead of fp16" in message and "start the same command again" in message


def test_log_prob_of_minus_infinity_counts_even_if_the_loss_is_finite():
    """-log sig(inf) = 0: the loss looks perfect."""
    message = error_of(numbers([-1.0, -2.0, -3.0, -INF]), 0.0)
    assert "is 0.0" in message and "chosen" not in message
    assert f"the rejected side in 1 of 2 pair(s), {ROWS} 5." in message


def test_loss_that_overflows_by_itself_is_told_from_a_broken_policy():
    message = error_of(numbers([-1.0, -2.0, -3.0, -4.0]), INF)
    assert "log-probs are finite" in message and "`beta`" in message
    assert "of these rows of `train_dataset`: 3 (answered in iteration 0), 5." in message


def test_batch_of_unknown_rows_is_still_an_error():
    assert "rows that are not known" in error_of(numbers([NAN] * 4, origins=None), NAN)


def test_many_rows_are_counted_and_the_first_named():
    origins = [(row, 1) for row in range(40)]
    message = error_of(numbers([NAN] * 40 + [-1.0] * 40, origins), NAN)
    assert "in 40 of 40 pair(s), of these rows of `train_dataset`: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 30 more." in message


def test_collator_adds_where_pairs_come_from_and_hides_what_was_not_seen_before():
    seen = []

    def collate(examples):
        seen.extend(examples)
        return {"n": len(examples)}

    rows = [{"source_row": 4, "iteration": 0, "prompt_ids": [1]}, {"source_row": 2, "iteration": 1, "prompt_ids": [2]}]
    batch = OriginCollator(collate, hidden=["source_row", "iteration"])(rows)
    assert take_origins(batch).tolist() == [[4, 0], [2, 1]]
    assert batch == {"n": 2} and seen == [{"prompt_ids": [1]}, {"prompt_ids": [2]}]
    assert OriginCollator(collate)([{"prompt_ids": [1]}]) == {"n": 1}


def test_scores_that_are_not_finite_name_rows_and_iteration():
    pairs = Dataset.from_dict({"source_row": [8, 9, 8], "iteration": [2, 2, 1]})
    scores = {"ref_chosen_logps": np.array([-1.0, -2.0, NAN]), "ref_rejected_logps": np.array([-1.0, -INF, -3.0])}
    with pytest.raises(FloatingPointError) as error:
        require_finite_scores(PairDataset(Dataset.from_dict({}), pairs), scores, iteration=2)
    message = str(error.value)
    assert "cannot score the pairs of iteration 2" in message
    assert f"the chosen side in 1 of 3 pair(s), {ROWS} 8 (answered in iteration 1);" in str(error.value)
    assert f"the rejected side in 1 of 3 pair(s), {ROWS} 9." in message


def test_ground_truths_that_cannot_be_scored_name_their_rows():
    with pytest.raises(FloatingPointError, match=r"`eval_dataset`.*not finite in 1 of 2 row\(s\): 6\."):
        require_finite_truths(Dataset.from_dict({"source_row": [5, 6]}), torch.tensor([-1.0, NAN]))


# Whole runs


class BreakWeights(TrainerCallback):
    """Sets a weight of the policy to NaN before a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                model.get_input_embeddings().weight.fill_(NAN)


class CountSteps(TrainerCallback):
    def __init__(self):
        self.num_optimizer_steps = 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.num_optimizer_steps += 1


@pytest.mark.parametrize("overrides", [{}, {"remove_unused_columns": False}, {"dataloader_num_workers": 1}], ids=str)
def test_broken_weight_stops_the_run_before_the_optimizer_step_and_names_rows_of_history_too(
    tiny_model, train_dataset, make_config, overrides
):
    """48 pairs are 6 steps; of iteration 1's 96 pairs, half are history."""
    counter = CountSteps()
    trainer = SPINTrainer(
        tiny_model, make_config(**overrides), train_dataset=train_dataset, callbacks=[BreakWeights(8), counter]
    )
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    assert "The loss of step 8, in iteration 1, is nan." in str(error.value)
    assert "the chosen side in 8 of 8 pair(s)" in str(error.value)
    assert "(answered in iteration 0)" in str(error.value)
    assert counter.num_optimizer_steps == 7


def test_rows_are_those_of_the_users_dataset(tiny_model, train_dataset, make_config):
    """Row 0 is invalid, so every pair's `row` is one less than its row in the dataset."""
    rows = [{"prompt": "", "completion": "B"}, *read_rows("accent_train.jsonl", 3)]
    config = make_config(skip_invalid_rows=True, per_device_train_batch_size=3, num_iterations=1)
    trainer = SPINTrainer(tiny_model, config, train_dataset=Dataset.from_list(rows), callbacks=[BreakWeights(1)])
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    named = str(error.value).split("`train_dataset`: ")[1].split(";")[0]
    assert sorted(named.split(", ")) == ["1", "2", "3"]


def test_users_collator_gets_what_it_always_got(tiny_model, train_dataset, make_config, tokenizer):
    columns = set()

    class Collator(DataCollatorForPreference):
        def __call__(self, examples, *args, **kwargs):
            columns.update(*examples)
            return super().__call__(examples, *args, **kwargs)

    trainer = SPINTrainer(
        tiny_model,
        make_config(num_iterations=1),
        train_dataset=train_dataset,
        data_collator=Collator(pad_token_id=tokenizer.pad_token_id),
        callbacks=[BreakWeights(2)],
    )
    with pytest.raises(FloatingPointError, match=r"the chosen side in 8 of 8 pair\(s\), of these rows of"):
        trainer.train()
    assert {"prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"} <= columns
    assert "source_row" not in columns


def test_loss_of_a_subclass_that_is_no_number_stops_the_run(tiny_model, train_dataset, make_config):
    class Broken(SPINTrainer):
        def _compute_loss(self, model, inputs, return_outputs):
            loss = super()._compute_loss(model, inputs, return_outputs)
            return loss * NAN if self.state.global_step == 3 else loss

    trainer = Broken(tiny_model, make_config(logging_nan_inf_filter=True), train_dataset=train_dataset)
    with pytest.raises(FloatingPointError, match="The loss of step 4, in iteration 0, is nan.*log-probs are finite"):
        trainer.train()


def test_learning_rate_that_blows_the_policy_up_stops_the_run(tiny_model, train_dataset, make_config):
    counter = CountSteps()
    config = make_config(num_iterations=1, learning_rate=1e10, max_grad_norm=0.0)
    trainer = SPINTrainer(tiny_model, config, train_dataset=train_dataset, callbacks=[counter])
    with pytest.raises(FloatingPointError, match="Lower `learning_rate`"):
        trainer.train()
    assert counter.num_optimizer_steps < 6


def test_reference_that_cannot_score_stops_the_run_before_pairs_are_written(tiny_model, train_dataset, make_config):
    config = make_config(num_iterations=1, precompute_ref_batch_size=8)
    trainer = SPINTrainer(tiny_model, config, train_dataset=train_dataset)
    compute = trainer.compute_ref_log_probs

    def break_one(model, batch):
        chosen, rejected = compute(model, batch)
        rejected[0] = -INF
        return chosen, rejected

    trainer.compute_ref_log_probs = break_one
    with pytest.raises(FloatingPointError, match=r"the pairs of iteration 0.*the rejected side in 6 of 48 pair\(s\)"):
        trainer.train()
    assert not trainer.store.has_pairs(0) and trainer.state.global_step == 0


def test_policy_that_cannot_score_the_evaluation_data_stops_the_run(
    tiny_model, train_dataset, eval_dataset, make_config, tokenizer
):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.bos_token_id] = NAN
    trainer = SPINTrainer(model, make_config(), train_dataset=train_dataset, eval_dataset=eval_dataset)
    with pytest.raises(FloatingPointError, match=r"`eval_dataset`.*not finite in 16 of 16 row\(s\): 0, 1, 2"):
        trainer.train()
    assert "evaluation" not in trainer.store.read_metrics(0)


# Nothing to train


def test_adapter_that_was_loaded_frozen_is_refused_before_anything_else(tiny_model, make_config, tmp_path):
    PeftModel(
        AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(target_modules="all-linear")
    ).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"nothing would be trained.*is_trainable=True"):
        SPINTrainer(model, make_config(), train_dataset=None)  # the missing data would be the next error


def test_frozen_model_is_refused_but_for_a_new_adapter(tiny_model, train_dataset, make_config):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing would be trained.*`peft_config`"):
        SPINTrainer(model, make_config(), train_dataset=train_dataset)
    trainer = SPINTrainer(model, make_config(), train_dataset=train_dataset, peft_config=LoraConfig())
    assert any(parameter.requires_grad for parameter in trainer.model.parameters())
