"""Fictitious play: who is drawn, that the drawn one answers, and that policy and reference are the newest all along."""

import json
import os
import re
import shutil
import signal
from itertools import groupby, islice

import numpy as np
import pytest
import torch
from conftest import DATA, BeforeFirstSteps, all_completions, read_rows
from datasets import Dataset
from fault_server import FakeVLLM
from kill_points import PLACES
from peft import LoraConfig, PeftModel
from real_server import make_opponent
from stopping import AtStep, train_until_stopped
from test_kill_and_resume import assert_ends_the_same, start
from test_reference_mixture import changed_model, of_six_pairs
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from spin_trl import SPINConfig, SPINTrainer, load_pairs
from spin_trl.data.draw import OpponentDraw
from spin_trl.generation.sampler import CompletionRequest, SamplingParams
from spin_trl.run_directory.store import RunDirectoryError


LORA = {"r": 8, "target_modules": "all-linear"}
TRAIN_FILE = DATA / "accent_train.jsonl"


# The draw


def test_draws_are_uniform_over_the_last_opponents():
    """Of 30,000 draws from three each is expected 10,000 times, with a standard deviation of 82."""
    drawn = OpponentDraw(iteration=7, num_opponents=3, seed=42).of_rows(np.arange(30_000))
    opponents, counts = np.unique(drawn, return_counts=True)
    assert opponents.tolist() == [5, 6, 7]
    assert abs(counts - 10_000).max() < 4 * 82


def test_draw_is_the_same_in_any_order_at_any_time_and_on_any_machine():
    """By `b2sum -l 64` of "(42, 4, 'opponent', 0)" and so on: 2 and the sum modulo 3."""
    draw = OpponentDraw(iteration=4, num_opponents=3, seed=42)
    assert [draw.of_row(row) for row in range(12)] == [2, 2, 2, 4, 4, 4, 4, 4, 3, 3, 4, 2]
    assert draw.of_rows(np.array([3, 1, 3])).tolist() == [4, 2, 4]


@pytest.mark.parametrize("other", [{"seed": 43}, {"iteration": 5}])
def test_another_seed_and_another_iteration_draw_anew(other):
    rows, fields = np.arange(1000), {"iteration": 4, "num_opponents": 2, "seed": 42}
    one, two = (OpponentDraw(**fields), OpponentDraw(**{**fields, **other}))
    assert 400 < (one.of_rows(rows) - one.iteration == two.of_rows(rows) - two.iteration).sum() < 600


@pytest.mark.parametrize(
    ("iteration", "num_opponents", "opponents"),
    [(0, 3, [0]), (1, 3, [0, 1]), (2, 3, [0, 1, 2]), (5, 3, [3, 4, 5]), (5, 1, [5])],
)
def test_as_many_take_part_as_there_are_by_then(iteration, num_opponents, opponents):
    draw = OpponentDraw(iteration, num_opponents, seed=0)
    assert list(draw.opponents) == sorted(set(draw.of_rows(np.arange(200)).tolist())) == opponents


# The policy plays them, in-process


def greedy_answer(model, prompt_ids: list[int], num_tokens: int, end: int) -> list[int]:
    ids = torch.tensor([prompt_ids])
    with torch.no_grad():
        answer = model.generate(ids, max_new_tokens=num_tokens, do_sample=False, eos_token_id=end, pad_token_id=end)
    return answer[0, len(prompt_ids) :].tolist()


def load_opponent(trainer: SPINTrainer, tiny_model: str, opponent: int, lora: bool):
    path = str(trainer.store.path(opponent, "opponent"))
    if not lora:
        return AutoModelForCausalLM.from_pretrained(path).eval()
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), path).eval()


