"""What SPINConfig refuses, what it fills in, and that every field is documented."""

import inspect
import re
from dataclasses import MISSING, fields

import pytest
import torch
from transformers import HfArgumentParser
from trl import DPOConfig, TrlParser

from spin_trl import SPINConfig
from spin_trl.objectives.settings import sampling_caveats
from spin_trl.run_directory.description import changed_settings


URL = "http://localhost:8000"
OWN_FIELDS = {f.name: f for f in fields(SPINConfig) if f.name not in {field.name for field in fields(DPOConfig)}}


@pytest.fixture
def make(tmp_path):
    def make_config(**overrides) -> SPINConfig:
        return SPINConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **overrides)

    return make_config


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_history_iterations": 0},
        {"temperature": 0.0},
        {"top_k": 0},
        {"publish_check_tolerance": None},
        {"use_vllm": True},
        {"use_vllm": True, "vllm_server_base_url": URL},
        {"loss_type": ["space"], "space_mu": 0.5},
        {"loss_type": ["space"], "space_mu": 2.5, "num_generations": 3},
        {"loss_type": ["t_spin"], "t_spin_beta": 0.0},
        {"loss_type": ["t_spin", "sigmoid"], "reference_mixture_alpha": 1.0},
        {"loss_type": ["iris"], "iris_alpha": 2.0, "per_device_train_batch_size": 2},
    ],
    ids=str,
)
def test_smallest_allowed_values_and_settings_that_agree_are_accepted(make, overrides):
    config = make(**overrides)
    assert {name: getattr(config, name) for name in overrides} == overrides


def test_defaults_are_the_papers(make):
    """Those of our own fields are in the docstring, which another test holds against the fields."""
    config = make()
    assert (config.num_iterations, config.num_history_iterations, config.num_generations) == (3, 1, 1)
    assert (config.beta, config.learning_rate, config.loss_type) == (0.1, 5e-7, ["sigmoid"])
    assert config.precompute_ref_log_probs and config.reset_optimizer


@pytest.mark.parametrize(
    ("loss_type", "history", "sampling"),
    [
        (["sigmoid", "t_spin"], 1, "group_by_length"),
        (["space", "sft"], 0, "group_by_length"),
        ("iris", 0, "random"),
    ],
)
def test_history_and_batches_follow_from_the_losses_where_they_are_left_unset(make, loss_type, history, sampling):
    config = make(loss_type=loss_type)
    assert (config.num_history_iterations, config.train_sampling_strategy) == (history, sampling)
    assert not {"num_history_iterations", "train_sampling_strategy"} & set(changed_settings(config))
    config = make(loss_type=loss_type, num_history_iterations=2, train_sampling_strategy="sequential")
    assert (config.num_history_iterations, config.train_sampling_strategy) == (2, "sequential")
    assert {"num_history_iterations", "train_sampling_strategy"} <= set(changed_settings(config))


def test_answers_that_are_no_samples_of_the_reference_are_told_where_a_loss_needs_them(make):
    settings = {"temperature": 0.7, "top_k": 20, "num_history_iterations": 1}

    def caveats(**fields) -> list[str]:
        config = make(**fields)
        return sampling_caveats(config.loss_type, vars(config))

    assert caveats(**settings) == caveats(loss_type="space") == []
    told = caveats(loss_type=["space", "sft"], **settings)
    assert [text.partition("with ")[2].partition(" they")[0] for text in told] == [
        "`temperature=0.7`",
        "`top_k=20`",
        "`num_history_iterations=1`",
    ]


def test_whether_a_greater_metric_is_better_is_left_to_the_run_unless_it_is_set(make):
    assert make(metric_for_best_model="nll").greater_is_better is None
    assert make(metric_for_best_model="nll", greater_is_better=True).greater_is_better is True


