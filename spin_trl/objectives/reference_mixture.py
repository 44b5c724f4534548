"""alpha-SPIN's reference: a mixture of the opponent and the initial policy. Knows nothing of models and files.

The reference is `p_t^(1-a) * p_base^a / Z` (arXiv 2404.04291, published; no code was released), where `p_t` is the
opponent, `p_base` the initial policy and `Z` the normaliser, a sum over all answers to the prompt. Nobody can compute
`Z`. In `log p_ref(y) - log p_ref(y')` it cancels, since both sides answer one prompt: losses of that difference alone
are exact with `(1-a) * log p_t + a * log p_base` in place of `log p_ref`. A loss that judges a side by itself, or
divides each by its length, would see every log-ratio too large by `-log Z`, which is at least 0 (Hölder's inequality),
differs from prompt to prompt and grows as the two policies part. So those are refused, unless `a` is 0 or 1, where
`Z` is 1 (`is_of_difference` in the table of losses).
"""

from collections.abc import Mapping

import numpy as np


def mix_scores(
    opponent: Mapping[str, np.ndarray], initial: Mapping[str, np.ndarray], alpha: float
) -> dict[str, np.ndarray]:
    """
    The mixture's log-probs, but for the normaliser, of answers whose log-probs under both policies are given, in nats,
    under the same names. `alpha` is the share of the initial policy: at 1 they are exactly its own.
    """
    return {name: (1 - alpha) * logps + alpha * initial[name] for name, logps in opponent.items()}
