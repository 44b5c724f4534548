"""The pronunciation demo's data, tokenizer, metrics and starting model."""

import shutil
from pathlib import Path

import pronunciation_sft
import pytest
from conftest import DATA
from datasets import Dataset
from pronunciation_metrics import compute_generation_metrics, edit_distance
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig


FILES = ["train", "test", "accent_train", "accent_test"]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, str]]]:
    return {name: Dataset.from_json(str(DATA / f"{name}.jsonl")).to_list() for name in FILES}


def test_files_have_the_rows_their_readme_names_and_no_test_word_is_trained_on(rows):
    assert [len(rows[name]) for name in FILES] == [10_000, 1_000, 1_000, 1_000]
    train_words = {row["prompt"] for name in ("train", "accent_train") for row in rows[name]}
    assert train_words.isdisjoint(row["prompt"] for row in rows["test"])
    assert [row["prompt"] for row in rows["accent_test"]] == [row["prompt"] for row in rows["test"]]


@pytest.mark.parametrize("name", FILES)
def test_token_is_a_letter_or_a_phone_and_every_row_fits_the_model(tokenizer, rows, name):
    """The tokens of a prompt are those that it has with its completion, as TRL joins them; decoding gives both back."""
    prompts = [row["prompt"] for row in rows[name]]
    texts = [row["prompt"] + row["completion"] for row in rows[name]]
    joined = zip(rows[name], tokenizer(prompts)["input_ids"], tokenizer(texts)["input_ids"], strict=True)
    for row, prompt_ids, row_ids in joined:
        phones = row["completion"].split()
        assert row_ids[: len(prompt_ids)] == prompt_ids and tokenizer.unk_token_id not in row_ids, row
        assert tokenizer.convert_ids_to_tokens(row_ids) == ["<s>", *row["prompt"], *phones], row
        assert tokenizer.decode(row_ids[len(prompt_ids) :]) == row["completion"]
        assert len(row_ids) + 1 <= pronunciation_sft.MAX_LENGTH  # with the end token, which the tokenizer does not add


def test_symbol_outside_the_vocabulary_becomes_the_unknown_token(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("o'b7 QX")["input_ids"])
    assert tokens == ["<s>", "o", "<unk>", "b", "<unk>", "<unk>"]


@pytest.mark.parametrize(
    ("reference", "generation", "expected"),
    [
        ("B AA R", "B AA R", 0),
        ("B AA R", "B AO R", 1),  # AA -> AO
        ("B AA R", "B AA", 1),  # R deleted
        ("B AA R", "", 3),  # all deleted
        ("S P AA T ER Z", "P AA T AX Z Z", 3),  # S deleted, ER -> AX, Z inserted
        ("K IH T AX N", "S IH T IH NG G", 4),  # three substituted, G inserted
        ("A B", "B A", 2),  # a swap is two edits
    ],
)
def test_edit_distance_counts_insertions_deletions_and_substitutions(reference, generation, expected):
    assert edit_distance(reference.split(), generation.split()) == expected
    assert edit_distance(generation.split(), reference.split()) == expected


def test_metrics_by_hand():
    """
    `bar` is right: 0 edits of 3 phones. `spotters` has AX for ER and lacks its Z: 2 edits of 6 phones. So 1 word of 2
    is right, and the rate is (0 + 2) / (3 + 6), not the mean of 0/3 and 2/6. Where too much is generated it passes one.
    """
    metrics = compute_generation_metrics(["bar", "spotters"], ["B AA R", "S P AA T ER Z"], ["B AA R", "S P AA T AX"])
    assert metrics == {"word_accuracy": 0.5, "phone_error_rate": pytest.approx(2 / 9)}
    metrics = compute_generation_metrics(["go"], ["G OW"], ["G OW G OW G OW"])
    assert metrics == {"word_accuracy": 0.0, "phone_error_rate": 2.0}
    with pytest.raises(ValueError, match="1 `references` and 2 `generations`"):
        compute_generation_metrics(["go"], ["G OW"], ["G OW", "G OW"])


def train_two_steps(output_dir: Path, **script_arguments) -> None:
    on_cpu = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    brief = {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": "none"}
    training_args = SFTConfig(output_dir=str(output_dir), disable_tqdm=True, **on_cpu, **brief)
    script_arguments.setdefault("train_file", str(DATA / "accent_train.jsonl"))
    # An untrained model does not end its answers, so to measure it would take long.
    script_args = pronunciation_sft.ScriptArguments(evaluate=False, **script_arguments)
    pronunciation_sft.main(script_args, training_args)


@pytest.fixture(scope="module")
def trained_dir(tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("pronunciation") / "sft"
    train_two_steps(output_dir)
    return output_dir


def test_saved_folder_loads_by_the_auto_classes_and_nothing_is_left_beside_it(trained_dir):
    model = AutoModelForCausalLM.from_pretrained(trained_dir)
    tokenizer = AutoTokenizer.from_pretrained(trained_dir)
    assert tokenizer.decode(tokenizer("barroomB AO R")["input_ids"]) == "<s>barroomB AO R"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert [path.name for path in trained_dir.parent.iterdir()] == ["sft"]


def test_folder_that_is_there_is_not_trained_again_but_with_overwrite(trained_dir, tmp_path, capsys):
    """And then over what an interrupted run left."""
    output_dir = tmp_path / "sft"
    shutil.copytree(trained_dir, output_dir)
    (output_dir / "model.safetensors").write_bytes(b"old")
    train_two_steps(output_dir)
    assert "--overwrite" in capsys.readouterr().out
    assert (output_dir / "model.safetensors").read_bytes() == b"old"
    (tmp_path / "sft.partial").mkdir()
    (tmp_path / "sft.partial" / "leftover").touch()
    train_two_steps(output_dir, overwrite=True)
    assert (output_dir / "model.safetensors").read_bytes() == (trained_dir / "model.safetensors").read_bytes()
    assert not (output_dir / "leftover").exists()


def test_further_training_starts_from_the_given_model_and_keeps_its_tokenizer(trained_dir, tmp_path):
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
