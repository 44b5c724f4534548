"""SPIN's theorems, held against the trainer's own loss on a policy that is a table of probabilities.

The table has five answers to one prompt. The data's and the opponent's distribution are multiples of 1/15 and 1/10.
So a batch that holds every pair (y, y') in proportion to p_data(y) * p_t(y') *is* the expectation: nothing is sampled.
"""

import itertools
import math

import pytest
import torch


DATA_COUNTS = (5, 4, 3, 2, 1)
OPPONENT_COUNTS = (1, 3, 2, 1, 3)
P_DATA = torch.tensor(DATA_COUNTS, dtype=torch.float64) / sum(DATA_COUNTS)
P_OPPONENT = torch.tensor(OPPONENT_COUNTS, dtype=torch.float64) / sum(OPPONENT_COUNTS)


def all_pairs(*counts) -> torch.Tensor:
    """Indices (N, 2) of y and y', or (N, 3) of these and y0, each as often as the product of its counts."""
    answers = itertools.product(*(range(len(side)) for side in counts))
    return torch.tensor(
        [sides for sides in answers for _ in range(math.prod(n[u] for n, u in zip(counts, sides, strict=True)))]
    )


def expected_loss(loss, logits, pairs, opponent, names, **parameters) -> torch.Tensor:
    """E over y and y', perhaps over y0 too, of the trainer's loss, for the policy softmax(logits)."""
    logps, ref_logps, sides = logits.log_softmax(0), opponent.log(), pairs.T
    return loss(names, tuple(logps[u] for u in sides), tuple(ref_logps[u] for u in sides[:2]), **parameters)


def best_reply(loss, names, pairs, opponent=P_OPPONENT, **parameters) -> torch.Tensor:
    """The policy that minimises the expected loss, from the opponent on, to convergence."""
    logits = opponent.log().clone().requires_grad_()
    settings = {"max_iter": 300, "tolerance_grad": 1e-10, "tolerance_change": 1e-15, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([logits], **settings)

    def closure():
        optimizer.zero_grad()
        value = expected_loss(loss, logits, pairs, opponent, names, **parameters)
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().softmax(0)


def tilted(power: float) -> torch.Tensor:
    """p_t * (p_data / p_t)^power, normalised."""
    weights = P_OPPONENT * (P_DATA / P_OPPONENT) ** power
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("name", "beta", "power"),
    [("sigmoid", 0.5, 2), ("sigmoid", 1, 1), ("sigmoid", 3, 1 / 3), ("exponential", 1, 0.5)],
)
def test_logistic_lands_on_theorem_5_4_and_exponential_half_as_far_in_log_space(loss, name, beta, power):
    """
    Write f(u) = beta * r(u). An unordered pair {a, b} enters the expectation twice, as (y, y') = (a, b) with weight
    w = p_data(a) p_t(b), and as (b, a) with weight v = p_data(b) p_t(a):

        w * log(1 + e^-(f(a) - f(b))) + v * log(1 + e^(f(a) - f(b))).

    In d = f(a) - f(b) that is a cross-entropy, least where sig(d) is the first weight's share of both, that is where
    d = log(w / v) = log(p_data(a) / p_t(a)) - log(p_data(b) / p_t(b)). These demands of all pairs agree with each
    other: f(u) = log(p_data(u) / p_t(u)) + c fulfils every one. With f = beta * log(p / p_t) this reads
    p ∝ p_t * (p_data / p_t)^(1 / beta), the theorem's p_{t+1}. A table can express it, so it is what training finds.

    Exponential, w e^-d + v e^d is least at d = log(w / v) / 2. So p ∝ p_t * (p_data / p_t)^(1 / (2 beta)).
    """
    reply = best_reply(loss, [name], all_pairs(DATA_COUNTS, OPPONENT_COUNTS), beta=beta)
    torch.testing.assert_close(reply, tilted(power), atol=1e-5, rtol=0)
    assert (reply - P_OPPONENT).abs().max() > 0.05


@pytest.mark.parametrize("mu", [1.0, 3.0])
def test_space_lands_on_the_data_in_one_iteration(loss, mu):
    """
    With s = e^{r(u)}, an answer u adds p_data(u) log(1 + mu / s) + mu p_t(u) log(1 + s / mu). Its derivative in log s,
    mu * (p_t(u) s - p_data(u)) / (mu + s), is zero at s = p_data(u) / p_t(u), that is p = p_data, whatever mu.
    """
    reply = best_reply(loss, ["space"], all_pairs(DATA_COUNTS, OPPONENT_COUNTS), space_mu=mu)
    torch.testing.assert_close(reply, P_DATA, atol=1e-5, rtol=0)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 2.0])
