"""What the model card says, without any hub."""

import pytest

from spin_trl.report.model_card import with_self_play


def test_card_says_spin_with_its_paper_the_table_by_iteration_and_the_settings(play_run, eval_dataset, tmp_path):
    trainer = play_run(16, eval_dataset=eval_dataset, num_iterations=2, beta=[0.1, 0.3])
    card = (tmp_path / "run" / "README.md").read_text()
    assert "trained with SPIN" in card and "2401.01335" in card and "chen2024self" in card
    for label, iteration in (("start", 0), ("iteration 0", 1), ("iteration 1", 2)):
        nll = trainer.store.read_metrics(iteration)["evaluation"]["nll"]
        assert f"| {label} | {nll:.4g} |" in card
    rejected = trainer.store.read_metrics(1)["rejected_length"]
    assert f"{rejected:.4g}" in next(line for line in card.splitlines() if line.startswith("| iteration 1 | 16 |"))
    assert "| `beta` | `[0.1, 0.3]` |" in card
    assert "None" not in card
    trainer.create_model_card(model_name="mine", dataset_name="me/data")
    again = (tmp_path / "run" / "README.md").read_text()
    assert again.count("### Self-play") == 1 and "me/data" in again


@pytest.mark.parametrize(
    ("pairing", "words"),
    [
        ("ground_truth", "tell the ground truth from"),
        ("best_of", "best of ground truth and"),
        ("reward_ranked", "the worst"),
    ],
)
def test_card_says_what_is_chosen(make_config, pairing, words):
    section = with_self_play("", [], make_config(pairing=pairing, num_generations=2))
    assert words in section and f"| `pairing` | `{pairing}` |" in section


def test_fields_of_the_losses_are_shown_where_they_are_used(make_config):
    section = with_self_play("", [], make_config(loss_type=["t_spin", "sft"], t_spin_beta=0.3))
    assert "| `t_spin_alpha` | `1.0` |\n| `t_spin_beta` | `0.3` |" in section
    assert "space_mu" not in section and "iris_alpha" not in section


def test_section_replaces_an_older_one_and_stands_before_the_versions(make_config):
    metrics = [(0, {"evaluation": {"nll": 2.0}, "num_pairs": 8, "cut_off_share": 0.25, "seconds_score": 3.0})]
    card = with_self_play("# Card\n\n### Framework versions\n- TRL\n", metrics, make_config())
    assert "| start | 2 |" in card and "| iteration 0 | 8 | 0.25 |" in card and "seconds" not in card
    assert card.index("### Self-play") < card.index("### Framework versions")
    assert with_self_play(card, metrics, make_config()) == card
