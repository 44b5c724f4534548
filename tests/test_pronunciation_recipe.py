"""The pronunciation demo's data, tokenizer, metrics and starting model."""

import sys
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig


RECIPES_DIR = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(RECIPES_DIR))  # recipes are scripts, not a package

import pronunciation_sft  # noqa: E402
from pronunciation_metrics import compute_generation_metrics, edit_distance  # noqa: E402


FILES = ["train", "test", "accent_train", "accent_test"]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, str]]]:
    return {name: Dataset.from_json(str(pronunciation_sft.DATA_DIR / f"{name}.jsonl")).to_list() for name in FILES}


@pytest.fixture(scope="module")
def tokenizer(rows):
    return pronunciation_sft.build_tokenizer(
        sorted({phone for row in rows["train"] for phone in row["completion"].split()})
    )


class TestData:
    def test_each_file_has_the_rows_its_readme_names(self, rows):
        assert {name: len(rows[name]) for name in FILES} == {
            "train": 10_000,
            "test": 1_000,
            "accent_train": 1_000,
            "accent_test": 1_000,
        }

    def test_no_test_word_is_in_a_train_file(self, rows):
        train_words = {row["prompt"] for name in ("train", "accent_train") for row in rows[name]}
        assert train_words.isdisjoint(row["prompt"] for row in rows["test"])

    def test_both_test_files_hold_the_same_words_in_the_same_order(self, rows):
        assert [row["prompt"] for row in rows["accent_test"]] == [row["prompt"] for row in rows["test"]]


class TestTokenizer:
    def test_a_token_is_a_letter_or_a_phone(self, tokenizer):
        tokens = tokenizer.convert_ids_to_tokens(tokenizer("barroomB AO R UW M</s>")["input_ids"])
        assert tokens == ["<s>", *"barroom", "B", "AO", "R", "UW", "M", "</s>"]

    @pytest.mark.parametrize("name", FILES)
    def test_prompt_tokens_are_a_strict_prefix_of_prompt_and_completion_tokens(self, tokenizer, rows, name):
        for row, prompt_ids, row_ids in self.tokenized(tokenizer, rows[name]):
            assert row_ids[: len(prompt_ids)] == prompt_ids, row
            assert len(row_ids) == len(prompt_ids) + len(row["completion"].split()), row
            assert tokenizer.unk_token_id not in row_ids, row

    @pytest.mark.parametrize("name", FILES)
    def test_decoding_gives_back_the_word_and_the_phones(self, tokenizer, rows, name):
        for row, prompt_ids, row_ids in self.tokenized(tokenizer, rows[name]):
            assert tokenizer.decode(prompt_ids, skip_special_tokens=True) == row["prompt"]
            assert tokenizer.decode(row_ids[len(prompt_ids) :]) == row["completion"]
            assert tokenizer.decode(row_ids, skip_special_tokens=True) == row["prompt"] + row["completion"]

    @pytest.mark.parametrize("name", FILES)
    def test_rows_with_their_end_token_fit_the_model(self, tokenizer, rows, name):
        longest = max(len(row_ids) for _, _, row_ids in self.tokenized(tokenizer, rows[name]))
        assert longest + 1 <= pronunciation_sft.MAX_LENGTH

    def test_no_end_token_is_added(self, tokenizer):
        assert tokenizer.eos_token_id not in tokenizer("barroomB AO R UW M")["input_ids"]

    def test_a_symbol_outside_the_vocabulary_becomes_the_unknown_token(self, tokenizer):
        tokens = tokenizer.convert_ids_to_tokens(tokenizer("o'b7 QX")["input_ids"])
        assert tokens == ["<s>", "o", "<unk>", "b", "<unk>", "<unk>"]

    @staticmethod
    def tokenized(tokenizer, rows):
        """Each row with the token ids of its prompt, and of its prompt and completion as TRL joins them."""
        prompts = [row["prompt"] for row in rows]
        texts = [row["prompt"] + row["completion"] for row in rows]
        return zip(rows, tokenizer(prompts)["input_ids"], tokenizer(texts)["input_ids"], strict=True)


