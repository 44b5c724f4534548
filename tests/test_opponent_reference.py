"""Whose log-probs are stored as the reference: the opponent's, or with a share of 1 the initial model's."""

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftConfig, PeftModel, VBLoRAConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from spin_trl import SPINTrainer


LORA = {"r": 8, "target_modules": "all-linear", "init_lora_weights": True}


def trained_adapter(tiny_model, config: PeftConfig | None = None) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config or LoraConfig(**LORA))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


def changed_model(tiny_model):
    """A model object whose weights are no longer those of the folder it came from."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    return model


# Each gives the model to pass, and the keyword arguments.
POLICIES = {
    "full": lambda path: (path, {}),
    "full-object": lambda path: (changed_model(path), {}),
    "lora": lambda path: (path, {"peft_config": LoraConfig(**LORA)}),
    "trained-lora": lambda path: (trained_adapter(path), {}),
    # Of its parameters, and of LoRA's for embeddings, DPOTrainer's copy for the reference takes none.
    "trained-loha": lambda path: (trained_adapter(path, LoHaConfig(r=4, target_modules=["q_proj", "up_proj"])), {}),
    "trained-embeddings": lambda path: (trained_adapter(path, LoraConfig(r=4, target_modules=["embed_tokens"])), {}),
}


def logps(model, row: dict, side: str) -> float:
    ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
    with torch.no_grad():
        values = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    return values[len(row["prompt_ids"]) - 1 :].sum().item()


def all_logps(model, rows) -> list[float]:
    model.eval()
    return [logps(model, row, side) for row in rows for side in ("chosen", "rejected")]


class ScoreAtIterationOne(TrainerCallback):
    """The policy's own log-probs of iteration 1's pairs before its first step, when it is the opponent."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 6:
            was_training = model.training
            rows = self.trainer.store.read_pairs(1).select(range(6))
            self.opponent = all_logps(model, rows)
            model.train(was_training)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_stored_reference_is_the_opponents_or_the_initial_models(tiny_model, train_dataset, make_config, policy, alpha):
    model, kwargs = POLICIES[policy](tiny_model)
    initial, _ = POLICIES[policy](tiny_model)
    initial = AutoModelForCausalLM.from_pretrained(initial) if isinstance(initial, str) else initial
    watch = ScoreAtIterationOne()
    config = make_config(num_iterations=2, reference_mixture_alpha=alpha)
    trainer = SPINTrainer(model, config, train_dataset=train_dataset, callbacks=[watch], **kwargs)
    watch.trainer = trainer
    trainer.train()
    rows = trainer.store.read_pairs(1).select(range(6))
    stored = [row[f"ref_{side}_logps"] for row in rows for side in ("chosen", "rejected")]
    of_initial = all_logps(initial, rows)
    assert watch.opponent != pytest.approx(of_initial, abs=1e-2)
    assert stored == pytest.approx(of_initial if alpha == 1 else watch.opponent, abs=1e-4)
    assert trainer.ref_model is None
    if policy.endswith("lora") or policy.startswith("trained"):
        assert trainer.model.active_adapters == ["default"]


VBLORA = VBLoRAConfig(target_modules=["q_proj"], vector_length=16, num_vectors=32)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (LoraConfig(**{**LORA, "init_lora_weights": "pissa"}), "`init_lora_weights='pissa'`.*`reference_mixture_alpha"),
        (LoraConfig(**LORA, bias="all"), "`bias='all'`.*does not bring back.*`reference_mixture_alpha=0`"),
        (VBLORA, "`peft_type=.*VBLORA.*does not bring back"),
    ],
    ids=["pissa", "bias", "vblora"],
)
def test_adapter_without_which_the_model_is_another_one_is_refused(
    tiny_model, train_dataset, make_config, adapter, message
):
    config = make_config(reference_mixture_alpha=1.0)
    with pytest.raises(ValueError, match=message):
        SPINTrainer(tiny_model, config, train_dataset=train_dataset, peft_config=adapter)