@pytest.mark.parametrize("policy", ["full", "full-object", "lora"])
def test_each_prompt_is_answered_by_the_opponent_drawn(tiny_model, tokenizer, build_trainer, policy):
    """Greedily, so that what each opponent says is known: answered here by the saved ones, one prompt at a time."""
    trainer = build_trainer(
        model=changed_model(tiny_model) if policy == "full-object" else tiny_model,
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA) if policy == "lora" else None,
        num_iterations=3,
        num_opponents=2,
        temperature=0.0,
        learning_rate=5e-2 if policy == "lora" else 3e-3,
        per_device_generation_batch_size=1,
    )
    opponents = BeforeFirstSteps(trainer, of_six_pairs)
    trainer.train()
    rows, end = trainer.store.read_data(), tokenizer.eos_token_id
    models = [load_opponent(trainer, tiny_model, opponent, policy == "lora") for opponent in range(3)]
    num_differing = 0
    for iteration in (1, 2):
        draw = OpponentDraw(iteration, 2, trainer.args.seed)
        completions = all_completions(trainer.store, iteration).to_pylist()
        assert [completion["row"] for completion in completions] == list(range(48))
        assert {completion["opponent"] for completion in completions} == {iteration - 1, iteration}
        for completion in completions[::3]:
            opponent, prompt_ids = draw.of_row(completion["row"]), rows[completion["row"]]["prompt_ids"]
            assert completion["opponent"] == opponent
            said = {k: greedy_answer(models[k], prompt_ids, 12, end) for k in draw.opponents}
            assert completion["completion_ids"] == said[opponent], (iteration, completion["row"])
            num_differing += said[iteration] != said[iteration - 1]
    assert num_differing > 6
    # The reference, and the policy that goes on, is the newest.
    pairs = trainer.store.read_pairs(1).select(range(6))
    stored = [pair[f"ref_{side}_logps"] for pair in pairs for side in ("chosen", "rejected")]
    assert stored == pytest.approx(opponents.found[1], abs=1e-4)
    assert_pairs_name_their_opponents(trainer.args, iteration=2)


def assert_pairs_name_their_opponents(config: SPINConfig, iteration: int) -> None:
    """Those of history too, each by the draw of the iteration that it is of; the user's own have none."""
    pairs = load_pairs(config.output_dir, iteration).select_columns(["iteration", "row", "opponent"])
    for pair in pairs:
        draw = OpponentDraw(pair["iteration"], config.num_opponents, config.seed)
        assert pair["opponent"] == (draw.of_row(pair["row"]) if pair["iteration"] >= 0 else None)
    assert len(set(pairs["opponent"][:]) - {None}) > 1


