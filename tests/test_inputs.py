"""At which tokens a model is taken to stop."""

import json

import pytest
from tiny_tokenizers import byte_tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from spin_trl.policy.inputs import end_token_ids


TOKENIZER = byte_tokenizer("<|end_of_text|>", extra_special_tokens=("<|eot_id|>", "<|eom_id|>"))
END_OF_TEXT, END_OF_TURN, END_OF_MESSAGE = TOKENIZER.convert_tokens_to_ids(
    ["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"]
)


def model_folder(tmp_path, config_eos, generation_eos="no file") -> str:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "eos_token_id": config_eos}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation_eos != "no file":
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("config_eos", "generation_eos", "expected"),
    [
        (END_OF_TEXT, [END_OF_TEXT, END_OF_MESSAGE, END_OF_TURN], (END_OF_TEXT, END_OF_MESSAGE, END_OF_TURN)),
        (END_OF_TEXT, [END_OF_TURN, END_OF_TEXT], (END_OF_TEXT, END_OF_TURN)),
        (END_OF_TEXT, END_OF_TURN, (END_OF_TEXT, END_OF_TURN)),
        (END_OF_TEXT, None, (END_OF_TEXT,)),
        ([END_OF_TEXT, END_OF_TURN], "no file", (END_OF_TEXT, END_OF_TURN)),
        (None, "no file", (END_OF_TEXT,)),
    ],
    ids=["llama 3", "another order", "one", "none", "generation config made from the model's", "none at all"],
)
def test_model_stops_at_the_tokenizers_end_token_and_at_those_of_its_generation_config(
    tmp_path, make_config, config_eos, generation_eos, expected
):
    model = model_folder(tmp_path, config_eos, generation_eos)
    assert end_token_ids(model, TOKENIZER, make_config()) == expected


@pytest.mark.parametrize(
    ("eos_token_id", "expected"),
    [([END_OF_TURN, END_OF_MESSAGE], (END_OF_TEXT, END_OF_TURN, END_OF_MESSAGE)), (None, (END_OF_TEXT,))],
)
def test_loaded_model_stops_where_its_generation_config_says(make_config, eos_token_id, expected):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), **sizes))
    model.generation_config = GenerationConfig(eos_token_id=eos_token_id)
    assert end_token_ids(model, TOKENIZER, make_config()) == expected
