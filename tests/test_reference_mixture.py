"""alpha-SPIN's reference: what is mixed, that 0 and 1 are the two references there were, which losses can use it."""

import numpy as np
import pytest
import torch
from test_opponent_reference import POLICIES, ScoreAtIterationOne, all_logps
from transformers import AutoModelForCausalLM

from spin_trl import SPINTrainer, load_pairs
from spin_trl.objectives import OBJECTIVES
from spin_trl.objectives.reference_mixture import mix_scores


# The losses that see whether both reference log-probs of a prompt rise by the same number, and more than that.
NO_MIXTURE = ("space", "iris", "ipo", "sigmoid_norm", "nca_pair", "bco_pair", "sppo_hard", "aot_unpaired")
NO_MIXTURE += ("apo_zero", "apo_down")


def play(model, config, dataset, *callbacks, **kwargs) -> SPINTrainer:
    trainer = SPINTrainer(model, config, train_dataset=dataset, callbacks=list(callbacks), **kwargs)
    for callback in callbacks:
        callback.trainer = trainer
    trainer.train()
    return trainer


def columns(trainer: SPINTrainer, iteration: int) -> list[dict]:
    return load_pairs(trainer.args.output_dir, iteration).to_list()


def weights(trainer: SPINTrainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def test_mixture_of_scores_by_hand():
    """0.75 * -8 + 0.25 * -4 = -7, and 0.75 * -2 + 0.25 * -10 = -4."""
    opponent = {"ref_chosen_logps": np.float32([-8, 0]), "ref_rejected_logps": np.float32([-2, -1])}
    initial = {"ref_chosen_logps": np.float32([-4, -3]), "ref_rejected_logps": np.float32([-10, -1])}
    mixed = mix_scores(opponent, initial, 0.25)
    assert {name: values.tolist() for name, values in mixed.items()} == {
        "ref_chosen_logps": [-7.0, -0.75],
        "ref_rejected_logps": [-4.0, -1.0],
    }
    assert all(values.dtype == np.float32 for values in mixed.values())
    alone = mix_scores(opponent, initial, 1.0)
    assert all((alone[name] == initial[name]).all() for name in initial)


@pytest.mark.parametrize("policy", ["full", "full-object", "lora", "trained-lora"])
def test_stored_reference_is_the_mixture_of_opponent_and_initial_model(tiny_model, train_dataset, make_config, policy):
    """Each log-prob computed one sequence at a time, without the trainer."""
    model, kwargs = POLICIES[policy](tiny_model)
    initial, _ = POLICIES[policy](tiny_model)
    initial = AutoModelForCausalLM.from_pretrained(initial) if isinstance(initial, str) else initial
    watch = ScoreAtIterationOne()
    trainer = play(model, make_config(num_iterations=2, reference_mixture_alpha=0.3), train_dataset, watch, **kwargs)
    rows = trainer.store.read_pairs(1).select(range(6))
    stored = [row[f"ref_{side}_logps"] for row in rows for side in ("chosen", "rejected")]
    of_initial = all_logps(initial, rows)
    assert watch.opponent != pytest.approx(of_initial, abs=1e-2)
    mixed = [0.7 * opponent + 0.3 * initial for opponent, initial in zip(watch.opponent, of_initial, strict=True)]
    assert stored == pytest.approx(mixed, abs=1e-4)
    assert trainer.ref_model is None


def test_metrics_of_the_opponent_stay_its_own(tiny_model, train_dataset, eval_dataset, make_config, tmp_path):
    """Iteration 1's opponent is the same in all three runs, since iteration 0's reference is."""
    found = {}
    for alpha in (0.0, 0.5, 1.0):
        config = make_config(
            output_dir=str(tmp_path / str(alpha)), num_iterations=2, temperature=0.0, reference_mixture_alpha=alpha
        )
        trainer = SPINTrainer(tiny_model, config, train_dataset=train_dataset, eval_dataset=eval_dataset)
        trainer.train()
        metrics = trainer.store.read_metrics(1)
        rewards = {name: value for name, value in metrics["evaluation"].items() if name.startswith("rewards/")}
        found[alpha] = metrics["logps_gap"], metrics["opponent_nll"], rewards
    assert found[0.0] == found[0.5] == found[1.0]
    assert len(found[0.5][2]) == 4


# Which losses can use it


def shift_of_loss(loss, name: str, shift: float) -> float:
    """How much a loss changes as both reference log-probs of a prompt rise alike, each prompt's by another number."""
    generator = torch.Generator().manual_seed(0)
    logps = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    shifts = shift * torch.tensor([1.0, 0.5, 2.0, 0.0, 1.5, 0.25], dtype=torch.float64)
    smoothing = {"label_smoothing": 0.1} if name in ("exo_pair", "robust") else {}
    values = [
        loss([name], (logps[0], logps[1]), (logps[2] + added, logps[3] + added), beta=0.5, **smoothing)
        for added in (0.0, shifts)
    ]
    return (values[1] - values[0]).abs().item()


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"ipo", "sigmoid_norm"}))
def test_normaliser_cancels_in_exactly_the_losses_that_are_allowed(loss, name):
    """Of answers of one token, as here, `ipo` and `sigmoid_norm`, which divide by lengths, would seem to be among."""
    assert (shift_of_loss(loss, name, 1.0) > 1e-3) == (name in NO_MIXTURE)


def test_every_loss_is_either_allowed_or_refused():
    assert {name for name, loss in OBJECTIVES.items() if loss.needs_normaliser} == set(NO_MIXTURE)


@pytest.mark.parametrize("name", [name for name in NO_MIXTURE if name not in ("space", "iris")])
def test_loss_that_needs_the_normaliser_is_refused_in_between_and_not_at_the_ends(make_config, name):
    with pytest.raises(ValueError, match=rf"`loss_type='{name}'` contradicts `reference_mixture_alpha=0.5`.*use one"):
        make_config(loss_type=["sft", name], reference_mixture_alpha=0.5)
    for alpha in (0.0, 1.0):
        assert make_config(loss_type=[name], reference_mixture_alpha=alpha).reference_mixture_alpha == alpha


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
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
