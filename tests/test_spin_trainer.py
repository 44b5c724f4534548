"""What SPINTrainer promises of its training, with the in-process sampler."""

import gc
import json
import math

import pytest
import torch
from conftest import TINY_RUN, logp, read_rows
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from spin_trl import SPINConfig, SPINTrainer, load_pairs
from spin_trl.data.pairs import NoPairsError
from spin_trl.generation.sampler import Completion, OpponentSampler


LORA = {"r": 8, "target_modules": "all-linear", "init_lora_weights": True}


@pytest.fixture(scope="module")
def played(tiny_model, tmp_path_factory) -> SPINTrainer:
    """A run of one iteration that is over, with the settings of `make_config`."""
    config = SPINConfig(output_dir=str(tmp_path_factory.mktemp("played")), **{**TINY_RUN, "num_iterations": 1})
    trainer = SPINTrainer(tiny_model, config, train_dataset=Dataset.from_list(read_rows("accent_train.jsonl", 48)))
    trainer.train()
    return trainer


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def first_entries(trainer) -> list[dict]:
    """The log entry of the first step of every iteration."""
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    num_steps = [math.ceil(len(trainer.store.read_pairs(i)) / 8) for i in range(trainer.args.num_iterations)]
    starts = [sum(num_steps[:i]) * trainer.args.epochs_per_iteration for i in range(len(num_steps))]
    return [steps[start] for start in starts]


@pytest.mark.parametrize("peft_config", [None, LoraConfig(**LORA)], ids=["full", "lora"])
def test_policy_equals_opponent_at_first_step_of_every_iteration(play_run, peft_config):
    """There, both rewards are beta * (log p - log p) = 0 and the sigmoid loss is -log sig(0) = log 2."""
    trainer = play_run(peft_config=peft_config)
    entries = first_entries(trainer)
    assert len(entries) == 3
    for entry in entries:
        assert entry["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert entry["rewards/chosen"] == pytest.approx(0, abs=1e-6)
        assert entry["rewards/rejected"] == pytest.approx(0, abs=1e-6)
    assert min(losses(trainer)) < 0.69  # and it is no constant


def num_weights() -> int:
    """Elements of all parameters that live in the process."""
    return sum({id(o): o.numel() for o in gc.get_objects() if isinstance(o, torch.nn.Parameter)}.values())


@pytest.mark.parametrize("peft_config", [None, LoraConfig(**LORA)], ids=["full", "lora"])
def test_process_never_holds_a_second_set_of_weights(play_run, peft_config):
    counts = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            counts.append(num_weights())

    gc.collect()
    before = num_weights()
    trainer = play_run(num_iterations=2, peft_config=peft_config, callbacks=[Count()])
    assert trainer.ref_model is None
    own = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert max(counts) - before == own


def test_losses_equal_those_of_dpo_trainer_with_the_opponent_as_reference(play_run, tiny_model, tmp_path):
    """The same pairs, in the same order, from the same weights."""
    spin = play_run(num_iterations=1)
    pairs = load_pairs(spin.args.output_dir, 0).select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])

    class FromPairs(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _get_train_sampler(self, train_dataset=None):
            return spin._get_train_sampler(train_dataset)

    shared = {name: value for name, value in TINY_RUN.items() if name in DPOConfig.__dataclass_fields__}
    dpo = FromPairs(
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        ref_model=AutoModelForCausalLM.from_pretrained(tiny_model),
        args=DPOConfig(str(tmp_path / "dpo"), num_train_epochs=1, **shared),
        train_dataset=pairs,
        processing_class=spin.processing_class,
    )
    dpo.train()
    assert len(losses(spin)) == 6
    assert losses(spin) == pytest.approx(losses(dpo), abs=1e-4)
    assert max(losses(spin)) - min(losses(spin)) > 1e-2  # there is something to agree on


def test_evaluation_outside_of_a_run_is_refused_with_where_the_scores_are(played):
    with pytest.raises(NotImplementedError, match=r"Pass `eval_dataset` to the trainer.*`trainer\.state\.log_history`"):
        played.evaluate()


def test_pairs_hold_every_prompt_once_and_the_ground_truth_as_chosen(played, train_dataset, tokenizer):
    pairs = played.store.read_pairs(0)
    assert pairs["row"] == list(range(len(train_dataset)))
    decoded = tokenizer.batch_decode(list(pairs["chosen_ids"]), skip_special_tokens=True)
    assert decoded == list(train_dataset["completion"])
    assert all(ids[-1] == tokenizer.eos_token_id for ids in pairs["chosen_ids"])


@pytest.mark.parametrize(
    ("dtype", "peft_config", "is_told"),
    [(torch.bfloat16, None, True), (torch.bfloat16, LoraConfig(**LORA), False), (torch.float32, None, False)],
    ids=["half precision", "half precision under an adapter", "float32"],
)
def test_weights_that_round_small_steps_away_are_told(build_trainer, tiny_model, caplog, dtype, peft_config, is_told):
    build_trainer(model=AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype), peft_config=peft_config)
    assert ("Load the model with `dtype='float32'`" in caplog.text) is is_told


