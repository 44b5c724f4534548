"""The signs of collapse, on recorded curves, and on numbers that lie just inside and outside the limits."""

import pytest

from spin_trl.evaluation.collapse import sign_within, signs_between


def curves(text: str) -> list[list[tuple[float, float]]]:
    """Curves between blank lines, their points between commas."""
    return [[tuple(map(float, point.split())) for point in curve.split(",")] for curve in text.split("\n\n")]


# (rewards/chosen, rewards/rejected), each the mean over four steps, by iteration. Recorded with beta 0.1 on
# recipes/pronunciation.yaml, 2026-11-22: first with learning rate 2e-4, which loses half of the words that the model
# said right, then with the recipe's own 3e-5.
COLLAPSING = curves(
    """
    0.015 0.001, 0.152 -0.008, 0.283 -0.066, 0.27 -0.304, 0.131 -0.484, 0.086 -0.6, 0.011 -0.754, -0.02 -0.848,
    -0.018 -0.902, -0.011 -1.009, -0.045 -0.831, 0.065 -1.122, -0.025 -1.013, 0.008 -1.033, -0.157 -0.973,
    -0.02 -1.151

    0.021 -0.002, 0.215 -0.08, 0.273 -0.438, 0.255 -0.913, 0.171 -1.353, -0.005 -1.643, -0.276 -1.762, -0.021 -1.77,
    -0.039 -2.085, 0.002 -2.06, -0.132 -1.87, -0.068 -2.105, -0.075 -1.878, -0.02 -2.122, 0.02 -2.209, -0.009 -2.29
    """
)
HEALTHY = curves(
    """
    0.002 0, 0.03 -0, 0.066 -0, 0.095 -0.007, 0.128 -0.003, 0.145 -0.01, 0.184 -0.013, 0.193 -0.013, 0.213 -0.029,
    0.241 -0.045, 0.202 -0.022, 0.343 -0.047, 0.27 -0.059, 0.286 -0.05, 0.213 -0.057, 0.344 -0.042

    0.001 -0, 0.007 -0.001, 0.029 -0.002, 0.048 -0.01, 0.052 -0.016, 0.059 -0.032, 0.092 -0.033, 0.065 -0.032,
    0.09 -0.091, 0.1 -0.054, 0.116 -0.07, 0.108 -0.095, 0.096 -0.107, 0.098 -0.084, 0.101 -0.111, 0.07 -0.063

    0 -0, 0.003 -0.001, 0.007 -0.001, 0.009 -0.002, 0.009 -0.003, 0.011 -0.004, 0.011 -0.009, 0.028 -0.013,
    0.031 -0.036, 0.047 -0.023, 0.03 -0.025, 0.033 -0.027, 0.044 -0.041, 0.03 -0.025, 0.022 -0.025, 0.037 -0.032

    0 -0, 0.003 0, 0.007 0.003, 0.002 -0.002, 0.007 -0.007, 0.007 -0.021, -0 -0.01, 0.015 -0.033, 0.014 -0.022,
    0.021 -0.037, 0.016 -0.028, 0.027 -0.04, 0.013 -0.038, 0.022 -0.056, 0.014 -0.038, -0.01 -0.041
    """
)
MEAN_LENGTH = 7.105  # tokens of the ground truths there


