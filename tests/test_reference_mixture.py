"""Whose log-probs are stored as the reference: the opponent's, the initial model's, or alpha-SPIN's mixture of both."""

import numpy as np
import pytest
import torch
from conftest import BeforeFirstSteps, logp
from peft import LoHaConfig, LoraConfig, PeftConfig, PeftModel, VBLoRAConfig, get_peft_model
from transformers import AutoModelForCausalLM

from spin_trl.objectives import OBJECTIVES
from spin_trl.objectives.reference_mixture import mix_scores


LORA = {"r": 8, "target_modules": "all-linear", "init_lora_weights": True}
# The losses that see whether both reference log-probs of a prompt rise by the same number, and more than that.
NO_MIXTURE = ("space", "iris", "ipo", "sigmoid_norm", "nca_pair", "bco_pair", "sppo_hard", "aot_unpaired")
NO_MIXTURE += ("apo_zero", "apo_down")


def trained_adapter(tiny_model, config: PeftConfig) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
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
    "trained-lora": lambda path: (trained_adapter(path, LoraConfig(**LORA)), {}),
    # Of its parameters, and of LoRA's for embeddings, DPOTrainer's copy for the reference takes none.
    "trained-loha": lambda path: (trained_adapter(path, LoHaConfig(r=4, target_modules=["q_proj", "up_proj"])), {}),
    "trained-embeddings": lambda path: (trained_adapter(path, LoraConfig(r=4, target_modules=["embed_tokens"])), {}),
}


def of_six_pairs(model, pairs) -> list[float]:
    """The log-probs of both sides of the first pairs."""
    rows = pairs.select(range(6))
    return [logp(model, row["prompt_ids"], row[f"{side}_ids"]) for row in rows for side in ("chosen", "rejected")]


@pytest.mark.parametrize(
    ("policy", "alpha"), [*((policy, 0.3) for policy in POLICIES), ("lora", 0.0), ("full", 1.0), ("trained-lora", 1.0)]
)
def test_stored_reference_is_the_mixture_of_opponent_and_initial_model(tiny_model, build_trainer, policy, alpha):
    """Each log-prob computed one sequence at a time, without the trainer."""
    model, kwargs = POLICIES[policy](tiny_model)
    initial, _ = POLICIES[policy](tiny_model)
    initial = AutoModelForCausalLM.from_pretrained(initial) if isinstance(initial, str) else initial
    settings = {"num_iterations": 2, "reference_mixture_alpha": alpha, "max_steps": 7}
    trainer = build_trainer(model=model, **kwargs, **settings)
    opponents = BeforeFirstSteps(trainer, of_six_pairs)
    trainer.train()
    pairs = trainer.store.read_pairs(1)
    stored = [row[f"ref_{side}_logps"] for row in pairs.select(range(6)) for side in ("chosen", "rejected")]
    of_opponent, of_initial = opponents.found[1], of_six_pairs(initial.eval(), pairs)
    assert of_opponent != pytest.approx(of_initial, abs=1e-2)
    mixed = (1 - alpha) * np.array(of_opponent) + alpha * np.array(of_initial)
    assert stored == pytest.approx(mixed.tolist(), abs=1e-4)
    assert trainer.ref_model is None
    if isinstance(trainer.model, PeftModel):
        assert trainer.model.active_adapters == ["default"]


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (LoraConfig(**{**LORA, "init_lora_weights": "pissa"}), "`init_lora_weights='pissa'`.*`reference_mixture_alpha"),
        (LoraConfig(**LORA, bias="all"), "`bias='all'`.*does not bring back.*`reference_mixture_alpha=0`"),
        (VBLoRAConfig(target_modules=["q_proj"], vector_length=16, num_vectors=32), "`peft_type=.*does not bring back"),
    ],
    ids=["pissa", "bias", "vblora"],
)
def test_adapter_without_which_the_model_is_another_one_is_refused(build_trainer, adapter, message):
    with pytest.raises(ValueError, match=message):
        build_trainer(peft_config=adapter, reference_mixture_alpha=1.0)


