"""Every number that a run logs beside DPOTrainer's own: its meaning, and what a healthy run shows.

The table in docs/metrics.md is made from here. Knows nothing of how the numbers come about.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any


ITERATION = "self_play/iteration"
EVALUATION = "evaluation"  # key of an opponent's evaluation in an iteration's metrics.json


@dataclass(frozen=True)
class MetricName:
    """
    Args:
        meaning (`str`): What it is.
        healthy (`str`): What a healthy run shows.
        greater_is_better (`bool`, *optional*): Of an evaluation metric, which way is better.
        only_with (`str`, *optional*): What a run has to have for it to be logged.
    """

    meaning: str
    healthy: str
    greater_is_better: bool | None = None
    only_with: str | None = None


METRIC_NAMES: dict[str, MetricName] = {
    ITERATION: MetricName(
        "Iteration that the entry is of. An `eval_` entry is of this iteration's opponent, that is of the policy after "
        "the iteration before.",
        "Counts from 0.",
    ),
    # the opponent's answers
    "self_play/num_pairs": MetricName(
        "Pairs that the opponent's answers make.", "Prompts times `num_generations`; fewer where rewards choose."
    ),
    "self_play/num_training_pairs": MetricName(
        "Pairs that are trained on: identical ones left out, those of earlier iterations joined.",
        "Not far below `num_pairs` in iteration 0; with history more than it later.",
    ),
    "self_play/chosen_length": MetricName("Mean length of the ground truths, in tokens.", "The same every iteration."),
    "self_play/rejected_length": MetricName(
        "Mean length of the opponent's answers, in tokens.",
        "Nears `chosen_length`. Running away from it, in either direction, is a sign of collapse.",
    ),
    "self_play/chosen_truncated_share": MetricName(
        "Share of ground truths that `max_length` cuts in training.", "Near 0; else raise `max_length`."
    ),
    "self_play/rejected_truncated_share": MetricName(
        "Share of answers that `max_length` cuts in training.", "Near 0; else raise `max_length`."
    ),
    "self_play/cut_off_share": MetricName(
        "Share of answers that ran into `max_completion_length`.",
        "About the share of ground truths that are longer (0.01 by default), or falling to it.",
    ),
    "self_play/identical_share": MetricName(
        "Share of pairs whose sides are equal, token by token.",
        "Rises slowly. Near 1 there is nothing left to learn.",
    ),
    "self_play/empty_share": MetricName(
        "Share of answers that say nothing: an end token alone, or no token.", "0. Rising means collapse."
    ),
    "self_play/distinct_1": MetricName(
        "Different tokens over all tokens of the answers to 2,000 prompts, the same ones in every iteration.",
        "Near `chosen_distinct_1`. Falling below it: the opponent repeats itself.",
    ),
    "self_play/distinct_2": MetricName("The same of pairs of neighbouring tokens.", "Near `chosen_distinct_2`."),
    "self_play/chosen_distinct_1": MetricName("`distinct_1` of the ground truths.", "The same every iteration."),
    "self_play/chosen_distinct_2": MetricName("`distinct_2` of the ground truths.", "The same every iteration."),
    # the opponent's log-probs
    "self_play/logps_gap": MetricName(
        "How much likelier the opponent finds the ground truth than its own answer: the mean over pairs of "
        "`log p(y)/|y| - log p(y')/|y'|`, in nats per token.",
        "Rises towards 0 or above it. If it falls, see [below](#the-gap).",
    ),
    "self_play/opponent_nll": MetricName(
        "The opponent's negative log-likelihood of the training set's ground truths, of the pairs that it has scored, "
        "in nats per token.",
        "Falls. Rising: the ground truths' log-probs sink (likelihood displacement).",
    ),
    "self_play/publish_check_difference": MetricName(
        "Mean absolute difference between the server's log-probs of sampled tokens and the policy's, in nats.",
        "Below 1e-5 in float32, about 0.01 in bfloat16, and the same in every iteration.",
    ),
    "self_play/num_collapse_signs": MetricName(
        "Signs that the iteration before made the policy worse; `metrics.json` has them in words.", "0."
    ),
    # the rewards
    "self_play/truth_reward": MetricName(
        "Mean reward of the ground truths.",
        "The same every iteration.",
        only_with="reward_funcs",
    ),
    "self_play/generation_reward": MetricName(
        "Mean reward of the opponent's answers.",
        "Rises.",
        only_with="reward_funcs",
    ),
    "self_play/beaten_truths_share": MetricName(
        "Share of prompts whose best answer has a strictly higher reward than the ground truth.",
        "Rises. High from the start: the ground truths are no good target, see `pairing`.",
        only_with="reward_funcs",
    ),
    "self_play/tied_truths_share": MetricName(
        "Share of prompts whose best answer has the reward of the ground truth.",
        "Any. Near 1 with a rule that gives 0 or 1: the opponent solves the task.",
        only_with="reward_funcs",
    ),
    "self_play/unjudged_share": MetricName(
        "Share of ground truths and answers that no function has a reward for. Where rewards choose they make no pair.",
        "0.",
        only_with="reward_funcs",
    ),
    "self_play/no_pair_share": MetricName(
        "Share of prompts that make no pair. Only with a `pairing` other than `ground_truth`.",
        "Not near 1. With `reward_ranked` else raise `num_generations` or `temperature`; with `best_of` it nears 1 as "
        "the opponent comes up to the ground truths (`stop_when_converged`).",
        only_with="reward_funcs",
    ),
    "self_play/rewards/<function>/truths": MetricName(
        "Mean of one function's rewards of the ground truths, where there are several.",
        "The same every iteration.",
        only_with="reward_funcs",
    ),
    "self_play/rewards/<function>/generations": MetricName(
        "The same of the opponent's answers.",
        "Rises.",
        only_with="reward_funcs",
    ),
    "self_play/rewards/<name>": MetricName(
        "Mean of what a function passed to `log_metric(name, value)`.",
        "Yours.",
        only_with="reward_funcs",
    ),
    "self_play/seconds_rewards": MetricName(
        "Of `seconds_score`, those that the reward functions took.",
        "Far below `seconds_generate`.",
        only_with="reward_funcs",
    ),
    "self_play/preference_share": MetricName(
        "Share of the training pairs that come from `preference_dataset`.",
        "As you mean it: every pair has the same weight, so leave rows out or repeat them to change it.",
        only_with="preference_dataset",
    ),
    # speed
    "self_play/completions_per_second": MetricName(
        "Completions generated per second, by all processes.", "Steady; it falls as answers grow longer."
    ),
    "self_play/tokens_per_second": MetricName("Tokens generated per second, by all processes.", "Steady."),
    "self_play/seconds_publish": MetricName("Seconds for saving, loading and checking the opponent.", "Steady."),
    "self_play/seconds_evaluate": MetricName("Seconds for evaluating the opponent.", "Steady."),
    "self_play/seconds_generate": MetricName(
        "Seconds for answering all prompts, repeated attempts included.", "Steady."
    ),
    "self_play/seconds_score": MetricName(
        "Seconds for making the pairs and for the opponent's log-probs.", "With history about twice iteration 0's."
    ),
    "self_play/seconds_train": MetricName(
        "Seconds from the iteration's first step to its last, checkpoints included.",
        "With history about twice iteration 0's.",
    ),
    # the evaluation
    "eval_nll": MetricName(
        "Negative log-likelihood of the held-out ground truths under this iteration's opponent, in nats per token.",
        "Falls. Rising while `rewards/margins` grow is likelihood displacement.",
        greater_is_better=False,
    ),
    "eval_rewards/chosen": MetricName(
        "Mean over the held-out prompts of `beta * (log p(y) - log p_t(y))`: the policy after an iteration against the "
        "opponent `p_t` that it was trained against, with that iteration's `beta`.",
        "Above 0: the held-out ground truths have become likelier.",
        greater_is_better=True,
    ),
    "eval_rewards/rejected": MetricName(
        "The same of the answer that `p_t` gave to the prompt.", "Below 0.", greater_is_better=False
    ),
    "eval_rewards/accuracies": MetricName(
        "Share of held-out prompts whose ground truth has the larger reward. A tie, such as an answer that equals the "
        "ground truth, counts half.",
        "Well above 0.5 after the first iterations, then back towards 0.5 as the opponent becomes as good as the data.",
        greater_is_better=True,
    ),
    "eval_rewards/margins": MetricName(
        "Mean of the chosen reward minus the rejected one.", "Above 0, smaller each iteration.", greater_is_better=True
    ),
}


def label(opponent: int) -> str:
    """What an evaluation is called: the opponent of an iteration is what the iteration before it made."""
    return "start" if opponent == 0 else f"iteration {opponent - 1}"


def evaluation_names() -> list[str]:
    """Names of the evaluation metrics that every run has, without `eval_`."""
    return [name.removeprefix("eval_") for name in METRIC_NAMES if name.startswith("eval_")]


def logged_values(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What of an iteration's `metrics.json` is logged, under the names that it is logged by."""
    logged = {f"self_play/{name}": value for name, value in metrics.items() if isinstance(value, Real)}
    return logged | {f"eval_{name}": value for name, value in metrics.get(EVALUATION, {}).items()}


def to_markdown() -> str:
    """The table of docs/metrics.md."""
    rows = [f"| `{name}` | {metric.meaning} | {metric.healthy} |" for name, metric in METRIC_NAMES.items()]
    return "\n".join(["| metric | meaning | in a healthy run |", "| --- | --- | --- |", *rows]) + "\n"
