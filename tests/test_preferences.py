"""Preference pairs of the user's: how they are rendered, which are refused, and that every iteration trains on them."""

import itertools

import numpy as np
import pytest
from conftest import BeforeFirstSteps, trained
from datasets import Dataset
from tiny_tokenizers import byte_tokenizer

from spin_trl import SPINConfig, SPINTrainer, load_pairs
from spin_trl.data.pair_dataset import PREFERENCE
from spin_trl.data.preparation import prepare_data
from spin_trl.run_directory.run_paths import RunDirectoryError


TOKENIZER = byte_tokenizer("<|im_end|>", "qwen2_5", ["<|im_start|>"])


def prepare(rows: list[dict], context_length: int = 1000, **settings):
    config = SPINConfig(use_cpu=True, bf16=False, report_to="none", **settings)
    train = Dataset.from_dict({"prompt": ["a"], "completion": ["b"]})
    tokens = TOKENIZER, (TOKENIZER.eos_token_id,)
    return prepare_data(config, *tokens, train, None, Dataset.from_list(rows), context_length)


def texts(prepared) -> list[tuple[str, ...]]:
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [tuple(TOKENIZER.decode(row[name]) for name in names) for row in prepared.preferences]


def message(role: str, content: str) -> list[dict]:
    return [{"role": role, "content": content}]


CHAT = message("user", "A") + message("assistant", "x")


def test_text_is_rendered_on_both_sides_as_ground_truths_are():
    prepared = prepare(
        [{"prompt": "2+2=", "chosen": "4", "rejected": "5"}, {"prompt": "1+", "chosen": "1", "rejected": "?"}]
    )
    end = "<|im_end|>"
    assert texts(prepared) == [("2+2=", f"4{end}", f"5{end}"), ("1+", f"1{end}", f"?{end}")]
    assert prepared.preferences["row"][:] == [-1, -2] and prepared.preferences["source_row"][:] == [0, 1]
    assert set(prepared.preferences["iteration"]) == {PREFERENCE}
    described = prepared.describe()
    assert (described["num_preference_rows"], described["num_dropped_preference_rows"]) == (2, 0)


def test_conversations_with_a_prompt_and_whole_ones_come_to_the_same():
    prompt, yes, no = message("user", "Hi?"), message("assistant", "Yes."), message("assistant", "No.")
    explicit = prepare([{"prompt": prompt, "chosen": yes, "rejected": no}])
    whole = prepare([{"chosen": prompt + yes, "rejected": prompt + no}])
    ((rendered, *sides),) = texts(explicit)
    assert rendered.endswith("<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n")
    assert sides == ["Yes.<|im_end|>", "No.<|im_end|>"]
    turned = prepare([{"prompt": prompt, "chosen": no, "rejected": yes}])
    checksums = [data.describe()["preference_checksum"] for data in (explicit, whole, turned)]
    assert texts(explicit) == texts(whole) and checksums[0] == checksums[1] != checksums[2]


def test_rows_that_say_nothing_or_do_not_fit_are_left_out_and_counted():
    rows = [
        {"prompt": "a", "chosen": "same", "rejected": "same"},
        {"prompt": "b" * 40, "chosen": "x", "rejected": "y"},
        {"prompt": "c", "chosen": "x", "rejected": "y"},
    ]
    prepared = prepare(rows, context_length=40)
    assert prepared.preferences["source_row"][:] == [2]
    assert prepared.report["num_dropped_preference_rows"] == 2
    assert len(prepare(rows, context_length=41).preferences) == 2
    assert len(prepare(rows, context_length=1000, max_length=40).preferences) == 1


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"prompt": "a", "chosen": "", "rejected": "y"}, "`chosen` is empty"),
        ({"prompt": "a", "chosen": "x", "rejected": ""}, "its `rejected`, read as a `chosen`: `chosen` is empty"),
        ({"prompt": None, "chosen": "x", "rejected": "y"}, "`chosen` is text without a `prompt`"),
        ({"chosen": CHAT, "rejected": message("user", "B") + CHAT[1:]}, "`chosen` and `rejected` answer different pro"),
    ],
)
def test_row_that_cannot_be_rendered_is_named_or_left_out(row, found):
    good = {"chosen": CHAT, "rejected": CHAT[:1] + message("assistant", "y")}
    rows = [good if row["chosen"] == CHAT else {"prompt": "a", "chosen": "x", "rejected": "y"}, row]
    with pytest.raises(ValueError, match=f"Row 1: {found}") as error:
        prepare(rows)
    assert error.value.__notes__ == ["In `preference_dataset`."]
    prepared = prepare(rows, skip_invalid_rows=True)
    assert prepared.preferences["source_row"][:] == [0]
    (left_out,) = prepared.invalid_rows
    assert (left_out["dataset"], left_out["row"]) == ("preference_dataset", 1) and found in left_out["reason"]


