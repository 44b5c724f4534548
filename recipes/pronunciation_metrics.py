"""
Word accuracy and phone error rate of generated pronunciations, the measures of the grapheme-to-phoneme literature.

It works on text and knows nothing of models or tokenizers.
"""


def edit_distance(reference: list[str], generation: list[str]) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions that turn one list into the other."""
    distances = list(range(len(generation) + 1))  # from the reference's first 0 phones to each start of the generation
    for row, reference_phone in enumerate(reference, start=1):
        diagonal, distances[0] = distances[0], row
        for column, generated_phone in enumerate(generation, start=1):
            substituted = diagonal + (reference_phone != generated_phone)
            diagonal = distances[column]
            distances[column] = min(substituted, diagonal + 1, distances[column - 1] + 1)
    return distances[-1]


def compute_generation_metrics(prompts: list[str], references: list[str], generations: list[str]) -> dict[str, float]:
    """
    Compares generated pronunciations with the true ones. The three lists go together row by row.

    Args:
        prompts (`list[str]`):
            The words. Both measures look at the pronunciations alone; the argument is there for measures that do not.
        references (`list[str]`):
            The true phones of each word, separated by spaces.
        generations (`list[str]`):
            The generated phones of each word, separated by spaces.

    Returns:
        `dict[str, float]`:
            `word_accuracy`, the share (0 to 1) of words whose every phone is right, and `phone_error_rate`, the sum of
            the edit distances over the sum of the references' lengths (0 is perfect, above 1 is possible).

    Raises:
        `ValueError`: if the lists are empty or differ in length.
    """
    if not len(prompts) == len(references) == len(generations) > 0:
        raise ValueError(
            f"Found {len(prompts)} `prompts`, {len(references)} `references` and {len(generations)} `generations`, "
            "but expected as many of each, and at least one. Pass one reference and one generation for every prompt."
        )
    phones = [
        (reference.split(), generation.split()) for reference, generation in zip(references, generations, strict=True)
    ]
    num_errors = sum(edit_distance(reference, generation) for reference, generation in phones)
    return {
        "word_accuracy": sum(reference == generation for reference, generation in phones) / len(phones),
        "phone_error_rate": num_errors / sum(len(reference) for reference, _ in phones),
    }
