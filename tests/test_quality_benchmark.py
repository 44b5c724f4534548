"""The parts of `benchmarks/quality.py` that need no training: data, distances, the search, tables."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, read_rows


sys.path.insert(0, str(ROOT / "benchmarks"))  # benchmarks are scripts, not a package

from self_play_family import language, report  # noqa: E402
from self_play_family.answers import completion_ids, logps  # noqa: E402
from self_play_family.findings import (  # noqa: E402
    SEARCH_SEED,
    Tried,
    at_the_edge,
    best,
    chosen_runs,
    collect,
    search_runs,
    start_runs,
)
from self_play_family.measures import distinct_n  # noqa: E402
from self_play_family.methods import METHODS  # noqa: E402
from self_play_family.runs import Run, perform  # noqa: E402
from self_play_family.supervised import character_tokenizer  # noqa: E402
from self_play_family.tasks import TASKS  # noqa: E402


@pytest.mark.parametrize("name", TASKS)
def test_data_are_the_same_each_time_and_no_prompt_is_in_two_parts(name):
    rows = TASKS[name].make_rows()
    assert rows == TASKS[name].make_rows()
    parts = [{row["prompt"] for row in part} for part in rows.values()]
    assert len(parts) >= 3 and all(parts)
    assert len(set.union(*parts)) == sum(len(prompts) for prompts in parts)


def test_sums_are_right():
    for rows in TASKS["addition"].make_rows().values():
        for row in rows[:100]:
            first, second = row["prompt"].removesuffix("=").split("+")
            assert len(first) == len(second) == 3
            assert int(first) + int(second) == int(row["completion"])


def test_pronunciations_to_validate_and_test_on_are_in_no_data_of_the_start():
    seen = {row["prompt"] for row in read_rows("train.jsonl", 10_000)}
    rows = TASKS["pronunciation"].make_rows()
    assert not seen & {row["prompt"] for part in ("validation", "test") for row in rows[part]}


@pytest.mark.parametrize("task", TASKS)
def test_each_method_searches_as_many_settings(task):
    searched = [method.settings(TASKS[task].learning_rates) for method in METHODS.values()]
    assert {len({str(setting) for setting in settings}) for settings in searched} == {6}


# Measures


def test_probabilities_of_the_language_by_hand():
    """Behind "ab" c comes in 0.2 of all cases and the end in 0.5: c is first in 0.2 / (1 - 0.5)."""
    for prompt in ("abc", "ddd"):
        probabilities = language.LANGUAGE.probabilities(prompt)
        assert len(probabilities) == 4 + 16 + 64 + 256
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-12)
    transitions = language.LANGUAGE.transitions.copy()
    transitions[1] = [0.1, 0.1, 0.2, 0.1, 0.5]  # behind a, b
    transitions[6] = [0.3, 0.1, 0.1, 0.1, 0.4]  # behind b, c
    assert language.Language(transitions).probabilities("cab")["c"] == pytest.approx(0.4 * 0.4)


def test_total_variation_by_hand():
    """
    |0.5 - 0.25| + |0.5 - 0.25| and 0.5 on sequences that the truth does not have, halved. A model that finds all 8
    tokens equally likely gives n letters and the end 8^-(n+1): the distance is by how much the truth exceeds that.
    """
    assert language.total_variation({"a": 0.5, "b": 0.5}, {"a": 0.25, "b": 0.25}) == 0.5
    assert language.total_variation({"a": 0.9, "b": 0.1}, {"a": 0.9, "b": 0.1}) == 0
    rows = [{"prompt": "abc", "completion": "a"}] * 2
    truth = language.LANGUAGE.probabilities("abc")
    excess = sum(max(0.0, p - 8.0 ** -(len(answer) + 1)) for answer, p in truth.items())
    assert language.score(uniform_model, character_tokenizer(language.LETTERS), rows) == pytest.approx(excess, abs=1e-6)


def uniform_model(input_ids: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 8))


def test_logps_are_those_of_the_completions_alone_whatever_their_lengths():
    def next_number(input_ids):  # e / (e + 7) for the number behind the last one, 1 / (e + 7) for the others
        return SimpleNamespace(logits=torch.nn.functional.one_hot((input_ids + 1) % 8, 8).float())

    found = logps(next_number, [[1, 2], [3]], [[3, 4, 5], [5]])
    total = torch.e + 7
    expected = [3 - 3 * torch.tensor(total).log().item(), -torch.tensor(total).log().item()]
    assert found == pytest.approx(expected, abs=1e-5)


def test_completion_ids_end_with_the_end_token():
    tokenizer = character_tokenizer("0123456789+=")
    assert tokenizer.decode(completion_ids(tokenizer, "1+2=", "3")) == "3</s>"


def test_distinct_n_by_hand():
    """Of 5 tokens 3 differ; of the pairs 1 2, 2 1 and 1 2 two."""
    assert distinct_n([[1, 2, 1], [1, 2], [3]]) == {"distinct_1": 3 / 6, "distinct_2": 2 / 3}


# Search, runs and report

TRIED = [Tried({"learning_rate": rate}, score) for rate, score in ((1, 0.3), (2, 0.5), (3, 0.1), (4, None))]


def test_search_finds_the_greatest_or_the_least_skips_what_has_no_score_and_tells_an_end_of_the_learning_rates():
    assert best(TRIED, greater_is_better=True) == {"learning_rate": 2}
    assert best(TRIED, greater_is_better=False) == {"learning_rate": 3}
    assert best([Tried({"learning_rate": 1}, float("nan")), TRIED[0]], True) == {"learning_rate": 1}
    with pytest.raises(ValueError, match="None of 1 settings has a score"):
        best(TRIED[3:], True)
    assert [at_the_edge(tried.setting, TRIED) for tried in TRIED] == [True, False, False, True]


@pytest.fixture
def finished(tmp_path):
    """Results of SPIN on the addition task, as if played: the second setting is the best on the validation part."""
    task, start = TASKS["addition"], tmp_path / "addition" / "start"
    character_tokenizer("0123456789+=").save_pretrained(start)
    (start / "model.safetensors").write_bytes(b"weights")

    def finish(run: Run, scores: list[float]) -> None:
        measures = [{"score": s, "nll": s / 100, "distinct_1": 0.1, "distinct_2": 0.2} for s in scores]
        perform(run, lambda run, task: measures)

    for run, score in zip(start_runs(tmp_path, "addition", False), [60.0, 65.0], strict=True):
        finish(run, [score])
    for i, run in enumerate(search_runs(tmp_path, task, METHODS["spin"], False)):
        finish(run, [99.0, 70.0, 80.0 if i == 1 else 75.0])
    for seed in (1, 2, 3):
        for run in chosen_runs(tmp_path, task, METHODS["spin"], [seed], False):
            finish(run, [70.0 + seed, 75.0, 80.0 + 2 * seed])
    return tmp_path


def test_best_on_the_validation_part_after_the_last_iteration_is_tested(finished):
    task = TASKS["addition"]
    tested = chosen_runs(finished, task, METHODS["spin"], [1, 2], False)
    chosen = METHODS["spin"].settings(task.learning_rates)[1]
    assert [(run.setting, run.seed, run.part) for run in tested] == [(chosen, 1, "test"), (chosen, 2, "test")]
    assert SEARCH_SEED not in [run.seed for run in tested]


def test_finished_run_is_read_back_and_one_of_another_start_is_not(finished):
    run, _ = start_runs(finished, "addition", False)
    assert run.result()["scores"][0]["score"] == 60.0
    (run.start / "model.safetensors").write_bytes(b"other weights")
    assert run.result() is None


def test_only_methods_whose_runs_are_all_over_are_reported(finished):
    (findings,) = collect(finished, [1, 2, 3], False)
    assert list(findings.runs) == ["SPIN"]
    assert findings.values("score")["SPIN"] == [[70.0 + s, 75.0, 80.0 + 2 * s] for s in (1, 2, 3)]
    assert collect(finished, [1, 2, 3, 4], False) == []


def test_run_whose_loss_is_no_number_is_kept_without_scores(finished):
    def fails(run, task):
        raise FloatingPointError("The loss is nan.")

    run = perform(Run(finished, "addition", "spin", {"learning_rate": 1.0}, 1, "test"), fails)
    assert run.result()["scores"] is None and run.result()["error"] == "The loss is nan."


def test_paragraph_by_hand_is_kept_when_the_tables_are_written_again(finished, tmp_path):
    path = tmp_path / "quality.md"
    report.write_report(collect(finished, [1, 2, 3], False), [1, 2, 3], path, "2026-01-01, here")
    written = path.read_text()
    assert written.count(report.TO_FILL_IN) == 1
    path.write_text(written.replace(report.TO_FILL_IN, "Choose SPIN.\n\nOr not.").replace("84.0 ± 2.0", "0"))
    report.write_report(collect(finished, [1, 2, 3], False), [1, 2, 3], path, "2026-01-01, here")
    assert path.read_text() == written.replace(report.TO_FILL_IN, "Choose SPIN.\n\nOr not.")
    assert "| SPIN | 60.0 | 72.0 ± 1.0 | 75.0 ± 0.0 | 84.0 ± 2.0 |" in written
    assert "the start has 65.0:" in written  # on the validation part, as the settings have
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_end_of_the_learning_rates_and_lost_runs_are_said(finished):
    (findings,) = collect(finished, [1, 2, 3], False)
    findings.diverged = ["SPIN, seed 7"]
    text = report.document([findings], [1, 2, 3], "kept", "quality.png", "here")
    assert "perhaps not at its best: SPIN." in text
    assert "left out: SPIN, seed 7." in text
