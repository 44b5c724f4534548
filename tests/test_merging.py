"""Merged weights compute what the adapter does, lie in files that anybody loads, and leave the policy alone."""

import copy
import re

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, PeftModel, PeftType, PromptLearningConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from spin_trl import SPINTrainer
from spin_trl.policy.adapters import starts_as_base
from spin_trl.policy.merging import check_can_be_merged, save_merged
from spin_trl.policy.published_form import UNMERGED_TYPES


IDS = torch.arange(18).reshape(2, 9)
TARGETS = {"target_modules": ["q_proj", "down_proj"]}
# What the configurations of some types need beside target modules.
SETTINGS = {
    "ADALORA": {**TARGETS, "total_step": 10},
    "C3A": {**TARGETS, "block_size": 8},
    "FOURIERFT": {**TARGETS, "n_frequency": 50},
    "IA3": {**TARGETS, "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "OFT": {**TARGETS, "oft_block_size": 8, "r": 0},
    "VBLORA": {**TARGETS, "vector_length": 16, "num_vectors": 32},
    "VERA": {"target_modules": ["q_proj"]},
    "RANDLORA": {"target_modules": ["q_proj"]},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2]},
    "WAVEFT": {**TARGETS, "n_frequency": 50},
}
LORAS = {
    "dora": {"use_dora": True},
    "bias": {"bias": "all"},
    **{str(start): {"init_lora_weights": start} for start in ("gaussian", "orthogonal", False, "pissa", "olora")},
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [1, 2, 3]},
    "dora-embeddings": {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]},
}
MERGED = [
    kind.value
    for kind, config in sorted(PEFT_TYPE_TO_CONFIG_MAPPING.items())
    if kind.value not in {*UNMERGED_TYPES, "LORA"} and not issubclass(config, PromptLearningConfig)
]


def make_base(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**settings, num_attention_heads=2, attention_bias=True, **options)).eval()


def make_config_of(kind: str):
    if kind in LORAS:
        return LoraConfig(**{"r": 4, **TARGETS, "task_type": "CAUSAL_LM", **LORAS[kind]})
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    return config_class(task_type="CAUSAL_LM", **SETTINGS.get(kind, TARGETS))


def make_policy(base: LlamaForCausalLM, config) -> PeftModel:
    return train(get_peft_model(copy.deepcopy(base), config).eval())


def train(policy: PeftModel) -> PeftModel:
    """As if."""
    torch.manual_seed(1)
    for parameter in policy.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return policy


def logits(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize("kind", [*LORAS, *MERGED])
def test_adapter_of_each_kind_is_merged_into_files_that_compute_what_it_does_and_is_left_as_it_was(kind, tmp_path):
    """
    And a new one is taken for the base model only if it changes nothing. PiSSA and OLoRA move a part of the base
    weights to the adapter: without it, a server's base model is another.
    """
    base, config = make_base(), make_config_of(kind)
    torch.manual_seed(2)
    policy = get_peft_model(copy.deepcopy(base), config).eval()
    expected = logits(base)
    changes_nothing = torch.allclose(logits(policy), expected, atol=1e-6)
    with policy.disable_adapter():
        changes_nothing &= torch.allclose(logits(policy), expected, atol=1e-6)
    assert starts_as_base(make_config_of(kind)) == changes_nothing

    train(policy)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    computed = logits(policy)
    save_merged(policy, str(tmp_path))
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (logits(merged) - computed).abs().max() < 1e-5
    assert (computed - expected).abs().max() > 1e-4
    after = policy.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(logits(policy), computed)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_tied_embeddings_that_are_trained_together_stay_tied(tmp_path):
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    policy = make_policy(make_base(tie_word_embeddings=True), LoraConfig(r=4, **TARGETS, **options))
    check_can_be_merged(policy)
    save_merged(policy, str(tmp_path))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path)) - logits(policy)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["head", "embeddings", "dora-embeddings"])
def test_adapter_that_would_untie_the_embeddings_is_refused(kind):
    policy = make_policy(make_base(tie_word_embeddings=True), make_config_of(kind))
    with pytest.raises(ValueError, match="ties its input and output embeddings.*`ensure_weight_tying=True`"):
        check_can_be_merged(policy)


# At the end of a run


@pytest.fixture
def play(play_run):
    def play(**given) -> SPINTrainer:
        fields = {"num_iterations": 1, "save_strategy": "epoch", "resume": "auto", "merge_adapter_at_end": True}
        return play_run(16, peft_config=LoraConfig(r=4, target_modules="all-linear"), **{**fields, **given})

    return play


def test_merged_model_of_a_run_computes_what_its_adapter_does_and_grpo_goes_on_from_it(play, tiny_model, tmp_path):
    """With the lines that docs/results.md shows, but for a tiny model's settings."""
    trainer = play(learning_rate=1e-2)
    folder = tmp_path / "run" / "merged"
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert type(merged) is LlamaForCausalLM
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    unmerged = logits(base)
    expected = logits(PeftModel.from_pretrained(base, trainer.store.checkpoints()[0]))
    assert torch.allclose(logits(merged), expected, atol=1e-5) and not torch.allclose(unmerged, expected, atol=1e-2)
    assert not list((tmp_path / "run").glob("merged-adapter*"))

    code = re.search(r"```python\n([^`]*GRPOTrainer\([^`]*)```", (ROOT / "docs" / "results.md").read_text())[1]
    tiny = "max_steps=1, use_cpu=True, bf16=False, report_to='none', max_completion_length=4, num_generations=2, "
    tiny += f"per_device_train_batch_size=2, gradient_checkpointing=False, output_dir={str(tmp_path / 'grpo')!r}, "
    assert "out/merged" in code and 'output_dir="out/grpo", ' in code
    code = code.replace("out/merged", str(folder)).replace('output_dir="out/grpo", ', tiny)
    exec(code, names := {})
    assert names["trainer"].state.global_step == 1


def test_finished_run_that_lacks_the_merged_model_gets_it_and_a_played_on_one_a_new_one(play, tmp_path):
    directory = tmp_path / "run" / "merged"
    play(merge_adapter_at_end=False)
    assert not directory.exists()
    play()
    first = (directory / "model.safetensors").read_bytes()
    made = directory.stat().st_mtime_ns
    play()
    assert directory.stat().st_mtime_ns == made  # it was there
    play(num_iterations=2)
    assert (directory / "model.safetensors").read_bytes() != first