def steps(curve: list[tuple[float, float]]) -> list[dict[str, float]]:
    return [
        {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
        for chosen, rejected in curve
    ]


def coarser(curve: list[tuple[float, float]], factor: int) -> list[tuple[float, float]]:
    """As logged with more steps between."""
    groups = [curve[start : start + factor] for start in range(0, len(curve), factor)]
    return [tuple(sum(side) / len(group) for side in zip(*group, strict=True)) for group in groups]


@pytest.mark.parametrize("factor", [1, 4, 5])
@pytest.mark.parametrize("curve", COLLAPSING)
def test_a_recorded_collapse_is_seen_in_its_first_iterations_however_often_it_is_logged(curve, factor):
    sign = sign_within(steps(coarser(curve, factor)), beta=0.1, mean_length=MEAN_LENGTH)
    assert sign.name == "displacement"
    assert "learning_rate" in str(sign) and "sft" in str(sign) and "space" in str(sign)


@pytest.mark.parametrize("factor", [1, 4, 5, 16])
@pytest.mark.parametrize("curve", HEALTHY)
def test_no_iteration_of_the_demo_looks_like_a_collapse(curve, factor):
    assert sign_within(steps(coarser(curve, factor)), beta=0.1, mean_length=MEAN_LENGTH) is None


def test_fall_is_measured_in_nats_a_token_from_the_best_point():
    """Rewards 0.2 -> -0.4 with beta 0.1 are a fall of 6 nats; over 20 tokens 0.3 nats each."""
    curve = [(0.1, -0.1), (0.2, -0.3), (-0.1, -1.0), (-0.4, -2.0)]
    assert "lost 0.30 nats a token" in str(sign_within(steps(curve), beta=0.1, mean_length=20))
    assert "from 0.5 to 1.6" in str(sign_within(steps(curve), beta=0.1, mean_length=20))
    assert sign_within(steps(curve), beta=0.1, mean_length=60.1) is None  # just under 0.1
    assert sign_within(steps(curve), beta=0.1, mean_length=59.9) is not None
    from_the_first_step = sign_within(steps([(-0.5, -0.9)]), beta=0.1, mean_length=10)
    assert "lost 0.50 nats a token" in str(from_the_first_step)
    assert sign_within([{"loss": 0.5}], beta=0.1, mean_length=5) is None  # no rewards


@pytest.mark.parametrize(
    "curve",
    [
        pytest.param([(0.5, 0.1), (-0.5, 0.3)], id="the generated side rises"),
        pytest.param([(0.5, -0.5), (-0.5, -0.7)], id="margins shrink"),
        pytest.param([(0.1, -0.5), (0.5, -3.0)], id="ground truths rise"),
    ],
)
def test_anything_but_both_sides_sinking_with_growing_margins_is_no_displacement(curve):
    assert sign_within(steps(curve), beta=0.1, mean_length=5) is None


FIRST = {"logps_gap": -0.8, "opponent_nll": 1.0, "rejected_length": 8.0, "distinct_2": 0.4}


@pytest.mark.parametrize(
    ("name", "changed", "words"),
    [
        ("negative_gap", {"logps_gap": -0.91}, "from -0.80 to -0.91"),
        ("unlikely_truths", {"opponent_nll": 1.06}, "from 1.000 to 1.060"),
        ("length", {"rejected_length": 3.9}, "3.9 tokens"),
        ("length", {"rejected_length": 16.1}, "16.1 tokens"),
        ("variety", {"distinct_2": 0.19}, "0.190, 0.400 in iteration 0"),
    ],
)
def test_each_sign_between_iterations_fires_alone_and_says_its_numbers(name, changed, words):
    (sign,) = signs_between(FIRST, FIRST, FIRST | changed)
    assert sign.name == name
    assert words in str(sign)


@pytest.mark.parametrize(
    "now",
    [
        {"logps_gap": -0.89, "opponent_nll": 1.04, "rejected_length": 4.1, "distinct_2": 0.21},
        {"logps_gap": 0.3, "opponent_nll": 0.5, "rejected_length": 15.9, "distinct_2": 0.9},
        {},
    ],
    ids=["worse", "better", "not measured"],
)
def test_nothing_fires_within_the_limits(now):
    assert signs_between(FIRST, FIRST, now) == []
    assert signs_between({}, {"logps_gap": 0.9}, {"logps_gap": 0.1}) == []  # which sinks, but stays positive


def test_length_and_variety_are_compared_with_iteration_0_not_with_the_one_before():
    previous = FIRST | {"rejected_length": 5.0, "distinct_2": 0.25}
    (length, variety) = signs_between(FIRST, previous, FIRST | {"rejected_length": 3.0, "distinct_2": 0.15})
    assert (length.name, variety.name) == ("length", "variety")
