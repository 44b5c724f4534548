"""Which pairs rewards make, by hand, and what is told about them."""

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, List, Value

from spin_trl.data.pair_dataset import TRUTH, PairDataset
from spin_trl.data.pair_metrics import describe_scores
from spin_trl.data.pairs import ANSWER_SCHEMA, NoPairsError, drop_identical_pairs, find_identical_pairs
from spin_trl.data.rewards.judged_answers import REWARD_COLUMNS, describe_rewards
from spin_trl.data.rewards.ranked_pairs import rank_answers, ranked_pairs


def data(num_rows: int) -> Dataset:
    """Rows are numbered from 5 on, and every token tells its row."""
    rows = list(range(5, 5 + num_rows))
    columns = {"row": rows, "prompt_ids": [[row] for row in rows], "chosen_ids": [[100 + row, 2] for row in rows]}
    ids = List(Value("int32"))
    return Dataset.from_dict(columns, Features({"row": Value("int64"), "prompt_ids": ids, "chosen_ids": ids}))


def answers(*prompts: tuple[float | None, list[float | None]], iteration: int = 0) -> PairDataset:
    """For each prompt the reward of its ground truth, and those of its generations, whose tokens tell which it is."""
    keys = [(row, sample) for row, (_, rewards) in enumerate(prompts, start=5) for sample in range(len(rewards))]
    table = pa.table(
        {
            "iteration": [iteration] * len(keys),
            "row": [row for row, _ in keys],
            "source_row": [1000 + row for row, _ in keys],
            "sample": [sample for _, sample in keys],
            "rejected_ids": [[200 + row, sample, 2] for row, sample in keys],
            "chosen_reward": [truth for truth, rewards in prompts for _ in rewards],
            "rejected_reward": [reward for _, rewards in prompts for reward in rewards],
        },
        schema=pa.schema([*ANSWER_SCHEMA, *((name, pa.float64()) for name in REWARD_COLUMNS)]),
    )
    return PairDataset.join(data(len(prompts)), Dataset(table))


def rank(pairing: str, *prompts: tuple[float, list[float]], iteration: int = 0) -> PairDataset:
    answered = answers(*prompts, iteration=iteration)
    made = pa.concat_tables(ranked_pairs(answered, rank_answers(answered, pairing)))
    return PairDataset.join(data(len(prompts)), Dataset(made))


def sides(pairs: PairDataset) -> list[tuple]:
    """Row, chosen and rejected sample, and their rewards, after a look at the tokens."""

    def ids(row: int, sample: int) -> list[int]:
        return [100 + row, 2] if sample == TRUTH else [200 + row, sample, 2]

    found = []
    for pair in pairs:
        assert pair["prompt_ids"] == [pair["row"]] and pair["source_row"] == 1000 + pair["row"]
        assert pair["chosen_ids"] == ids(pair["row"], pair["chosen_sample"])
        assert pair["rejected_ids"] == ids(pair["row"], pair["sample"])
        names = ("row", "chosen_sample", "sample", "chosen_reward", "rejected_reward")
        found.append(tuple(pair[name] for name in names))
    return found


def described(*prompts: tuple[float | None, list[float | None]]) -> list[float | None]:
    found = describe_rewards(answers(*prompts).answers)
    names = "truth_reward generation_reward beaten_truths_share tied_truths_share unjudged_share"
    return [found.get(name) for name in names.split()]


def test_ground_truth_that_no_generation_beats_is_chosen_over_every_lower_one():
    """That of the second prompt equals its ground truth, so neither is to be unlearned."""
    pairs = rank("best_of", (1.0, [0.0, 1.0, 0.5]), (0.5, [0.5]))
    assert sides(pairs) == [(5, TRUTH, 0, 1.0, 0.0), (5, TRUTH, 2, 1.0, 0.5)]


def test_best_generation_is_chosen_over_the_ground_truth_and_all_lower_ones():
    """The third equals the winner, the first of the two best: neither is better."""
    assert sides(rank("best_of", (0.2, [0.1, 0.9, 0.9, 0.5]))) == [
        (5, 1, 0, 0.9, 0.1),
        (5, 1, TRUTH, 0.9, 0.2),
        (5, 1, 3, 0.9, 0.5),
    ]