class TestMetrics:
    @pytest.mark.parametrize(
        ("reference", "generation", "expected"),
        [
            ("B AA R", "B AA R", 0),
            ("B AA R", "B AO R", 1),  # AA -> AO
            ("B AA R", "B AA", 1),  # R deleted
            ("B AA R", "B AA R R", 1),  # R inserted
            ("B AA R", "", 3),  # all deleted
            ("", "B AA", 2),  # all inserted
            ("S P AA T ER Z", "P AA T AX Z Z", 3),  # S deleted, ER -> AX, Z inserted
            ("K IH T AX N", "S IH T IH NG G", 4),  # three substituted, G inserted
            ("A B", "B A", 2),  # a swap is two edits
        ],
    )
    def test_edit_distance_counts_insertions_deletions_and_substitutions(self, reference, generation, expected):
        assert edit_distance(reference.split(), generation.split()) == expected
        assert edit_distance(generation.split(), reference.split()) == expected

    def test_metrics_of_two_words_by_hand(self):
        """
        `bar` is right: 0 edits of 3 phones. `spotters` has AX for ER and lacks its Z: 2 edits of 6 phones.
        So 1 word of 2 is right, and the rate is (0 + 2) / (3 + 6), not the mean of 0/3 and 2/6.
        """
        metrics = compute_generation_metrics(
            ["bar", "spotters"], ["B AA R", "S P AA T ER Z"], ["B AA R", "S P AA T AX"]
        )
        assert metrics == {"word_accuracy": 0.5, "phone_error_rate": pytest.approx(2 / 9)}

    def test_phone_error_rate_passes_one_when_too_much_is_generated(self):
        """The 2 phones are right, but 4 more were inserted: 4 / 2."""
        metrics = compute_generation_metrics(["go"], ["G OW"], ["G OW G OW G OW"])
        assert metrics == {"word_accuracy": 0.0, "phone_error_rate": 2.0}

    @pytest.mark.parametrize("generations", [[], ["G OW", "G OW"]])
    def test_lists_of_unequal_length_are_refused(self, generations):
        with pytest.raises(ValueError, match=rf"1 `references` and {len(generations)} `generations`"):
            compute_generation_metrics(["go"], ["G OW"], generations)


def train_two_steps(output_dir: Path, **script_arguments) -> None:
    training_args = SFTConfig(
        output_dir=str(output_dir),
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    script_arguments.setdefault("train_file", str(pronunciation_sft.DATA_DIR / "accent_train.jsonl"))
    # An untrained model does not end its answers, so to measure it would take long.
    script_args = pronunciation_sft.ScriptArguments(evaluate=False, **script_arguments)
    pronunciation_sft.main(script_args, training_args)


@pytest.fixture(scope="module")
def trained_dir(tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("pronunciation") / "sft"
    train_two_steps(output_dir)
    return output_dir


class TestTraining:
    def test_a_saved_folder_loads_by_the_auto_classes(self, trained_dir):
        model = AutoModelForCausalLM.from_pretrained(trained_dir)
        tokenizer = AutoTokenizer.from_pretrained(trained_dir)
        assert tokenizer.decode(tokenizer("barroomB AO R")["input_ids"]) == "<s>barroomB AO R"
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
        assert model.config.eos_token_id == tokenizer.eos_token_id
        assert model.get_input_embeddings().num_embeddings == len(tokenizer)

    def test_nothing_is_left_beside_the_saved_folder(self, trained_dir):
        assert [path.name for path in trained_dir.parent.iterdir()] == ["sft"]

    def test_a_folder_that_is_there_is_not_trained_again(self, trained_dir, capsys):
        written_at = (trained_dir / "model.safetensors").stat().st_mtime_ns
        train_two_steps(trained_dir)
        assert "--overwrite" in capsys.readouterr().out
        assert (trained_dir / "model.safetensors").stat().st_mtime_ns == written_at

    def test_overwrite_trains_again_over_what_an_interrupted_run_left(self, trained_dir, tmp_path):
        output_dir = tmp_path / "sft"
        output_dir.mkdir()
        (tmp_path / "sft.partial").mkdir()
        (tmp_path / "sft.partial" / "leftover").touch()
        train_two_steps(output_dir, overwrite=True)
        assert (output_dir / "model.safetensors").read_bytes() == (trained_dir / "model.safetensors").read_bytes()
        assert not (output_dir / "leftover").exists()

    def test_further_training_starts_from_the_given_model_and_keeps_its_tokenizer(self, trained_dir, tmp_path):
        """At TRL's learning rate of 2e-5 two steps of AdamW move no weight by more than about 4e-5."""
        (tmp_path / "go.jsonl").write_text('{"prompt": "go", "completion": "G OW"}\n')
        output_dir = tmp_path / "further"
        train_two_steps(output_dir, init_from=str(trained_dir), train_file=str(tmp_path / "go.jsonl"))
        before = AutoModelForCausalLM.from_pretrained(trained_dir).state_dict()
        after = AutoModelForCausalLM.from_pretrained(output_dir).state_dict()
        moves = [(after[name] - weight).abs().max().item() for name, weight in before.items()]
        assert 0 < max(moves) < 5e-5
        vocabularies = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (trained_dir, output_dir)]
        assert vocabularies[0] == vocabularies[1]