@pytest.mark.parametrize("peft_config", [None, LoraConfig(**LORA)], ids=["full", "lora"])
def test_opponent_answers_in_the_precision_that_the_policy_computes_in(
    tiny_model, train_dataset, make_config, peft_config
):
    config = make_config(num_iterations=1, max_steps=1, bf16=True)
    trainer = SPINTrainer(tiny_model, config, train_dataset=train_dataset, peft_config=peft_config)
    seen = set()
    attention = trainer.model.get_base_model() if peft_config else trainer.model
    attention.model.layers[0].self_attn.register_forward_hook(lambda *call: seen.add(call[-1][0].dtype))
    trainer.train()
    assert seen == {torch.bfloat16}


def test_configuration_of_an_adapter_is_left_as_it_was_passed(build_trainer):
    """A notebook gives the same one to the next trainer, which is to go on with the run."""
    given = LoraConfig(r=8, target_modules="all-linear")
    before = given.to_dict()
    build_trainer(peft_config=given)
    assert given.to_dict() == before


def test_stored_opponent_logps_are_those_of_the_model_at_the_start(tiny_model, played):
    row = played.store.read_pairs(0)[5]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for side in ("chosen", "rejected"):
        expected = logp(model, row["prompt_ids"], row[f"{side}_ids"])
        assert row[f"ref_{side}_logps"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("num_history_iterations", "sizes"), [(0, [48, 48, 48]), (1, [48, 96, 96]), (2, [48, 96, 144])]
)
def test_history_joins_the_pairs_of_previous_iterations(play_run, num_history_iterations, sizes):
    trainer = play_run(num_history_iterations=num_history_iterations)
    assert [len(trainer.store.read_pairs(i)) for i in range(3)] == sizes
    assert trainer.state.global_step == trainer.state.max_steps == sum(math.ceil(size / 8) for size in sizes)
    oldest = min(trainer.store.read_pairs(2)["iteration"])
    assert oldest == 2 - num_history_iterations


def test_every_assistant_turn_of_a_conversation_is_answered_and_paired(play_run, tiny_model, tokenizer):
    """Two conversations of two turns: four pairs, each under a row number of its own."""
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "aBcD", strict=True)]
    rows = [{"messages": turns}, {"messages": [{**turns[0], "content": "bb"}, *turns[1:]]}]
    chat_tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    chat_tokenizer.chat_template = (
        "<s>{% for m in messages %}{{ m.content }}{{ '</s>' if m.role != 'user' }}{% endfor %}"
    )
    data = {"train_dataset": Dataset.from_list(rows), "processing_class": chat_tokenizer}
    pairs = play_run(num_iterations=1, train_on_turns="all", **data).store.read_pairs(0)
    assert (pairs["row"], pairs["source_row"]) == ([0, 1, 2, 3], [0, 0, 1, 1])
    assert tokenizer.batch_decode(list(pairs["prompt_ids"])) == ["<s>a", "<s>aB</s>c", "<s>bb", "<s>bbB</s>c"]
    assert tokenizer.batch_decode(list(pairs["chosen_ids"])) == ["B</s>", "D</s>"] * 2


def test_learning_rate_warms_up_and_decays_within_every_iteration(play_run):
    """48 pairs in batches of 8 are 6 steps, then with history 12. Linear: k/w up to w = 1, then (n-k)/(n-w)."""
    trainer = play_run(num_iterations=2, warmup_steps=2)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]

    def expected(num_steps):
        return [1e-3 * min(k / 2, (num_steps - k) / (num_steps - 2)) for k in range(num_steps)]

    assert rates == pytest.approx(expected(6) + expected(12))


@pytest.mark.parametrize("reset_optimizer", [True, False])
def test_optimizer_moments_start_fresh_if_asked(play_run, reset_optimizer):
    seen = {}

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            seen[state.global_step] = len(optimizer.state)

    play_run(num_iterations=2, reset_optimizer=reset_optimizer, callbacks=[Watch()])
    assert seen[0] == 0 and seen[5] > 0
    assert (seen[6] == 0) is reset_optimizer