def test_mixture_of_scores_by_hand():
    """0.75 * -8 + 0.25 * -4 = -7, and 0.75 * -2 + 0.25 * -10 = -4."""
    opponent = {"ref_chosen_logps": np.float32([-8, 0]), "ref_rejected_logps": np.float32([-2, -1])}
    initial = {"ref_chosen_logps": np.float32([-4, -3]), "ref_rejected_logps": np.float32([-10, -1])}
    mixed = mix_scores(opponent, initial, 0.25)
    expected = {"ref_chosen_logps": [-7.0, -0.75], "ref_rejected_logps": [-4.0, -1.0]}
    assert {name: values.tolist() for name, values in mixed.items()} == expected
    assert all(values.dtype == np.float32 for values in mixed.values())
    alone = mix_scores(opponent, initial, 1.0)
    assert all((alone[name] == initial[name]).all() for name in initial)


def test_metrics_of_the_opponent_stay_its_own(play_run, eval_dataset, tmp_path):
    """Iteration 1's opponent is the same in both runs, since iteration 0's reference is."""
    found = {}
    for alpha in (0.0, 0.5):
        settings = {"num_iterations": 2, "temperature": 0.0, "max_steps": 3, "reference_mixture_alpha": alpha}
        trainer = play_run(16, eval_dataset=eval_dataset, output_dir=str(tmp_path / str(alpha)), **settings)
        metrics = trainer.store.read_metrics(1)
        rewards = {name: value for name, value in metrics["evaluation"].items() if name.startswith("rewards/")}
        found[alpha] = metrics["logps_gap"], metrics["opponent_nll"], rewards
    for alone, mixed in zip(found[0.0], found[0.5], strict=True):
        assert alone == pytest.approx(mixed, abs=1e-6)
    assert len(found[0.5][2]) == 4


# Which losses can use it


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"ipo", "sigmoid_norm"}))
def test_normaliser_cancels_in_exactly_the_losses_that_are_allowed(loss, name):
    """
    Both reference log-probs of each prompt rise alike. Of answers of one token, as here, `ipo` and `sigmoid_norm`,
    which divide by lengths, would seem to be among those that do not see it.
    """
    logps = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shifts = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.5, 0.25], dtype=torch.float64)
    smoothing = {"label_smoothing": 0.1} if name in ("exo_pair", "robust") else {}
    before, after = (
        loss([name], (logps[0], logps[1]), (logps[2] + added, logps[3] + added), beta=0.5, **smoothing)
        for added in (0.0, shifts)
    )
    assert (abs(after - before).item() > 1e-3) == (name in NO_MIXTURE)


def test_every_loss_is_either_allowed_or_refused():
    assert {name for name, loss in OBJECTIVES.items() if loss.needs_normaliser} == set(NO_MIXTURE)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"loss_type": ["sft", "ipo"]}, "`loss_type='ipo'` contradicts `reference_mixture_alpha=0.5`.*use one"),
        ({"loss_type": ["space", "sft"]}, "`loss_type='space'` contradicts `reference_mixture_alpha=0.5`"),
        ({"loss_type": "iris"}, "`loss_type='iris'` contradicts .*Leave `reference_mixture_alpha` unset"),
        ({"loss_type": ["t_spin", "sft"]}, "`reference_mixture_alpha=0.5` has no effect.*such as 'sigmoid'"),
        ({"f_divergence_type": "forward_kl"}, "contradicts `f_divergence_type='forward_kl'`.*Leave one of the two"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_settings_that_contradict_it_are_refused(make_config, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_config(reference_mixture_alpha=0.5, **overrides)
    if overrides == {"loss_type": ["sft", "ipo"]}:  # the two ends have no normaliser
        assert [make_config(reference_mixture_alpha=alpha, **overrides) for alpha in (0.0, 1.0)]