def test_best_generation_is_ranked_over_the_worst_without_the_ground_truth():
    pairs = rank("reward_ranked", (9.0, [0.5, 0.0, 1.0, 0.0]), (0.0, [1.0, 1.0]), (-1.0, [2.0, 3.0]))
    assert sides(pairs) == [(5, 2, 1, 1.0, 0.0), (7, 1, 0, 3.0, 2.0)]


def test_pairs_of_many_batches_keep_their_tokens_and_rewards():
    """Of 1,500 prompts every other's first generation beats the truth and the second generation."""
    expected = []
    for row in range(5, 1505):
        if row % 2:
            expected += [(row, 0, TRUTH, 1.0, 0.5), (row, 0, 1, 1.0, 0.25)]
        else:
            expected += [(row, TRUTH, 0, 0.5, 0.0), (row, TRUTH, 1, 0.5, 0.25)]
    assert sides(rank("best_of", *((0.5, [float(row % 2), 0.25]) for row in range(5, 1505)))) == expected


SUM, SAME_SUM = 0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1


def test_rewards_that_only_rounding_makes_differ_are_equal():
    """By their size: 100 is nothing beside 1e9."""
    assert SUM > SAME_SUM
    assert rank_answers(answers((SAME_SUM, [SUM]), (SUM, [SAME_SUM])), "best_of").no_pair_share == 1
    assert rank_answers(answers((0.0, [SUM, SAME_SUM])), "reward_ranked").no_pair_share == 1
    assert sides(rank("best_of", (0.0, [SAME_SUM, SUM]))) == [(5, 0, TRUTH, SAME_SUM, 0.0)]  # the first of two equals
    assert described((SAME_SUM, [SUM]))[3] == 1  # tied
    assert rank_answers(answers((1e9, [1e9 + 100])), "best_of").no_pair_share == 1
    assert rank_answers(answers((1e9, [1e9 + 10_000])), "best_of").no_pair_share == 0


def test_what_nobody_judges_makes_no_pair():
    """A generation without a reward takes no part; a ground truth without one leaves out its prompt."""
    prompts = (1.0, [None, 0.0]), (None, [0.0, 1.0]), (0.5, [None, None]), (0.0, [None, 1.0])
    assert sides(rank("best_of", *prompts)) == [(5, TRUTH, 1, 1.0, 0.0), (8, 1, TRUTH, 1.0, 0.0)]
    pairs = rank("reward_ranked", *prompts, (0.0, [None, 3.0, 2.0]))
    assert sides(pairs) == [(6, 1, 0, 1.0, 0.0), (9, 1, 2, 3.0, 2.0)]
    assert described(*prompts) == [1.5 / 3, 2.0 / 4, 1 / 4, 0, 5 / 12]
    assert described((None, [None])) == [None, None, 0, 0, 1]


def test_log_probs_of_ground_truths_are_found_on_either_side():
    """
    Truths of two tokens, generations of three. Pair 0: the truth is chosen (-4; -3). Pair 1: generation over
    generation. Pair 2: the truth is rejected (-6; -12). Gaps -4/2 + 3/3 = -1 and -12/2 + 6/3 = -4.
    """
    pairs = rank("best_of", (1.0, [0.0]), (0.0, [0.5, 1.0]))
    assert [pair[1:3] for pair in sides(pairs)] == [(TRUTH, 0), (1, 0), (1, TRUTH)]
    scores = {"ref_chosen_logps": np.float32([-4, -99, -6]), "ref_rejected_logps": np.float32([-3, -99, -12])}
    opinion = describe_scores(pairs, scores, 0, 0, None, "keep_start")
    assert opinion == pytest.approx({"logps_gap": -2.5, "opponent_nll": 16 / 4})
    of_generations = rank("reward_ranked", (1.0, [0.0, 1.0]))
    scores = {name: logps[:1] for name, logps in scores.items()}
    assert describe_scores(of_generations, scores, 0, 0, None, "keep_start") == {}


def test_identical_sides_of_different_rewards_are_refused_with_what_that_means():
    pairs = rank("best_of", (0.0, [1.0]))
    same = Dataset.from_dict({**pairs.answers[:], "rejected_ids": pairs.answers["chosen_ids"][:]})
    pairs = PairDataset(pairs.truths, same)
    with pytest.raises(NoPairsError, match="all 1 pairs .* are the same.*although their rewards differ"):
        drop_identical_pairs(pairs, find_identical_pairs(pairs))
