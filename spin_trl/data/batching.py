"""Which pairs are computed together, and in which order. Knows lengths and seeds, nothing of models and processes.

Every process makes the same lists, and each takes its part of them.
"""

import numpy as np


# Pairs are sorted within so many batches, or a quarter of all if that is less, as transformers' sampler does.
_BATCHES_SORTED_TOGETHER = 50


def epoch_order(
    num_pairs: int,
    batch_size: int,
    generator: np.random.Generator | None,
    lengths: np.ndarray | None = None,
    drop_last: bool = False,
) -> np.ndarray:
    """
    The order in which an epoch takes the pairs, as whole batches, so that it does not depend on how a batch is divided
    into micro-batches and over processes. The last one is filled with pairs from the beginning, as accelerate does.

    Args:
        batch_size (`int`): Pairs of one optimizer step, over all processes.
        generator (`np.random.Generator`, *optional*): Shuffles the pairs. `None` leaves them in their own order.
        lengths (`np.ndarray` of shape `(num_pairs,)`, *optional*): Where given, with a generator, each batch holds
            pairs of similar length, and the batches come in random order.
        drop_last (`bool`): Whether an incomplete last batch is left out, unless it is the only one.

    Returns:
        `np.ndarray` of positions, a multiple of `batch_size`.
    """
    order = np.arange(num_pairs) if generator is None else generator.permutation(num_pairs)
    num_whole = num_pairs // batch_size * batch_size
    if generator is not None and lengths is not None:
        num_batches = max(1, min(num_pairs // (4 * batch_size), _BATCHES_SORTED_TOGETHER))
        parts = np.split(order, range(num_batches * batch_size, num_pairs, num_batches * batch_size))
        order = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])
        order[:num_whole] = generator.permutation(order[:num_whole].reshape(-1, batch_size)).ravel()
    if num_pairs == num_whole or (drop_last and num_whole > 0):
        return order[:num_whole]
    return np.resize(order, num_whole + batch_size)  # repeated from the beginning where it is too short


def scoring_batches(
    lengths: np.ndarray, max_tokens: int | None = None, max_pairs: int | None = None
) -> list[np.ndarray]:
    """
    Batches of neighbours in length, which waste little padding. The longest come first: what does not fit into memory
    shows at once.

    Args:
        lengths (`np.ndarray` of shape `(num_pairs,)`): Tokens of each pair's longer sequence.
        max_tokens (`int`, *optional*): Tokens of a batch, both sides and their padding included. A pair that has more
            by itself is a batch.
        max_pairs (`int`, *optional*): Pairs of a batch.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, first = [], 0
    while first < len(order):
        size = max_pairs or len(order)
        if max_tokens is not None:
            size = min(size, max(1, max_tokens // (2 * max(1, int(lengths[order[first]])))))
        batches.append(order[first : first + size])
        first += size
    return batches
