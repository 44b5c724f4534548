"""The third side of a batch: how it is made, and that DPOTrainer's two sides are what they are without it."""

import pytest
import torch
from conftest import logp
from transformers import AutoModelForCausalLM
from trl.trainer.dpo_trainer import DataCollatorForPreference

from spin_trl import SPINTrainer
from spin_trl.objectives.third_side import ForwardOfSides, InitialSideCollator


PAIRS = [
    {"prompt_ids": [3, 4], "chosen_ids": [5, 2], "rejected_ids": [6, 2], "initial_ids": [7, 8, 9, 2]},
    {"prompt_ids": [3], "chosen_ids": [5, 5, 2], "rejected_ids": [2], "initial_ids": [2]},
]
PAIRS = [{**pair, "ref_chosen_logps": -3.0, "ref_rejected_logps": -4.0 - i} for i, pair in enumerate(PAIRS)]
WITHOUT = [{name: value for name, value in pair.items() if name != "initial_ids"} for pair in PAIRS]


def test_three_sides_by_hand():
    batch = InitialSideCollator(DataCollatorForPreference(pad_token_id=0))(PAIRS)
    initial = ForwardOfSides(None, batch).initial
    assert batch["input_ids"].tolist() == [
        [3, 4, 5, 2, 0, 0],
        [3, 5, 5, 2, 0, 0],
        [3, 4, 6, 2, 0, 0],
        [3, 2, 0, 0, 0, 0],
    ]
    assert batch["completion_mask"].sum(dim=1).tolist() == [2, 3, 2, 1]
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 4, 4, 2]
    assert batch["ref_chosen_logps"].tolist() == [-3, -3] and batch["ref_rejected_logps"].tolist() == [-4, -5]
    assert initial["input_ids"].tolist() == [[3, 4, 7, 8, 9, 2], [3, 2, 0, 0, 0, 0]]
    assert initial["labels"].tolist() == [[-100, -100, 7, 8, 9, 2], [-100, 2, -100, -100, -100, -100]]
    assert initial["attention_mask"].tolist() == [[1] * 6, [1, 1, 0, 0, 0, 0]]
    assert set(batch) == {"input_ids", "attention_mask", "completion_mask", "ref_chosen_logps", "ref_rejected_logps"}


@pytest.mark.parametrize(("mode", "kept"), [("keep_start", [3, 4, 7, 8]), ("keep_end", [7, 8, 9, 2])])
def test_third_side_is_truncated_as_the_others_are(mode, kept):
    collator = DataCollatorForPreference(pad_token_id=0, max_length=4, truncation_mode=mode)
    batch = InitialSideCollator(collator)(PAIRS)
    assert ForwardOfSides(None, batch).initial["input_ids"].tolist() == [kept, [3, 2, 0, 0]]
    assert batch["input_ids"].shape == (4, 4)


def test_pairs_without_one_make_the_batch_that_they_always_made():
    collator = DataCollatorForPreference(pad_token_id=0)
    batch, expected = InitialSideCollator(collator)(WITHOUT), collator(WITHOUT)
    assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)


def compute(trainer: SPINTrainer, pairs: list[dict]) -> tuple[float, dict, list[tuple]]:
    """Loss, metrics, and the shape of the model's input in every forward pass."""
    shapes = []
    hook = trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    trainer.model.train()
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(pairs)).item()
    hook.remove()
    return loss, {name: v for name, v in trainer._metrics["train"].items() if name != "num_tokens"}, shapes


def test_loss_is_of_three_sides_and_metrics_of_two_from_one_forward_pass(build_trainer, tiny_model):
    """The loss by hand, of log-probs that each sequence has by itself: a = 1, b = 0.1, and SFT's mean over tokens."""
    trainer = build_trainer(loss_type=["t_spin", "sft"])
    loss, metrics, shapes = compute(trainer, PAIRS)
    _, expected, shapes_without = compute(trainer, WITHOUT)
    assert metrics.keys() - {"logps/initial"} == expected.keys() >= {"rewards/chosen", "logps/rejected", "entropy"}
    for name in expected:
        assert metrics[name] == pytest.approx(expected[name], abs=1e-5), name
    assert shapes == [(6, 6)] and shapes_without == [(4, 4)]

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    chosen, rejected, initial = (
        torch.tensor([logp(model, pair["prompt_ids"], pair[f"{side}_ids"]) for pair in PAIRS])
        for side in ("chosen", "rejected", "initial")
    )
    logsigmoid = torch.nn.functional.logsigmoid
    expected = -(logsigmoid(chosen - rejected) + 0.1 * logsigmoid(rejected - initial)).mean() - chosen.sum() / 5
    assert loss == pytest.approx(expected.item(), abs=1e-4)
    assert metrics["logps/initial"] == pytest.approx([initial.mean().item()], abs=1e-4)
