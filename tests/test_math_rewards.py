"""The rule of the GSM8K recipe, and how reward functions are named on the command line."""

from decimal import Decimal

import pytest
from conftest import RECIPES, load_recipe
from trl import ModelConfig, TrlParser

from spin_trl import SPINConfig


rule = load_recipe("math_rewards")
spin = load_recipe("spin")
LOCATION = f"{RECIPES}/math_rewards.py:last_number_matches"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 48 / 2 = 24 clips.\n#### 24", "24"),
        ("So it costs $1,234.50.", "1234.50"),
        ("The answer is **-7**.", "-7"),
        ("From 10-5 follows", "5"),
        ("12,34", "34"),
        ("about .5 l", "0.5"),
        ("3.14159 is near 1,000,000.25", "1000000.25"),
        ("no idea", None),
    ],
)
def test_last_number_of_a_text(text, number):
    assert rule.last_number(text) == (None if number is None else Decimal(number))


def test_rule_compares_numbers_and_not_how_they_are_written():
    completions = ["It is 1,000.", "1000.0 kg", "1000 or 999", "none"]
    assert rule.last_number_matches(completions, ground_truth=["#### 1000"] * 4, level=[1] * 4) == [1.0, 1.0, 0.0, 0.0]


def test_rule_reads_messages_and_does_not_apply_to_ground_truths_without_a_number():
    completions = [[{"role": "assistant", "content": "42"}]] * 2
    assert rule.last_number_matches(completions, ["so 42", "so many"]) == [1.0, None]


def parse(*arguments: str):
    parser = TrlParser((spin.SPINScriptArguments, SPINConfig, ModelConfig))
    recipe = str(RECIPES / "gsm8k-reward-ranked.yaml")
    return parser.parse_args_and_config(["--config", recipe, "--use_cpu", "true", "--bf16", "false", *arguments])


def test_recipe_names_the_rule_and_several_functions_can_be_named_on_the_command_line():
    script_args, args, _ = parse()
    assert script_args.reward_funcs == ["recipes/math_rewards.py:last_number_matches"]
    assert (args.pairing, args.num_generations) == ("reward_ranked", 8)
    script_args, args, _ = parse("--reward_funcs", LOCATION, LOCATION, "--reward_weights", "1.0", "0.5")
    assert script_args.reward_funcs == [LOCATION] * 2 and args.reward_weights == [1.0, 0.5]
    assert spin.load_function("reward_funcs", LOCATION)(["1"], ["1"]) == [1.0]


@pytest.mark.parametrize("shown", [lambda text: text, lambda text: [{"role": "assistant", "content": text}]])
def test_the_rewards_pages_example_judges_text_and_messages(shown):
    page = (RECIPES.parent / "docs" / "rewards.md").read_text()
    code = page.partition("```python\n")[2].partition("SPINTrainer(")[0]
    names = {}
    exec(code, names)
    truths = ["6 * 4 = 24\n#### 24", "#### 4"]
    answers = [shown("half of 48 is 24\n#### 24"), shown("so 14\n#### 14")]
    assert names["right_answer"](completions=answers, ground_truth=truths, prompts=["?", "?"]) == [1.0, 0.0]
