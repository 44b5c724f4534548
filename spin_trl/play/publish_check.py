"""Does the server play the opponent that was published to it? Compares log-probs; knows nothing of servers, models."""

from dataclasses import dataclass

from ..generation.sampler import Completion, SamplerError


_MOST_BY_QUANTIZATION = 0.5  # nats a token; another model differs by more
_HEADROOM = 1.5


@dataclass(frozen=True)
class PublishCheck:
    """
    Outcome of comparing the log-probs that a server gives for sampled tokens with the policy's own.

    Args:
        mean_difference (`float`): Mean absolute difference per token, in nats.
        num_tokens (`int`): Number of tokens compared.
        num_completions (`int`): Number of completions they come from.
    """

    mean_difference: float
    num_tokens: int
    num_completions: int

    def require(self, tolerance: float, opponent: str, address: str | None = None) -> None:
        """
        Args:
            tolerance (`float`): Largest difference that is borne with, in nats.
            opponent (`str`): What should be played, in words.
            address (`str`, *optional*): The server's.

        Raises:
            `SamplerError`: if the difference is larger than `tolerance`, or not a number.
        """
        if self.mean_difference <= tolerance:
            return
        server = "The server" if address is None else f"The server at {address}"
        raise SamplerError(
            f"{server} does not play {opponent}: over {self.num_tokens} tokens of {self.num_completions} sampled "
            f"completions its log-probs differ from the policy's by {self.mean_difference:.3g} nats a token on "
            f"average, more than `publish_check_tolerance` ({tolerance:g}). It may serve another model or an older "
            "opponent (restart it with `python -m spin_trl.serve`), or compute in another precision (`--dtype`; then "
            "raise the tolerance)."
        )


def compare_logps(completions: list[Completion], policy_logps: list[list[float]]) -> PublishCheck:
    """
    Compare sampled tokens' log-probs.

    Args:
        completions (`list[Completion]`): With `logprobs`, as the server gave them.
        policy_logps (`list[list[float]]`): For the same tokens, the policy's.
    """
    differences = [
        abs(server - policy)
        for completion, logps in zip(completions, policy_logps, strict=True)
        for server, policy in zip(completion.logprobs, logps, strict=True)
    ]
    mean = sum(differences) / len(differences)
    return PublishCheck(mean, len(differences), len(completions))


def allow_for_quantization(tolerance: float, first_difference: float | None) -> float:
    """
    The tolerance where the policy alone is quantized: what the run's first opponent, with which nothing is stale yet,
    differed by, and half as much again. A stale opponent differs by more than that.

    Args:
        tolerance (`float`): `publish_check_tolerance`, which is the least.
        first_difference (`float`, *optional*): Measured on the first opponent; `None` where that is measured now.
    """
    return max(tolerance, _MOST_BY_QUANTIZATION if first_difference is None else _HEADROOM * first_difference)
