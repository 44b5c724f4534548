"""`Game`: the steps of an iteration of self-play. Knows nothing of training, of HTTP and of file names.

SPIN (arXiv 2401.01335), algorithm 1: the policy as it stands becomes the opponent, which answers every prompt. Ground
truth against answer are the pairs that the next policy is trained on, with the opponent as reference.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from datasets import Dataset
from transformers import TrainerState

from ..data.draw import OpponentDraw
from ..data.pair_dataset import PairDataset
from ..data.pair_metrics import generation_rates
from ..evaluation.collapse import CollapseGuard
from ..evaluation.endings import check_evaluation
from ..evaluation.held_out import HeldOutEvaluation
from ..generation.sampler import OpponentSampler, SamplingParams
from ..objectives.settings import needs_initial_answers
from ..objectives.third_side import INITIAL_IDS
from ..policy.offload import Offloader
from ..policy.policy import Policy
from ..processes.ranks import on_every_process, on_main_process
from ..run_directory.run import Run, RunStart
from ..run_directory.run_paths import RunDirectoryError
from ..run_directory.store import IterationStore
from .answers import GenerationJob
from .opponents import Opponents
from .pairing import Pairing
from .plan import Plan
from .publish_check import allow_for_quantization, check_published
from .records import Records
from .turns import Turns


_BATCHES_PER_PART = 4


@dataclass(repr=False, eq=False)
class Game:
    """
    Plays the policy against its own previous iterate. Every process calls the methods together.

    `log` hands an iteration's numbers to the loggers, `state` gives the trainer's.
    """

    plan: Plan
    policy: Policy
    sampler: OpponentSampler
    store: IterationStore
    run: Run
    log: Callable[[dict[str, float]], None]
    state: Callable[[], TrainerState]

    def __post_init__(self):
        plan, policy, store = self.plan, self.policy, self.store
        self.args = args = plan.args
        self.dataset = plan.data.train
        self.records = records = Records(store, self.log, lambda: self.state().log_history)
        offloader = Offloader(policy.training_tensors) if args.offload_policy_during_generation else None
        self.turns = turns = Turns(args.vllm_sleep, offloader)
        self.opponents = Opponents(args, policy, self.sampler, store, turns, plan.base_is_opponent, plan.model_name)
        self.evaluation = HeldOutEvaluation(policy, store, args, plan.tokenizer, plan.compute_generation_metrics)
        self.guard = CollapseGuard(args, store, records.log_history)
        self.pairing = Pairing(args, policy, store, records, plan.judge, self.state)

    def begin(self, start: RunStart) -> None:
        """
        Begin a run, or take it up again. What an earlier `train()` trained is no longer the base model.

        Raises:
            [`RunDirectoryError`]: if the run is to go on from the initial model, which that has trained since.
        """
        has_trained = self.run.iteration is not None
        if start.checkpoint is not None:
            self.opponents.base_is_opponent = self.plan.base_is_opponent
        elif start.is_resumed and has_trained:
            raise RunDirectoryError(
                f"The run in {self.store.output_dir} has no checkpoint to go on from, and this trainer's policy is no "
                "longer the initial model. Make a new trainer, and set `save_strategy` to keep checkpoints."
            )
        else:
            self.opponents.base_is_opponent = self.opponents.base_is_opponent and not has_trained
        self.store.run_id = start.place.run_id
        self.dataset = self.store.read_data()
        self.run.begin(start)
        self.records.begin(start)

    def play(self, iteration: int) -> PairDataset:
        """
        The pairs of an iteration, made by the policy as it stands, or read back where they are on disk.

        Raises:
            [`RunEnd`]: if there is nothing left to learn, or the policy collapses and the run is to end then.
        """
        if not self.store.has_pairs(iteration):
            self._make_pairs(iteration)
            self._record_costs(iteration)
        self.turns.give_to_policy()  # as it is by now, unless the pairs were there already
        pairs = self.store.read_pairs(iteration)
        needs_initial = needs_initial_answers(self.args.loss_type, vars(self.args))
        if iteration > 0 and needs_initial and INITIAL_IDS not in pairs.column_names:
            raise RunDirectoryError(
                f"{self.store.initial_answers.rows.path} is gone, but `loss_type` ({self.args.loss_type}) compares "
                "with the initial answers in it. Start the same command again: they are made again from iteration 0's."
            )
        return pairs

    def judge_final_policy(self, iteration: int) -> None:
        """
        The final policy is evaluated as the opponent of an iteration that is not played.

        Raises:
            [`Collapsed`]: as [`play`].
        """
        if self.plan.data.eval is not None:
            with self.records.phase("evaluate", iteration):
                self._publish(iteration)
                self._evaluate(iteration)
                self.turns.give_to_policy()
            self._record_costs(iteration)
        self.guard.look_at_training(iteration)

    def _make_pairs(self, iteration: int) -> None:
        with self.records.phase("publish", iteration):
            self._publish(iteration)
        if self.plan.data.eval is not None:
            with self.records.phase("evaluate", iteration):
                scores = self._evaluate(iteration)
            check_evaluation(iteration, scores, self.args)
        self.guard.look_at_training(iteration)
        with self.records.phase("generate", iteration):
            self._generate(iteration)
        with self.records.phase("score", iteration):
            self._pair_and_score(iteration)

    def _publish(self, iteration: int) -> None:
        self.opponents.publish(iteration)
        tolerance = self.args.publish_check_tolerance
        if tolerance is None or not self.sampler.reads_checkpoints:
            return
        if self.plan.is_quantized_on_its_own:
            first = self.store.read_metrics(0).get("publish_check_difference") if iteration > 0 else None
            tolerance = allow_for_quantization(tolerance, first)
        difference = check_published(self.opponents, iteration, self.dataset, self.plan.params, tolerance)
        self.records.record(iteration, {"publish_check_difference": difference})

    def _evaluate(self, iteration: int) -> dict[str, float]:
        dataset: Dataset = self.plan.data.eval
        greedy_or_not = replace(self.plan.params, temperature=self.args.eval_temperature)
        self._complete(iteration, "evaluation", dataset, greedy_or_not)
        self.turns.give_to_policy(briefly=True)
        scores = self.evaluation.scores(iteration, dataset)
        self.records.record_evaluation(iteration, scores)
        return scores

    def _generate(self, iteration: int) -> None:
        num_samples, draw = self.args.num_generations, self.opponents.draw(iteration)
        started = time.monotonic()
        rows = self._complete(iteration, "generations", self.dataset, self.plan.params, num_samples, draw)
        seconds = time.monotonic() - started
        parts = self.store.completions(iteration, "generations")
        self.records.record(iteration, on_main_process(lambda: generation_rates(parts.batches(), rows, seconds)))

    def _complete(
        self,
        iteration: int,
        kind: str,
        dataset: Dataset,
        params: SamplingParams,
        num_samples: int = 1,
        draw: OpponentDraw | None = None,
    ) -> np.ndarray:
        """Have the opponents answer what is not on disk yet, each process its share. Returns the rows of that."""
        args = self.args
        part_size = _BATCHES_PER_PART * args.per_device_generation_batch_size
        job = GenerationJob(self.store, iteration, kind, params, num_samples, part_size, args.seed, draw)
        missing_rows = on_main_process(lambda: job.missing_rows(dataset))
        self.turns.give_to_server()
        for opponent, rows in self.opponents.in_turn(draw, missing_rows):
            with self.opponents.playing(opponent, newest=iteration):
                on_every_process(partial(job.run, self.sampler, dataset, rows, args.process_index, args.world_size))
        return missing_rows

    def _pair_and_score(self, iteration: int) -> None:
        try:
            self.turns.give_to_policy()
            pairs = self.pairing.make(iteration, self.dataset)
            scores = self.pairing.score(iteration, pairs)
            self.guard.look_at_opponent(iteration)
            scores = self.pairing.mix_with_initial(iteration, pairs, scores, self.opponents.initial_path)
            on_main_process(lambda: self.store.write_pairs(iteration, pairs.answers, scores))
        finally:
            self.pairing.clean_up(iteration)

    def _record_costs(self, iteration: int) -> None:
        """What it cost and brought to have server and policy take turns."""
        if costs := on_main_process(self.turns.take_costs):
            self.records.record(iteration, costs)
