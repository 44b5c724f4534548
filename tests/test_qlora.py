"""LoRA on a base model of 4 bits, quantized by bitsandbytes, which runs on the CPU too."""

import json

import pytest
import torch
from conftest import load_recipe, read_rows
from peft import LoraConfig, PeftModel
from stopping import AtStep, train_until_stopped
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from trl import ModelConfig, TrlParser

from spin_trl import SPINConfig, SPINTrainer
from spin_trl.play.publish_check import allow_for_quantization
from spin_trl.policy.merging import save_base
from spin_trl.policy.quantization import keep_weights_as_quantized
from spin_trl.policy.sizes import weight_sizes


NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
LORA = {"r": 8, "target_modules": "all-linear"}


def quantized(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=NF4)


def logits(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


def test_base_is_written_out_as_the_numbers_that_its_4_bits_stand_for(tiny_model, tmp_path):
    ids = torch.arange(3, 11)[None]
    policy = PeftModel(quantized(tiny_model), LoraConfig(**LORA))
    keep_weights_as_quantized(policy)
    save_base(policy, str(tmp_path))
    written = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert (logits(written, ids) - logits(policy, ids)).abs().max() < 1e-5
    (file,) = tmp_path.glob("*.safetensors")
    assert weight_sizes(policy).base == pytest.approx(file.stat().st_size, rel=0.05)
    unquantized = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert (logits(unquantized, ids) - logits(policy, ids)).abs().max() > 1e-2


@pytest.fixture
def make_trainer(build_trainer):
    def make(**given) -> SPINTrainer:
        own = {"quantization_config": NF4, "peft_config": LoraConfig(**LORA), "num_iterations": 2}
        return build_trainer(24, **{**own, **given})

    return make


def losses(trainer: SPINTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_plays_in_process_and_continues_a_stopped_run(make_trainer, tmp_path):
    resumable = {"save_strategy": "epoch", "resume": "auto"}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **resumable)
    whole.train()
    assert len(losses(whole)) == 3 + 6
    # The policy is its own reference, quantized as it is.
    assert losses(whole)[0] == losses(whole)[3] == pytest.approx(0.6931, abs=1e-4)

    train_until_stopped(make_trainer(callbacks=[AtStep(5)], **resumable))
    resumed = make_trainer(**resumable)
    resumed.train()
    assert losses(resumed) == losses(whole)


def test_gradients_pass_quantized_weights_after_the_model_has_answered(tiny_model):
    """On some CPUs bitsandbytes packs the weights in the first evaluation, and no gradient passes them any more."""
    policy = PeftModel(quantized(tiny_model), LoraConfig(**LORA))
    keep_weights_as_quantized(policy)
    logits(policy, torch.tensor([[3, 4]]))
    embeddings = policy.get_input_embeddings()(torch.tensor([[3, 4]])).detach().requires_grad_()
    policy.train()(inputs_embeds=embeddings).logits[0, -1, 5].backward()
    expected = embeddings.grad.clone()

    written = AutoModelForCausalLM.from_pretrained(tiny_model)
    plain = PeftModel(written, LoraConfig(**LORA))
    for name, module in policy.named_modules():
        if type(module).__name__ == "Linear4bit" and name.endswith("base_layer"):
            plain.get_submodule(name).weight.data = dequantize_bnb_weight(module.weight)
    embeddings.grad = None
    plain.train()(inputs_embeds=embeddings).logits[0, -1, 5].backward()
    assert expected.abs().max() > 0 and torch.allclose(embeddings.grad, expected, atol=1e-6)


def test_model_whose_weights_were_packed_already_is_refused(tiny_model):
    policy = PeftModel(quantized(tiny_model), LoraConfig(**LORA))
    layer = policy.get_base_model().model.layers[0].mlp.up_proj.base_layer
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="packed the model's 4-bit weights.*Load the model anew"):
        keep_weights_as_quantized(policy)


@pytest.mark.slow
def test_managed_server_plays_the_quantized_policy_as_it_is(make_trainer):
    """Up to the adapter: DPOTrainer keeps one of a quantized model in bfloat16, the server computes in float32."""
    trainer = make_trainer(use_vllm=True, learning_rate=1e-2)
    trainer.train()
    differences = [trainer.store.read_metrics(i)["publish_check_difference"] for i in range(2)]
    assert differences[0] < 1e-5 and differences[1] < 2e-3
    assert (trainer.store.path(1, "opponent") / "adapter_model.safetensors").exists()
    assert not trainer.store.served_base.exists()


def test_server_of_the_unquantized_base_is_allowed_the_difference_that_quantization_makes(
    lora_server, make_trainer, caplog
):
    fields = {**lora_server.fields, "publish_check_tolerance": 1e-5}
    trainer = make_trainer(learning_rate=1e-2, **fields)
    trainer.train()
    assert "The policy's base model is quantized, the server's is not" in caplog.text
    first, second = (trainer.store.read_metrics(i)["publish_check_difference"] for i in range(2))
    assert 1e-3 < first and second < 1.5 * first


@pytest.mark.parametrize(
    ("tolerance", "first", "expected"), [(0.05, 0.1, 0.15), (0.05, 0.01, 0.05), (0.05, None, 0.5), (0.8, None, 0.8)]
)
def test_tolerance_is_widened_by_what_the_first_opponent_differs_and_never_narrowed(tolerance, first, expected):
    assert allow_for_quantization(tolerance, first) == pytest.approx(expected)


def test_recipe_trains_an_adapter_to_4_bits(tiny_model, tmp_path):
    train_file = tmp_path / "train.jsonl"
    train_file.write_text("".join(f"{json.dumps(row)}\n" for row in read_rows("accent_train.jsonl", 16)))
    spin = load_recipe("spin")
    parser = TrlParser((spin.SPINScriptArguments, SPINConfig, ModelConfig))
    arguments = ["--model_name_or_path", tiny_model, "--train_file", str(train_file), "--load_in_4bit", "--use_peft"]
    arguments += ["--output_dir", str(tmp_path / "run"), "--use_vllm", "false", "--num_iterations", "1"]
    arguments += ["--use_cpu", "--bf16", "false", "--report_to", "none", "--max_completion_length", "8"]
    spin.main(*parser.parse_args_and_config(arguments))
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    with pytest.raises(ValueError, match="`load_in_4bit` .* got `dtype='auto'`"):
        spin.main(*parser.parse_args_and_config([*arguments, "--dtype", "auto"]))