@pytest.mark.parametrize(
    ("settings", "num_steps"),
    [
        ({"max_steps": 8, "num_iterations": 3}, 8),
        ({"epochs_per_iteration": 2, "num_history_iterations": 0}, 6 * 2 + 6 * 2),
        ({"gradient_accumulation_steps": 4}, 2 + 3),
    ],
    ids=["a cap on the whole run", "several epochs", "accumulated batches"],
)
def test_steps_are_those_of_all_iterations(play_run, settings, num_steps):
    """Six batches, then twelve with those of history."""
    trainer = play_run(**{"num_iterations": 2, **settings})
    assert trainer.state.global_step == trainer.state.max_steps == num_steps
    assert trainer.store.iterations() == [0, 1]


def test_same_seed_gives_the_same_run_and_another_seed_another(play_run, tmp_path):
    def play(seed, name):
        trainer = play_run(num_iterations=2, seed=seed, output_dir=str(tmp_path / name))
        return losses(trainer), trainer.store.read_pairs(1)["rejected_ids"][:]

    first, again, other = play(1, "a"), play(1, "b"), play(2, "c")
    assert first == again
    assert first[1] != other[1]


def test_completion_length_is_capped_by_the_ground_truths_99th_percentile(build_trainer):
    """Lengths 2 to 101 with their end token: the 99th percentile is 100.01, rounded up."""
    rows = [{"prompt": "a", "completion": "AA " * n} for n in range(1, 101)]
    trainer = build_trainer(max_completion_length=None, train_dataset=Dataset.from_list(rows))
    assert trainer.args.max_completion_length == 101


def test_evaluation_prints_a_table_that_grows_by_iteration(play_run, eval_dataset, capsys):
    def compute(prompts, references, generations):
        assert prompts == list(eval_dataset["prompt"])
        assert references == list(eval_dataset["completion"])
        return {"share_of_vowels": 0.25}

    trainer = play_run(
        num_iterations=2, learning_rate=1e-4, eval_dataset=eval_dataset, compute_generation_metrics=compute
    )
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["after", "nll", "share_of_vowels"] in lines
    assert [line[:-2] for line in lines if line[-1:] == ["0.2500"]] == [
        ["start"],
        ["iteration", "0"],
        ["iteration", "1"],
    ]
    assert trainer.store.read_metrics(2)["evaluation"]["share_of_vowels"] == 0.25


def test_evaluation_nll_is_the_mean_over_tokens_of_the_ground_truth(play_run, tiny_model, eval_dataset):
    trainer = play_run(num_iterations=1, per_device_eval_batch_size=5, eval_dataset=eval_dataset)
    model, rows = AutoModelForCausalLM.from_pretrained(tiny_model), trainer.plan.data.eval
    total = -sum(logp(model, row["prompt_ids"], row["chosen_ids"]) for row in rows)
    num_tokens = sum(map(len, rows["chosen_ids"]))
    assert trainer.store.read_metrics(0)["evaluation"]["nll"] == pytest.approx(total / num_tokens, abs=1e-5)