def test_iris_lands_on_the_data_in_one_iteration(loss, alpha):
    """
    With s = e^{r(u)}, the derivative of -1/(a-1) log E_y s^(a-1) + 1/a log E_y' s^a by log s(u) is
    -p_data(u) s^(a-1) / E_y s^(a-1) + p_t(u) s^a / E_y' s^a, zero at s = p_data / p_t, where the two expectations are
    both Z = sum p_data^a p_t^(1-a). The value there is (1/a - 1/(a-1)) log Z, a Renyi divergence with its sign changed.
    """
    pairs = all_pairs(DATA_COUNTS, OPPONENT_COUNTS)
    reply = best_reply(loss, ["iris"], pairs, iris_alpha=alpha)
    torch.testing.assert_close(reply, P_DATA, atol=1e-5, rtol=0)
    value = expected_loss(loss, P_DATA.log(), pairs, P_OPPONENT, ["iris"], iris_alpha=alpha).item()
    log_z = (P_DATA**alpha * P_OPPONENT ** (1 - alpha)).sum().log().item()
    assert value == pytest.approx(-log_z / (alpha * (alpha - 1)), rel=1e-6) and value < 0


@pytest.mark.parametrize("name", ["space", "iris"])
def test_answers_of_an_older_opponent_drive_the_policy_from_the_data_again(loss, name):
    """Why they have no history by default. The opponent is the data's distribution, half the answers are another's."""
    mixed = torch.tensor([2 * data + 3 * older for data, older in zip(DATA_COUNTS, OPPONENT_COUNTS, strict=True)])
    pairs = all_pairs(DATA_COUNTS, mixed.tolist())
    reply = best_reply(loss, [name], pairs, opponent=P_DATA)
    assert (reply - P_DATA).abs().sum() / 2 > 0.05


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_t_spins_first_iteration_lands_on_the_ratio_of_data_and_opponent(loss, alpha):
    """
    Theorem 5.4's proof without a reference: f(u) = a * log p(u) is log(p_data(u) / p_t(u)) + c at the minimum, so
    p ∝ (p_data / p_t)^(1/a). That is no step towards p_data, unless p_t is flat: the reference did that.
    """
    reply = best_reply(loss, ["t_spin"], all_pairs(DATA_COUNTS, OPPONENT_COUNTS), t_spin_alpha=alpha)
    expected = (P_DATA / P_OPPONENT) ** (1 / alpha)
    torch.testing.assert_close(reply, expected / expected.sum(), atol=1e-5, rtol=0)


def test_t_spins_later_iterations_weigh_both_comparisons(loss):
    """
    Of two answers, with d = a * (log p(A) - log p(B)), log(1 + e^-d) has the weight
    w = p_data(A) p_t(B) + b p_t(A) p_0(B), and log(1 + e^d) the same v with A and B exchanged: d = log(w / v).
    """
    data, opponent, initial, alpha, beta = (3, 1), (2, 2), (1, 4), 0.5, 0.3
    p_data, p_t, p_0 = (torch.tensor(counts) / sum(counts) for counts in (data, opponent, initial))
    w = p_data[0] * p_t[1] + beta * p_t[0] * p_0[1]
    v = p_data[1] * p_t[0] + beta * p_t[1] * p_0[0]
    fields = {"t_spin_alpha": alpha, "t_spin_beta": beta}
    reply = best_reply(loss, ["t_spin"], all_pairs(data, opponent, initial), opponent=p_t.double(), **fields)
    assert (reply[0] / reply[1]).item() == pytest.approx((w / v).item() ** (1 / alpha), rel=1e-4)


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "exponential", "correlation", "space", "iris"])
def test_opponent_that_equals_the_data_is_a_fixed_point(loss, name):
    """Theorem 5.2. Every pair (a, b) then weighs as much as (b, a), and their gradients cancel at p = p_t."""
    logits = P_DATA.log().clone().requires_grad_()
    pairs = all_pairs(DATA_COUNTS, DATA_COUNTS)
    expected_loss(loss, logits, pairs, P_DATA, [name], beta=0.7, space_mu=2.0).backward()
    assert logits.grad.abs().max() < 1e-12
    if name != "correlation":  # which is flat there: nothing to converge to
        reply = best_reply(loss, [name], pairs, opponent=P_DATA, beta=0.7, space_mu=2.0)
        torch.testing.assert_close(reply, P_DATA, atol=1e-9, rtol=0)