def test_half_precision_is_left_unset_where_the_machine_lacks_it(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("This machine has a GPU, which has half precision.")
    assert SPINConfig(str(tmp_path)).bf16 is False and SPINConfig(str(tmp_path), use_cpu=True, bf16=True).bf16 is True


def test_number_of_epochs_follows_from_iterations(make):
    assert make().num_train_epochs == 3
    assert make(num_iterations=4, epochs_per_iteration=2).num_train_epochs == 8


def documented_parameters() -> dict[str, str | None]:
    """Name -> documented default (`None` where there is none) of the docstring's parameter list."""
    entry = re.compile(r"^ {4,8}(\w+) \(`.+?`, \*optional\*(?:, defaults to `(.+?)`)?\):$", re.MULTILINE)
    return {name: default or None for name, default in entry.findall(inspect.getdoc(SPINConfig))}


def test_every_new_field_is_documented_with_its_default():
    documented = documented_parameters()
    assert set(documented) == set(OWN_FIELDS)
    for name, field in OWN_FIELDS.items():
        assert field.default is not MISSING
        assert documented[name] == (None if field.default is None else repr(field.default)), name


def test_every_field_that_is_defined_anew_is_noted():
    anew = set(SPINConfig.__annotations__) - set(OWN_FIELDS)
    note = inspect.getdoc(SPINConfig).partition("> [!NOTE]")[2]
    of_other_meaning = {"precompute_ref_batch_size", "metric_for_best_model", "greater_is_better"}
    of_other_meaning |= {"load_best_model_at_end", "bf16"}
    assert anew | of_other_meaning == set(re.findall(r"^> - `(\w+)`:", note, re.MULTILINE))


def test_help_on_the_command_line_is_the_docstrings_text_and_dpo_configs_is_left_alone():
    shown = " ".join(HfArgumentParser(SPINConfig).format_help().split())
    for text in ("Number of self-play iterations. In each, the policy as it stands", "Also takes `exponential`"):
        assert text in shown
    assert "Pairs per device" not in DPOConfig.__dataclass_fields__["precompute_ref_batch_size"].metadata["help"]


@pytest.fixture
def parse(tmp_path):
    """What the command line makes of these arguments."""

    def parse_arguments(*arguments: str) -> SPINConfig:
        given = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", *arguments]
        (config,) = TrlParser(SPINConfig).parse_args_and_config(given)
        return config

    return parse_arguments


def test_fields_can_be_set_on_the_command_line(parse):
    arguments = ["--num_iterations", "2", "--use_vllm", "false", "--reset_optimizer", "false"]
    arguments += ["--max_completion_length", "7", "--generation_kwargs", '{"typical_p": 0.9}']
    arguments += ["--chat_template_kwargs", '{"enable_thinking": false}', "--prompt_column", "instruction+input"]
    arguments += ["--completion_column", "output", "--train_on_turns", "all", "--skip_invalid_rows", "true"]
    config = parse(*arguments)
    assert (config.num_iterations, config.num_train_epochs, config.max_completion_length) == (2, 2, 7)
    assert config.use_vllm is False and config.reset_optimizer is False
    assert config.generation_kwargs == {"typical_p": 0.9}
    assert config.chat_template_kwargs == {"enable_thinking": False}
    assert (config.prompt_column, config.completion_column) == ("instruction+input", "output")
    assert config.train_on_turns == "all" and config.skip_invalid_rows is True


def test_one_number_holds_for_every_iteration(make):
    config = make(learning_rate=1e-6, beta=0.2)
    assert (config.learning_rate, config.beta) == (1e-6, 0.2)
    assert [config.learning_rate_at(i) for i in range(3)] == [1e-6] * 3
    config.beta = 0.3  # set afterwards, as is common
    assert [config.beta_at(i) for i in range(3)] == [0.3] * 3


def test_one_number_for_each_iteration_leaves_trainer_the_first(make):
    config = make(learning_rate=[3e-6, 2e-6, 1e-6], beta=(1, 2, 5))
    assert (config.learning_rate, config.beta) == (3e-6, 1.0)
    assert [config.learning_rate_at(i) for i in range(3)] == [3e-6, 2e-6, 1e-6]
    assert [config.beta_at(i) for i in range(3)] == [1.0, 2.0, 5.0]


def test_written_configuration_shows_what_was_given(make):
    values = make(learning_rate=[3e-6, 2e-6, 1e-6], beta=0.2).to_dict()
    assert (values["learning_rate"], values["beta"]) == ([3e-6, 2e-6, 1e-6], 0.2)


def test_schedules_come_from_yaml_and_command_line(parse, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("num_iterations: 2\nlearning_rate: [5e-7, 1.0e-7]\nbeta: 0.4\nloss_type: [sigmoid, sft]\n")
    config = parse("--config", str(file))
    assert [config.learning_rate_at(i) for i in range(2)] == [5e-7, 1e-7]
    assert (config.beta, config.loss_type) == (0.4, ["sigmoid", "sft"])
    config = parse("--config", str(file), "--beta", "0.1", "5.0", "--learning_rate", "1e-6")
    assert [config.beta_at(i) for i in range(2)] == [0.1, 5.0]
    assert [config.learning_rate_at(i) for i in range(2)] == [1e-6, 1e-6]


@pytest.mark.parametrize(
    ("given", "addresses"),
    [(None, []), (URL, [URL]), ([URL], [URL]), ([URL, "http://other:8000"], [URL, "http://other:8000"])],
    ids=["none", "one", "a list of one", "two"],
)
def test_address_of_a_server_may_be_one_or_several(make, given, addresses):
    assert make(vllm_server_base_url=given).vllm_server_base_urls == addresses


@pytest.mark.parametrize("urls", [[URL], [URL, "http://other:8000"]], ids=["one", "two"])
def test_command_line_takes_one_address_or_several(parse, urls):
    assert parse("--vllm_server_base_url", *urls).vllm_server_base_urls == urls