def test_policy_continues_from_a_trained_adapter(play_run, tiny_model):
    """Its first opponent is the adapter as passed, not the base model."""
    model = PeftModel(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(**LORA))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    trainer = play_run(model=model, num_iterations=1)
    assert list(trainer.model.peft_config) == ["default"]
    assert first_entries(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_run_directory_says_what_was_run(tiny_model, played):
    run = played.store.read_run()
    assert run["model"] == tiny_model
    assert run["config"]["num_iterations"] == 1
    assert run["data"]["num_train_rows"] == 48
    assert run["versions"]["trl"].startswith("1.16")


def test_existing_run_is_refused_and_overwritten_only_if_asked(play_run, build_trainer):
    play_run(num_iterations=2)
    again = build_trainer(num_iterations=1)
    with pytest.raises(FileExistsError, match=r"iterations \[0, 1\].*overwrite_output_dir"):
        again.train()
    trainer = play_run(num_iterations=1, overwrite_output_dir=True)
    assert trainer.store.iterations() == [0]


def test_rows_that_are_double_or_too_long_for_the_context_are_dropped_and_counted(play_run, train_dataset):
    rows = [*train_dataset, train_dataset[7], {"prompt": "a" * 70, "completion": "B"}]
    trainer = play_run(num_iterations=1, train_dataset=Dataset.from_list(rows))
    data = trainer.store.read_run()["data"]
    assert (data["num_source_rows"], data["num_duplicate_rows"], data["num_dropped_rows"]) == (50, 1, 1)
    assert trainer.store.read_pairs(0)["source_row"] == list(range(48))


def test_invalid_rows_are_left_out_if_asked_and_listed_in_the_run_directory(play_run, train_dataset):
    rows = Dataset.from_list([{"prompt": "", "completion": "B"}, *train_dataset])
    trainer = play_run(num_iterations=1, skip_invalid_rows=True, train_dataset=rows)
    (line,) = (trainer.store.output_dir / "invalid_rows.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == 0 and json.loads(line)["reason"].startswith("`prompt` is empty")
    assert trainer.store.read_run()["data"]["num_invalid_rows"] == 1
    pairs = trainer.store.read_pairs(0)
    assert (pairs["row"][0], pairs["source_row"][0], pairs["source_row"][-1]) == (0, 1, 48)


class RepeatsTheTruth(OpponentSampler):
    """Says the ground truth of all rows but some."""

    reads_checkpoints = False

    def __init__(self, wrong: set[int]):
        self.truths = {}
        self.wrong = wrong

    def sample(self, requests, params, logprobs=False):
        for request in requests:
            row = request.key[0]
            token_ids = [params.end_token_ids[0]] if row in self.wrong else self.truths[row]
            yield Completion(request.key, token_ids, "stop")

    def publish(self, iteration, checkpoint, earlier=None): ...


@pytest.fixture
def repeating(build_trainer):
    """A factory of trainers whose opponent is wrong in the first rows, so many, and repeats the ground truth else."""

    def build(num_wrong: int, **settings) -> SPINTrainer:
        trainer = build_trainer(sampler=RepeatsTheTruth(set(range(num_wrong))), **settings)
        data = trainer.plan.data.train
        trainer.sampler.truths = dict(zip(data["row"], data["chosen_ids"], strict=True))
        return trainer

    return build


@pytest.mark.parametrize(("identical_pairs", "num_pairs"), [(None, 9), ("keep", 48)])
def test_pairs_of_equal_sides_are_not_trained_on_unless_asked(repeating, identical_pairs, num_pairs):
    """Of 48 answers 9 are no words at all, and 39 repeat the ground truth: nine pairs are two steps, 48 are six."""
    trainer = repeating(9, num_iterations=1, identical_pairs=identical_pairs)
    trainer.train()
    assert len(trainer.store.read_pairs(0)) == num_pairs
    assert trainer.state.global_step == math.ceil(num_pairs / 8)
    metrics = trainer.store.read_metrics(0)
    assert (metrics["num_pairs"], metrics["num_training_pairs"]) == (48, num_pairs)
    assert metrics["identical_share"] == 39 / 48
    assert all(math.isfinite(loss) for loss in losses(trainer))


def test_opponent_that_repeats_every_ground_truth_stops_the_run_with_what_it_means(repeating):
    trainer = repeating(0, identical_pairs=None)
    with pytest.raises(NoPairsError, match="reproduces the ground truth in all 48 pairs of this iteration"):
        trainer.train()
    assert trainer.store.read_metrics(0)["identical_share"] == 1.0


def test_truncated_shares_of_both_sides_are_reported(repeating):
    """At a `max_length` of 10 the empty answers always fit, and of the ground truths those that are short enough."""
    trainer = repeating(48, num_iterations=1, max_length=10)
    dataset = trainer.game.dataset
    lengths = [len(p) + len(c) for p, c in zip(dataset["prompt_ids"], dataset["chosen_ids"], strict=True)]
    assert 0 < sum(length > 10 for length in lengths)
    trainer.train()
    metrics = trainer.store.read_metrics(0)
    assert metrics["chosen_truncated_share"] == sum(length > 10 for length in lengths) / len(dataset)
    assert metrics["rejected_truncated_share"] == sum(len(p) + 1 > 10 for p in dataset["prompt_ids"]) / len(dataset)


def test_second_training_plays_against_the_policy_as_the_first_left_it(play_run):
    trainer = play_run(num_iterations=1, overwrite_output_dir=True)
    first = trainer.store.read_pairs(0)["rejected_ids"][:]
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert trainer.store.read_pairs(0)["rejected_ids"][:] != first
    assert not trainer.game.opponents.base_is_opponent


def test_several_generations_make_as_many_pairs_of_each_prompt(play_run):
    trainer = play_run(num_iterations=1, num_generations=3)
    pairs = trainer.store.read_pairs(0)
    assert list(zip(pairs["row"], pairs["sample"], strict=True)) == [(r, s) for r in range(48) for s in range(3)]
    answers = [pairs["rejected_ids"][3 * row : 3 * row + 3] for row in range(48)]
    assert sum(a != b or b != c for a, b, c in answers) > 24  # they are samples, not copies
