"""Every kind of adapter against a real vLLM server: what the server plays is what the policy computes."""

import copy

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from spin_trl import SPINTrainer
from spin_trl.generation.sampler import SamplerError


TARGETS = ["q_proj", "v_proj", "down_proj"]
# Named for what is published alone, and with what it has to be merged.
ALONE = {
    "rslora": LoraConfig(r=3, target_modules=TARGETS, use_rslora=True, rank_pattern={"q_proj": 8, "v_proj": 1}),
    "patterns": LoraConfig(
        r=4,
        target_modules=TARGETS,
        rank_pattern={"q_proj": 8, "layers.1.mlp.down_proj": 1},
        alpha_pattern={"v_proj": 16, "q_proj": 1},
    ),
    "embeddings": LoraConfig(r=8, target_modules=["embed_tokens", "q_proj"]),
}
MERGED = {
    "dora": LoraConfig(r=8, target_modules=TARGETS, use_dora=True),
    "head": LoraConfig(r=8, target_modules=TARGETS, modules_to_save=["lm_head", "embed_tokens"]),
    "pissa": LoraConfig(r=8, target_modules=TARGETS, init_lora_weights="pissa"),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(r=4, target_modules=TARGETS),
}
EXACT = 1e-5  # nats a token, in float32; a stale opponent differs by 1e-2 and more


@pytest.fixture
def play(build_trainer):
    """Plays, and sees that the server played the policy exactly at every iteration, and another one each time."""

    def play(server, num_iterations: int = 2, **given) -> SPINTrainer:
        settings = {"learning_rate": 1e-2, "publish_check_tolerance": EXACT, **server.fields}
        trainer = build_trainer(num_iterations=num_iterations, **settings, **copy.deepcopy(given))
        trainer.train()
        folders = [trainer.store.path(iteration, "opponent") for iteration in range(num_iterations)]
        contents = [next(folder.glob("*model.safetensors")).read_bytes() for folder in folders if folder.exists()]
        assert len(contents) >= num_iterations - 1 and len(set(contents)) == len(contents)
        return trainer

    return play


def files(trainer: SPINTrainer, iteration: int) -> set[str]:
    return {path.name for path in trainer.store.path(iteration, "opponent").glob("*.safetensors")}


@pytest.mark.parametrize("kind", ALONE)
def test_adapter_alone_is_played_exactly(lora_server, play, kind):
    trainer = play(lora_server, 3 if kind == "patterns" else 2, peft_config=ALONE[kind])
    assert not trainer.store.path(0, "opponent").exists()  # the base model
    assert files(trainer, 1) == {"adapter_model.safetensors"}


@pytest.mark.parametrize("kind", MERGED)
def test_merged_opponent_is_played_exactly(full_server, play, kind, capsys):
    trainer = play(full_server, 3 if kind == "dora" else 2, peft_config=MERGED[kind])
    assert trainer.store.path(0, "opponent").exists() == (kind == "pissa")  # elsewhere it is the base model
    assert files(trainer, 1) == {"model.safetensors"}
    assert "published as full weights, with the adapter merged into a copy" in capsys.readouterr().out


def test_merged_opponent_needs_a_server_for_full_weights(lora_server, build_trainer):
    with pytest.raises(SamplerError, match="cannot load the weights of the opponents.*VLLM_SERVER_DEV_MODE"):
        build_trainer(peft_config=copy.deepcopy(MERGED["dora"]), **lora_server.fields)


@pytest.mark.parametrize("kind", ["patterns", "rslora", "dora", "loha"])
def test_run_continues_from_a_trained_adapter(request, tiny_model, play, kind):
    server = request.getfixturevalue("lora_server" if kind in ALONE else "full_server")
    torch.manual_seed(0)
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), copy.deepcopy((ALONE | MERGED)[kind]))
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    initial = copy.deepcopy(policy).eval()

    trainer = play(server, model=policy)

    if kind in ALONE:
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        opponent = PeftModel.from_pretrained(base, str(trainer.store.path(0, "opponent"))).eval()
    else:
        opponent = AutoModelForCausalLM.from_pretrained(trainer.store.path(0, "opponent"))
    ids = torch.tensor([trainer.game.dataset[0]["prompt_ids"]])
    with torch.no_grad():
        assert (opponent(ids).logits - initial(ids).logits).abs().max() < 1e-4
        with initial.disable_adapter():
            assert (opponent(ids).logits - initial(ids).logits).abs().max() > 1e-2