def test_dataset_without_any_pair_is_refused():
    with pytest.raises(ValueError, match="Row 0: mixed formats: `chosen` is text and `rejected` is not. Make both"):
        prepare([{"prompt": "A", "chosen": "x", "rejected": CHAT}])
    with pytest.raises(ValueError, match="No row of .* is left: of 1, 0 are invalid and 1 have equal"):
        prepare([{"prompt": "a", "chosen": "x", "rejected": "x"}])


# Runs


@pytest.fixture
def preferences(train_dataset) -> Dataset:
    """Twelve words that are not trained on otherwise, each with the next one's pronunciation as the rejected side."""
    rows = train_dataset.select(range(20, 32))
    rejected = [*rows["completion"][1:], rows["completion"][0]]
    return Dataset.from_dict({"prompt": rows["prompt"], "chosen": rows["completion"], "rejected": rejected})


@pytest.fixture
def make_trainer(build_trainer):
    def make(preference_dataset: Dataset | None, **overrides) -> SPINTrainer:
        settings = {"num_iterations": 2, "resume": "auto", "save_strategy": "epoch", **overrides}
        return build_trainer(16, preference_dataset=preference_dataset, **settings)

    return make


def test_preferences_join_every_iteration_once_and_are_scored_by_its_opponent(make_trainer, preferences, tokenizer):
    """16 prompts and 12 preferences: 28 pairs, then 44 with history. Batches of 8: 4 and 6 steps."""
    trainer = make_trainer(preferences)
    opinions = BeforeFirstSteps(trainer, lambda model, pairs: trainer.policy.score(pairs))
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == 10
    for iteration, expected in enumerate(([0] * 16 + [PREFERENCE] * 12, [1] * 16 + [0] * 16 + [PREFERENCE] * 12)):
        pairs = load_pairs(trainer.args.output_dir, iteration)
        assert pairs["iteration"][:] == expected
        own = pairs.select(range(len(pairs) - 12, len(pairs)))
        assert own["row"][:] == list(range(-1, -13, -1)) and own["source_row"][:] == list(range(12))
        for column, name in (("prompt_ids", "prompt"), ("chosen_ids", "chosen"), ("rejected_ids", "rejected")):
            decoded = tokenizer.batch_decode(list(own[column]), skip_special_tokens=True)
            assert [text.split() for text in decoded] == [text.split() for text in preferences[name]]
        for name, logps in opinions.found[iteration].items():
            np.testing.assert_allclose(np.array(pairs[name][:]), logps, atol=1e-4)
        metrics = trainer.store.read_metrics(iteration)
        assert metrics["preference_share"] == 12 / len(pairs) and metrics["num_pairs"] == 16
    assert not np.allclose(opinions.found[0]["ref_chosen_logps"][-12:], opinions.found[1]["ref_chosen_logps"][-12:])
    own = pairs.select(range(16))
    nll = -sum(own["ref_chosen_logps"]) / sum(map(len, own["chosen_ids"]))
    assert metrics["opponent_nll"] == pytest.approx(nll)


def test_preferences_go_with_pairs_that_rewards_choose(make_trainer, preferences):
    """They bring chosen sides of their own and no rewards."""
    ranks = itertools.count()  # no two rewards alike, so that every prompt makes a pair

    def reward(completions, **kwargs):
        return [float(next(ranks)) for _ in completions]

    trainer = trained(make_trainer(preferences, pairing="best_of", reward_funcs=reward))
    pairs = load_pairs(trainer.args.output_dir, 1)
    assert pairs["iteration"][:] == [1] * 16 + [0] * 16 + [PREFERENCE] * 12
    assert pairs["chosen_ids"][-12:] == trainer.store.read_preferences()["chosen_ids"][:]
    assert pairs["chosen_reward"][-13] is not None and pairs["chosen_reward"][-12:] == [None] * 12


def test_resumed_run_needs_the_same_preferences_and_writes_them_again_if_they_are_damaged(make_trainer, preferences):
    trainer = trained(make_trainer(preferences, num_iterations=1))
    for other in (None, preferences.select(range(11))):
        with pytest.raises(RunDirectoryError, match="`data.preference_checksum`"):
            make_trainer(other)
    (trainer.store.output_dir / "preference_data" / "checksum.txt").write_text("another")
    with pytest.raises(RunDirectoryError, match="missing or damaged"):
        load_pairs(trainer.args.output_dir, 0)
    again = trained(make_trainer(preferences))
    assert again.run.start.is_resumed and len(load_pairs(again.args.output_dir, 1)) == 44
    another = make_trainer(None, num_iterations=1, resume="never", overwrite_output_dir=True)
    another.train()  # in the same place
    assert another.store.read_preferences() is None and len(load_pairs(another.args.output_dir, 0)) == 16