@pytest.mark.parametrize("kind", ["full", "lora", "lora to 4 bits"])
def test_policy_is_an_earlier_opponent_for_a_while_and_itself_again_bit_for_bit(build_trainer, tmp_path, kind):
    """In the precision it is trained in, which DPOTrainer makes bfloat16 where the base model has 4 bits."""
    own = {} if kind == "full" else {"peft_config": LoraConfig(**LORA)}
    if kind == "lora to 4 bits":
        own["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    trainer = build_trainer(**own)

    def seen() -> list[tuple]:
        return [(p.dtype, p.requires_grad, p.data_ptr(), p.tolist()) for p in trainer.model.parameters()]

    trainer.policy.save(str(tmp_path / "earlier"))
    earlier = seen()
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data.add_(torch.randn_like(parameter))
    own = seen()
    assert own != earlier
    assert {p.dtype for p in trained} == {torch.bfloat16 if kind == "lora to 4 bits" else torch.float32}
    with trainer.policy.lent_to(tmp_path / "earlier"):
        assert seen() == earlier
    assert seen() == own
    with pytest.raises(ZeroDivisionError), trainer.policy.lent_to(tmp_path / "earlier"):
        raise ZeroDivisionError
    assert seen() == own
    trainer.policy.load(tmp_path / "earlier")  # for good
    assert seen() == earlier


# A server plays them


class Names(FakeVLLM):
    """Notes which iteration's opponent each completion is of: an adapter's by its name, weights by their path."""

    def __init__(self, model: str):
        super().__init__(model, context_length=64)
        self.played: list[tuple[tuple[int, ...], int]] = []
        self.loaded_at: list[set[str]] = []

    def answer(self, path, body):
        if path == "/v1/completions" and body["model"] in (self.name, *self.loaded):
            played = body["model"] if body["model"] != self.name else self.weights
            number = 0 if played == self.name else int(re.findall(r"iteration-(\d+)", played)[-1])
            self.played.append((tuple(body["prompt"]), number))
            self.loaded_at.append(set(self.loaded))
        return super().answer(path, body)


@pytest.fixture
def play_on(faulty, tiny_model, play_run, eval_dataset):
    """Plays a run on a fake server, with a row's own prompt for each row."""

    def run(lora: bool, fake: Names | None = None, num_iterations: int = 3) -> tuple[SPINTrainer, Names]:
        faulty.answer = fake or Names(tiny_model)
        trainer = play_run(
            24,
            eval_dataset=eval_dataset.select(range(4)),
            peft_config=LoraConfig(**LORA) if lora else None,
            vllm_server_base_url=faulty.url,
            num_iterations=num_iterations,
            num_opponents=2,
            publish_check_tolerance=None,
            num_history_iterations=0,
        )
        return trainer, faulty.answer

    return run


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_server_plays_for_each_prompt_the_opponent_drawn_and_the_newest_for_the_evaluation(play_on, faulty, lora):
    trainer, fake = play_on(lora)
    prompts = [tuple(prompt_ids) for prompt_ids in trainer.store.read_data()["prompt_ids"]]
    evaluated = [tuple(prompt_ids) for prompt_ids in trainer.game.plan.data.eval["prompt_ids"]]
    assert not set(prompts) & set(evaluated) and len(set(prompts)) == 24
    played = iter(fake.played)
    for iteration in range(4):
        assert sorted(islice(played, 4)) == sorted((prompt, iteration) for prompt in evaluated)
        if iteration < 3:
            draw = OpponentDraw(iteration, 2, trainer.args.seed)
            answered = list(islice(played, 24))
            assert sorted(answered) == sorted((prompt, draw.of_row(row)) for row, prompt in enumerate(prompts))
            turns = [number for number, _ in groupby(answered, lambda one: one[1])]
            # Adapters answer at once, but never with the base model, whose prompts vLLM's CPU engine has them answer.
            assert (len(turns) > len(set(turns))) is (lora and iteration == 2)
    assert next(played, None) is None
    if lora:  # each is loaded once, and unloaded when it takes part no more
        numbers = [sorted({int(name.rpartition("-")[2]) for name in loaded}) for loaded in fake.loaded_at]
        assert [found for found, _ in groupby(numbers)] == [[], [1], [1, 2], [3]]
        names = [body["lora_name"] for body in faulty.bodies("/v1/load_lora_adapter")]
        assert len([name for name in names if "-iteration-" in name]) == 3
        assert fake.loaded == []  # nothing is left behind
    else:  # the newest and the one before in iterations 1 and 2, and the final policy
        assert fake.num_reloads == 1 + 2 + 2 + 1


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_restarted_server_gets_all_opponents_again(play_on, tiny_model, lora):
    class Restarting(Names):
        def answer(self, path, body):
            answer = super().answer(path, body)
            if path == "/v1/completions" and len(self.played) in (4 + 24 + 4 + 9, 4 + 24 + 4 + 20):
                self.restart()
            return answer

    trainer, fake = play_on(lora, Restarting(tiny_model), num_iterations=2)
    draw = OpponentDraw(1, 2, trainer.args.seed)
    prompts = {tuple(prompt_ids): row for row, prompt_ids in enumerate(trainer.store.read_data()["prompt_ids"])}
    completions = all_completions(trainer.store, 1).to_pylist()
    assert [completion["row"] for completion in completions] == list(range(24))
    last = {prompts[prompt]: number for prompt, number in fake.played if prompt in prompts}
    assert last == {row: draw.of_row(row) for row in range(24)}


# What is written


def test_pairs_that_rewards_choose_name_it_and_the_users_own_pairs_have_none(play_run):
    def shorter(completions: list[str], **kwargs) -> list[float]:
        return [-float(len(text)) for text in completions]

    preferences = Dataset.from_dict({"prompt": ["abc", "abd"], "chosen": ["AH0", "B"], "rejected": ["B", "AH0"]})
    fields = {"num_iterations": 2, "num_opponents": 2, "num_generations": 2, "pairing": "best_of"}
    data = {"reward_funcs": shorter, "preference_dataset": preferences}
    args = play_run(peft_config=LoraConfig(**LORA), **data, **fields).args
    assert_pairs_name_their_opponents(args, iteration=1)
    assert load_pairs(args.output_dir, 1)["opponent"][:].count(None) == 2


def test_with_one_opponent_nothing_is_named(play_run):
    store = play_run(num_iterations=1, peft_config=LoraConfig(**LORA)).store
    assert "opponent" not in store.read_pairs(0).column_names
    assert "opponent" not in all_completions(store, 0).column_names
    assert not store.path(0, "opponent").exists()


# Going on


def test_run_killed_while_an_earlier_opponent_answers_ends_as_the_undisturbed_one(tiny_model, tmp_path):
    """In iteration 1, whose prompts iteration 1's opponent answers first and iteration 0's then."""
    fields = {"use_vllm": False, "num_opponents": 2}
    expected, output_dir = tmp_path / "undisturbed", tmp_path / "run"
    assert start(tiny_model, expected, fields) == 0
    places = json.loads((expected / PLACES).read_text())
    last = max(count for count, place in enumerate(places) if place == "generations")
    kill_at = last - 4  # a part or two before the last is whole
    assert start(tiny_model, output_dir, fields, kill_at) == -signal.SIGKILL
    parts = {path.name for path in (output_dir / "iteration-1" / "generations").glob("part-*.parquet")}
    assert parts and not (output_dir / "iteration-1" / "pairs").exists()
    assert start(tiny_model, output_dir, fields) == 0
    assert parts <= {path.name for path in (output_dir / "iteration-1" / "generations").glob("part-*.parquet")}
    assert_ends_the_same(output_dir, expected)


def test_earlier_opponent_that_is_gone_is_named(build_trainer):
    fields = {"num_iterations": 3, "num_opponents": 2, "save_strategy": "epoch", "resume": "auto"}
    stopped = train_until_stopped(build_trainer(peft_config=LoraConfig(**LORA), callbacks=[AtStep(7)], **fields))
    shutil.rmtree(stopped.store.path(1, "pairs"))
    shutil.rmtree(stopped.store.path(0, "opponent"))
    with pytest.raises(RunDirectoryError, match=r"iteration-0/opponent is not there.*`num_opponents` \(2\).*Put it"):
        build_trainer(peft_config=LoraConfig(**LORA), **fields).train()


# A real server


def test_two_adapters_that_are_asked_in_turns_answer_as_each_does_alone(
    lora_server, tiny_model, tokenizer, connect, tmp_path
):
    """The server has room for one adapter in a batch, as vLLM's default is; the other one's prompts wait."""
    first, second = (make_opponent(tiny_model, tmp_path / str(seed), "lora", seed) for seed in range(2))
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in read_rows("accent_train.jsonl", 32)]
    params = SamplingParams(12, (tokenizer.eos_token_id,), temperature=0.0)
    options = {"model": tiny_model, "run_name": f"turns-{os.getpid()}", "min_context_length": 2}
    sampler = connect(lora_server.base_url, api_key=lora_server.api_key, **options)

    def ask(*published, opponent_of=lambda i: None) -> dict[int, list[int]]:
        sampler.publish(*published)
        sampler.select(*published)
        requests = [CompletionRequest((i, 0), ids, seed=i, opponent=opponent_of(i)) for i, ids in enumerate(prompts)]
        return {completion.key[0]: completion.token_ids for completion in sampler.sample(requests, params)}

    alone = [ask(1, first), ask(2, second)]
    assert sum(alone[0][i] != alone[1][i] for i in range(32)) > 16
    mixed = ask(2, second, {1: first}, opponent_of=lambda i: 1 + i % 2)
    assert mixed == {i: alone[i % 2][i] for i in range(32)}
