"""Merged weights compute what the adapter does, lie in files that transformers loads, and leave the policy alone."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from spin_trl.policy.adapters import starts_as_base
from spin_trl.policy.merging import check_can_be_merged, fold_scaling, save_merged
from spin_trl.policy.published_form import MERGED_TYPES
from spin_trl.run_directory.footprint import estimate_footprint, weights_of


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
    "WAVEFT": {**TARGETS, "n_frequency": 50},
}
LORAS = {
    "dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [1, 2, 3]},
    "dora-embeddings": {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]},
}


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
    """With an adapter that is as if trained."""
    policy = get_peft_model(copy.deepcopy(base), config).eval()
    torch.manual_seed(1)
    for parameter in policy.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return policy


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("kind", [*LORAS, *sorted(MERGED_TYPES)])
def test_merged_files_compute_what_the_policy_does_and_leave_it_as_it_was(kind, tmp_path):
    base = make_base()
    policy = make_policy(base, make_config_of(kind))
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    computed = logits(policy)
    save_merged(policy, str(tmp_path))
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (logits(merged) - computed).abs().max() < 1e-5
    assert (computed - logits(base)).abs().max() > 1e-4
    after = policy.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(logits(policy), computed)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("kind", [*LORAS, *sorted(MERGED_TYPES)])
def test_new_adapter_of_each_kind_is_taken_for_the_base_model_only_if_it_changes_nothing(kind):
    base = make_base()
    config = make_config_of(kind)
    torch.manual_seed(2)
    policy = get_peft_model(copy.deepcopy(base), config).eval()
    if starts_as_base(config):
        assert torch.allclose(logits(policy), logits(base), atol=1e-6)
        with policy.disable_adapter():
            assert torch.allclose(logits(policy), logits(base), atol=1e-6)


def test_tied_embeddings_that_are_trained_together_stay_tied(tmp_path):
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    policy = make_policy(make_base(tie_word_embeddings=True), LoraConfig(r=4, **TARGETS, **options))
    check_can_be_merged(policy)
    save_merged(policy, str(tmp_path))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path)) - logits(policy)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}, LORAS["dora-embeddings"]],
    ids=["head", "embeddings", "dora"],
)
def test_adapter_that_would_untie_the_embeddings_is_refused(options):
    policy = make_policy(make_base(tie_word_embeddings=True), LoraConfig(**{"r": 4, **TARGETS, **options}))
    with pytest.raises(ValueError, match="ties its input and output embeddings.*`ensure_weight_tying=True`"):
        check_can_be_merged(policy)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_adapter_with_ranks_and_alphas_of_its_own_is_scaled_as_vllm_scales_it(tmp_path, use_rslora):
    """vLLM scales every module by alpha / r (rsLoRA: alpha / sqrt(r)) of the configuration, whatever its own rank."""
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"q_proj": 9, "layers.1.down_proj": 1},
        alpha_pattern={"v_proj": 5, "q_proj": 3},
        use_rslora=use_rslora,
    )
    base = make_base()
    policy = make_policy(base, config)
    policy.save_pretrained(tmp_path)
    fold_scaling(str(tmp_path))

    scaling = 6 / 4**0.5 if use_rslora else 6 / 4
    weights = load_file(tmp_path / "adapter_model.safetensors")
    for name, module in policy.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            a, b = (weights[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
            assert torch.allclose(scaling * b @ a, module.get_delta_weight("default"), atol=1e-6)
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert (logits(again) - logits(policy)).abs().max() < 1e-5


def test_plain_adapter_is_left_as_it_was_saved(tmp_path):
    make_policy(make_base(), LoraConfig(r=4, **TARGETS)).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fold_scaling(str(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("kind", ["dora", "head", "IA3", "LN_TUNING"])
def test_disk_estimate_counts_merged_opponents_as_whole_models(kind, tmp_path, tokenizer, make_config, train_dataset):
    policy = make_policy(make_base(), make_config_of(kind))
    save_merged(policy, str(tmp_path / "merged"))
    weights = weights_of(policy, tokenizer, merged=True)
    written = (tmp_path / "merged" / "model.safetensors").stat().st_size
    assert written == pytest.approx(weights.published, rel=0.05)

    rows = train_dataset.map(lambda row: {"prompt_ids": [1] * 4, "chosen_ids": [1] * 6})
    footprint = estimate_footprint(make_config(num_iterations=3), weights, rows, None, True, True)
    assert footprint.opponents == 2 * (weights.published + weights.tokenizer)
    assert footprint.lower_bound == 2 * weights.published
