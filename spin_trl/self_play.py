"""`SelfPlayCallback`: the outer loop. Publish the opponent, check, evaluate, generate, pair, score, swap the dataset.

Knows nothing of URLs, file names or tensor maths: they are the sampler's, the store's and `scoring`'s.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState

from .data.columns import numbers
from .data.draw import OpponentDraw
from .data.pair_dataset import PairDataset
from .data.pair_metrics import describe_generations, describe_scores, generation_rates
from .data.pairs import (
    add_history,
    add_preferences,
    answer_schema,
    describe_pairs,
    drop_identical_pairs,
    find_identical_pairs,
    make_answers,
    preference_share,
)
from .data.rewards.judged_answers import AnswerRewards
from .evaluation.collapse_guard import CollapseGuard
from .evaluation.endings import check_evaluation, check_identical_share
from .evaluation.held_out import HeldOutEvaluation
from .evaluation.metric_names import EVALUATION, label
from .evaluation.run_end import RunEnd
from .evaluation.score_table import GenerationMetrics, ScoreTable
from .generation.sampler import CompletionRequest, OpponentSampler, SamplingParams
from .objectives.reference_mixture import mix_scores
from .objectives.settings import keeps_identical_pairs, needs_initial_answers
from .objectives.third_side import INITIAL_IDS
from .play.answers import GenerationJob, Share
from .play.opponents import Opponents
from .play.pairing import Ranking
from .play.publish_check import allow_for_quantization, compare_logps
from .policy.finite import require_finite_scores
from .policy.log_probs import completion_logps, initial_policy_as_reference, score_pairs
from .processes.progress import begin_phase
from .processes.random_state import preserved_random_state
from .processes.ranks import on_every_process, on_main_process
from .report.completion_table import log_completions
from .report.logs import IterationLog
from .run_directory.resume import RunStart
from .run_directory.run_paths import RunDirectoryError
from .run_directory.store import IterationStore
from .spin_config import SPINConfig


if TYPE_CHECKING:
    from .spin_trainer import SPINTrainer


class SelfPlayCallback(TrainerCallback):
    """
    A callback that plays the policy against its own previous iterate.

    Before the first epoch of every iteration it turns the policy as it stands into the opponent, has the opponent
    answer all prompts, and hands the trainer the pairs to train on. At the end of the run the final policy is
    evaluated as one more opponent, if there is an evaluation dataset.

    Args:
        trainer ([`SPINTrainer`]): Holds the policy.
        sampler ([`OpponentSampler`]): Answers prompts as the opponent.
        store ([`IterationStore`]): The run directory.
        dataset ([`~datasets.Dataset`]): With the columns `row`, `source_row`, `prompt_ids` and `chosen_ids`.
        params ([`SamplingParams`]): How the opponent answers.
        eval_dataset ([`~datasets.Dataset`], *optional*): As `dataset`, with `prompt`.
        compute_generation_metrics (`Callable`, *optional*): The user's metrics.
        rewards ([`AnswerRewards`], *optional*): Judges every iteration's ground truths and generations.
        base_is_opponent (`bool`): Whether the first opponent is the base model as the sampler already has it.
        base_model (`str`): Hub id or folder of the base model.
        is_quantized_on_its_own (`bool`): Whether the sampler's base weights are not quantized, as the policy's are.
    """

    def __init__(
        self,
        trainer: "SPINTrainer",
        sampler: OpponentSampler,
        store: IterationStore,
        dataset: Dataset,
        params: SamplingParams,
        eval_dataset: Dataset | None = None,
        compute_generation_metrics: GenerationMetrics | None = None,
        rewards: AnswerRewards | None = None,
        base_is_opponent: bool = True,
        base_model: str = "",
        is_quantized_on_its_own: bool = False,
    ):
        self.trainer = trainer
        self.store = store
        self.dataset = dataset
        self.params = params
        self.eval_dataset = eval_dataset
        self.ranking = None if rewards is None else Ranking(trainer, store, rewards)
        self.log = IterationLog(trainer, store)
        self.guard = CollapseGuard(trainer, store)
        self.evaluation = HeldOutEvaluation(trainer, store, compute_generation_metrics)
        self.opponents = Opponents(trainer, sampler, store, base_is_opponent, base_model)
        self.is_quantized_on_its_own = is_quantized_on_its_own
        self.started_as_base = base_is_opponent
        self.start = RunStart("")
        self.iteration: int | None = None
        self.end: RunEnd | None = None
        self._training_since: float | None = None

    def on_epoch_begin(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        iteration = int(state.epoch + 1e-6) // args.epochs_per_iteration
        if iteration != self.iteration:
            try:
                self.play(iteration)
            except RunEnd as end:
                self._end_early(end)
                control.should_training_stop = True

    def on_step_end(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if self.trainer.is_iteration_done:
            self._end_training()

    def on_save(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if self._training_since is not None:  # a run that goes on from here has these seconds behind it
            self._record_training_seconds()

    def on_train_end(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if self.trainer.stop_signal.has_stopped:
            return
        self._end_training()
        iteration = self.start.next_iteration if self.iteration is None else self.iteration + 1
        if not self.start.is_finished:
            if self.end is None:
                self._judge_last(iteration)
            self._log_recorded(iteration)

    @property
    def sampler(self) -> OpponentSampler:
        """What answers as the opponents."""
        return self.opponents.sampler

    @property
    def base_is_opponent(self) -> bool:
        """Whether the first opponent is the base model as the sampler already has it."""
        return self.opponents.base_is_opponent

    def begin_run(self, start: RunStart) -> None:
        """
        Forget an earlier `train()` on the same trainer. What it trained is no longer the base model.

        Raises:
            [`RunDirectoryError`]: if the run is to go on from the initial model, which that has trained since.
        """
        has_trained = self.iteration is not None
        if start.checkpoint is not None:
            self.opponents.base_is_opponent = self.started_as_base
        elif start.is_resumed and has_trained:
            raise RunDirectoryError(
                f"The run in {self.store.output_dir} has no checkpoint to go on from, and this trainer's policy is no "
                "longer the initial model. Make a new trainer, and set `save_strategy` to keep checkpoints."
            )
        else:
            self.opponents.base_is_opponent = self.base_is_opponent and not has_trained
        self.start = start
        self.dataset = self.store.read_data()
        self.iteration = self._training_since = self.end = None
        self._show_earlier_scores()

    def play(self, iteration: int) -> None:
        """Make the pairs of `iteration`, or read them back where they are already on disk, and train on them next."""
        with self.trainer.stop_signal.between_steps(), preserved_random_state():
            if not self.store.has_pairs(iteration):
                self._make_pairs(iteration)
                self._record_costs(iteration)
            self.trainer.turns.give_to_policy()  # as it is by now, unless the pairs were there already
            self.iteration = iteration
            self._log_recorded(iteration)
            self.trainer.begin_iteration(iteration, self._read_pairs(iteration))
            begin_phase("train", iteration)
        self._training_since = time.monotonic()

    def _read_pairs(self, iteration: int) -> PairDataset:
        pairs = self.store.read_pairs(iteration)
        args = self.trainer.args
        needs_initial = needs_initial_answers(args.loss_type, vars(args))
        if iteration > 0 and needs_initial and INITIAL_IDS not in pairs.column_names:
            raise RunDirectoryError(
                f"{self.store.initial_answers.path} is gone, but `loss_type` ({args.loss_type}) compares with the "
                "initial answers in it. Start the same command again: they are made again from iteration 0's."
            )
        return pairs

    def _make_pairs(self, iteration: int) -> None:
        with self._phase("publish", iteration):
            self._publish(iteration)
        if self.eval_dataset is not None:
            with self._phase("evaluate", iteration):
                scores = self._evaluate(iteration)
            check_evaluation(iteration, scores, self.trainer.args)
        self.guard.look_at_training(iteration)
        with self._phase("generate", iteration):
            self._generate(iteration)
        if self.trainer.args.log_completions:
            on_main_process(lambda: self._log_completions(iteration))
        with self._phase("score", iteration):
            self._pair_and_score(iteration)

    def _log_completions(self, iteration: int) -> None:
        args, tokenizer, step = self.trainer.args, self.trainer.processing_class, self.trainer.state.global_step
        log_completions(self.store, self.dataset, tokenizer, iteration, step, args.report_to, args.seed)

    def _judge_last(self, iteration: int) -> None:
        """The final policy is the opponent of an iteration that is not played."""
        if self.eval_dataset is not None:
            with self.trainer.stop_signal.between_steps(), self._phase("evaluate", iteration):
                self._publish(iteration)
                self._evaluate(iteration)
                self.trainer.turns.give_to_policy()
            self._record_costs(iteration)
        try:
            self.guard.look_at_training(iteration)
        except RunEnd as end:
            self._end_early(end)

    # Phases

    def _publish(self, iteration: int) -> None:
        self.opponents.publish(iteration)
        if self.sampler.reads_checkpoints and self.trainer.args.publish_check_samples > 0:
            self._check(iteration)

    def _check(self, iteration: int) -> None:
        """Compare the server's log-probs of a few sampled completions with the policy's own."""
        prompts = self.dataset.select(range(min(len(self.dataset), self.trainer.args.publish_check_samples)))
        requests = [
            CompletionRequest((row["row"], 0), row["prompt_ids"], seed=self.trainer.args.seed + row["row"])
            for row in prompts
        ]
        # Log-probs are of the opponent itself, so it must be sampled as it is.
        params = replace(self.params, temperature=1.0, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0, extra={})
        if self.trainer.args.max_length is not None:  # what is scored must not be truncated
            room = self.trainer.args.max_length - max(len(request.prompt_ids) for request in requests)
            params = replace(params, max_completion_length=min(params.max_completion_length, room))

        sampled = on_main_process(lambda: self.sampler.sample_each(requests, params, logprobs=True))
        self.trainer.turns.give_to_policy(briefly=True)
        prompt_ids = {request.key: request.prompt_ids for request in requests}
        opponent = "the base model" if iteration == 0 and self.base_is_opponent else f"iteration {iteration}'s opponent"
        tolerance = self.trainer.args.publish_check_tolerance
        if self.is_quantized_on_its_own:
            first = self.store.read_metrics(0).get("publish_check_difference") if iteration > 0 else None
            tolerance = allow_for_quantization(tolerance, first)
        differences = []
        for address, completions in sampled.items():
            rows = [{"prompt_ids": prompt_ids[c.key], "completion_ids": c.token_ids} for c in completions]
            check = compare_logps(completions, completion_logps(self.trainer, rows))
            check.require(tolerance, opponent, address)
            differences.append(check.mean_difference)
        self.log.record(iteration, {"publish_check_difference": max(differences)})

    def _evaluate(self, iteration: int) -> dict[str, float]:
        greedy_or_not = replace(self.params, temperature=self.trainer.args.eval_temperature)
        self._complete(iteration, "evaluation", self.eval_dataset, greedy_or_not, num_samples=1)
        self.trainer.turns.give_to_policy(briefly=True)
        scores = self.evaluation.scores(iteration, self.eval_dataset)
        self.log.record(iteration, {EVALUATION: scores})
        on_main_process(lambda: self.table.add(label(iteration), scores))
        self.log.log(iteration, {f"eval_{name}": value for name, value in scores.items()})
        return scores

    def _generate(self, iteration: int) -> None:
        started = time.monotonic()
        num_samples, draw = self.trainer.args.num_generations, self.opponents.draw(iteration)
        rows = self._complete(iteration, "generations", self.dataset, self.params, num_samples, draw)
        seconds = time.monotonic() - started

        def measure() -> dict[str, float]:
            return generation_rates(self.store.completions(iteration, "generations").batches(), rows, seconds)

        self.log.record(iteration, on_main_process(measure))

    def _complete(
        self,
        iteration: int,
        kind: str,
        dataset: Dataset,
        params: SamplingParams,
        num_samples: int,
        draw: OpponentDraw | None = None,
    ) -> np.ndarray:
        """Returns the rows that were not on disk yet."""
        args = self.trainer.args
        part_size = args.generation_part_size
        job = GenerationJob(self.store, iteration, kind, params, num_samples, part_size, args.seed, draw)
        share = Share(args.process_index, args.world_size)
        missing_rows = on_main_process(lambda: job.missing_rows(dataset))
        self.trainer.turns.give_to_server()
        for opponent, rows in self.opponents.in_turn(draw, missing_rows):
            with self.opponents.playing(opponent, newest=iteration):
                on_every_process(partial(job.run, self.sampler, dataset, share, rows))
        return missing_rows

    def _pair_and_score(self, iteration: int) -> None:
        try:
            on_main_process(lambda: self._write_answers(iteration))
            args = self.trainer.args
            if iteration == 0 and needs_initial_answers(args.loss_type, vars(args)):
                on_main_process(self.store.initial_answers.keep)
            answers = PairDataset.join(self.dataset, self.store.read_answers(iteration))
            pairs = self._select_pairs(iteration, answers)
            scores = score_pairs(self.trainer, pairs, self._reference(iteration))
            require_finite_scores(pairs, scores, iteration)
            self._describe_scores(iteration, pairs, scores)
            self.guard.look_at_opponent(iteration)
            scores = self._mixed_with_initial(iteration, pairs, scores)
            on_main_process(lambda: self.store.write_pairs(iteration, pairs.answers, scores))
        finally:
            if self.trainer.is_world_process_zero():
                self.store.remove_answers(iteration)

    def _describe_scores(self, iteration: int, pairs: PairDataset, scores: dict[str, np.ndarray]) -> None:
        args = self.trainer.args
        num_own = int((numbers(pairs.answers, "iteration") == iteration).sum())
        num_dropped = on_main_process(lambda: self.store.read_metrics(iteration)["num_pairs"]) - num_own
        if args.pairing == "reward_ranked":
            num_dropped = 0  # they were not of a ground truth and a generation
        opinion = describe_scores(pairs, scores, iteration, num_dropped, args.max_length, args.truncation_mode)
        self.log.record(iteration, {"num_training_pairs": len(pairs), **opinion, **preference_share(pairs)})

    def _write_answers(self, iteration: int) -> None:
        parts = self.store.completions(iteration, "generations")
        if self.ranking is not None:
            self.ranking.write_answers(iteration, self.dataset, parts)
            return
        answers = make_answers(self.dataset, parts.batches(), iteration)
        num_bytes = 2 * parts.num_bytes()  # they are compressed
        schema = answer_schema(has_opponents=self.trainer.args.num_opponents > 1)
        self.store.write_answers(iteration, answers, schema, num_bytes)

    def _select_pairs(self, iteration: int, pairs: PairDataset) -> PairDataset:
        """Describe the pairs, leave out what cannot be learned from, and add what older opponents made."""
        args = self.trainer.args
        self.trainer.turns.give_to_policy()
        is_identical = find_identical_pairs(pairs)
        parts = self.store.completions(iteration, "generations")
        description = describe_pairs(pairs, is_identical, parts.cut_off_share(), args.max_length)
        self.log.record(iteration, description | describe_generations(pairs, parts.batches(), args.seed))
        check_identical_share(iteration, description["identical_share"], args)
        if args.pairing != "ground_truth":
            pairs = self.ranking.choose(iteration, pairs)
            is_identical = find_identical_pairs(pairs)
        if not keeps_identical_pairs(args.identical_pairs, args.loss_type):
            pairs = drop_identical_pairs(pairs, is_identical)
        first = max(0, iteration - args.num_history_iterations)
        pairs = add_history(pairs, [(i, self.store.read_pairs(i)) for i in range(first, iteration)])
        return add_preferences(pairs, self.store.read_preferences())

    def _reference(self, iteration: int) -> AbstractContextManager[nn.Module] | None:
        if iteration == 0 or self.trainer.args.opponent_reference == "previous":
            return None
        return initial_policy_as_reference(self.trainer, self.opponents.initial_path)

    def _mixed_with_initial(
        self, iteration: int, pairs: PairDataset, scores: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """The opponent's log-probs mixed with the initial policy's, which in iteration 0 is the opponent."""
        alpha = self.trainer.args.reference_mixture_alpha
        if iteration == 0 or alpha == 0:
            return scores
        initial = score_pairs(
            self.trainer, pairs, initial_policy_as_reference(self.trainer, self.opponents.initial_path)
        )
        require_finite_scores(pairs, initial, iteration)
        return mix_scores(scores, initial, alpha)

    # Records

    @contextmanager
    def _phase(self, name: str, iteration: int) -> Iterator[None]:
        begin_phase(name, iteration)
        started = time.monotonic()
        yield
        name = f"seconds_{name}"
        earlier = self.store.read_metrics(iteration).get(name, 0.0)  # of a run that was stopped in this phase, or later
        self.log.record(iteration, {name: earlier + time.monotonic() - started})

    def _record_costs(self, iteration: int) -> None:
        """What it cost and brought to have server and policy take turns."""
        if costs := on_main_process(self.trainer.turns.take_costs):
            self.log.record(iteration, costs)

    def _show_earlier_scores(self) -> None:
        """The rows of the table that a resumed run does not compute again."""
        self.table = ScoreTable(tqdm.write)  # beside a progress bar a plain print would tear it
        if self.start.is_resumed and self.trainer.is_world_process_zero():
            for iteration, metrics in self.store.all_metrics():
                if "evaluation" in metrics and (self.store.has_pairs(iteration) or self.start.is_finished):
                    self.table.add(label(iteration), metrics["evaluation"])

    def _log_recorded(self, iteration: int) -> None:
        """Log what is on disk and has not been logged: of this iteration, and of earlier ones where a run stopped."""
        for earlier in range(iteration):
            self.log.log_recorded(earlier)
        self.log.log_recorded(iteration, without=("self_play/seconds_train",))  # there may be those of an earlier start

    def _end_early(self, end: RunEnd) -> None:
        """There is nothing left to train on: the policy, which is this opponent, is what training has come to."""
        self.end = end
        self._log_recorded(end.iteration)
        self.trainer.accelerator.print(str(end))

    def _end_training(self) -> None:
        """The last step of an iteration, or of the run, has been taken."""
        if self._training_since is not None:
            self._record_training_seconds()
            self._training_since = None
            self.log.log_recorded(self.iteration)

    def _record_training_seconds(self) -> None:
        earlier = self.store.read_metrics(self.iteration).get("seconds_train", 0.0)
        now = time.monotonic()
        self.log.record(self.iteration, {"seconds_train": earlier + now - self._training_since})
        self._training_since = now
