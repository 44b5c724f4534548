"""Tensors that leave their device and come back. Here both places are host memory; what moves is the same."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from spin_trl.policy.offload import Offloader, training_tensors


CPU = torch.device("cpu")


def make_model(kind: str, width: int = 16) -> nn.Module:
    """A Llama with an embedding that is tied to the head, and buffers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=True, **sizes))
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")) if kind == "lora" else model


def train(model: nn.Module, between_steps: Callable[[Offloader], None], num_steps: int = 4) -> list[float]:
    """Losses of a few steps with two gradients each, one of which is there between the steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    offloader = Offloader(lambda: training_tensors(model, optimizer, CPU))
    batches = torch.randint(32, (num_steps, 2, 8), generator=torch.Generator().manual_seed(0))
    losses = []
    for batch in batches:
        for row in batch:
            loss = model(input_ids=row[None], labels=row[None]).loss
            loss.backward()
            between_steps(offloader)
            losses.append(loss.item())
        optimizer.step()
        between_steps(offloader)
        optimizer.zero_grad()
    return losses


def away_and_back(offloader: Offloader) -> None:
    tensors = list(offloader.find_tensors())
    assert offloader.offload() > 0 and offloader.offload() == 0
    assert all(tensor.numel() == 0 for tensor in tensors)
    offloader.reload()
    offloader.reload()
    assert {id(tensor) for tensor in offloader.find_tensors()} == {id(tensor) for tensor in tensors}


@pytest.mark.parametrize("kind", ["full", "lora", "distributed"])
def test_training_goes_on_as_if_nothing_had_been_moved(kind, tmp_path):
    """The reducer of DistributedDataParallel holds the parameters' gradients in buckets of its own."""
    left_alone, moved = make_model(kind), make_model(kind)
    expected, wrapped = train(left_alone, lambda offloader: None), moved
    if kind == "distributed":
        dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
        wrapped = nn.parallel.DistributedDataParallel(moved)
    try:
        assert train(wrapped, away_and_back) == expected
    finally:
        if kind == "distributed":
            dist.destroy_process_group()
    for name, value in left_alone.state_dict().items():
        assert torch.equal(moved.state_dict()[name], value), name
    assert moved.get_input_embeddings().weight is moved.get_output_embeddings().weight


@pytest.mark.parametrize("bits", [None, 4])
def test_memory_is_free_while_weights_are_away_and_the_policy_cannot_be_used(bits, tmp_path):
    model = make_model("full", width=128)  # bitsandbytes packs no smaller ones
    if bits:
        pytest.importorskip("bitsandbytes")
        model.save_pretrained(tmp_path)
        model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    with torch.no_grad():
        before = model(input_ids=torch.arange(8)[None]).logits
    weights = [*model.parameters(), *model.buffers()]
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in weights]
    num_bytes = sum(tensor.nbytes for tensor in weights)
    offloader = Offloader(lambda: training_tensors(model, None, CPU))
    assert offloader.offload() == num_bytes
    assert all(storage.expired() for storage in storages)
    with pytest.raises(RuntimeError):
        model(input_ids=torch.arange(8)[None])
    offloader.reload()
    with torch.no_grad():
        assert torch.equal(model(input_ids=torch.arange(8)[None]).logits, before)


def test_tensors_that_share_memory_share_it_afterwards_in_the_same_shape():
    whole = torch.arange(12.0).reshape(3, 4)
    views = [whole[1], whole.T, whole[:, ::2]]
    expected = [view.clone() for view in views]
    offloader = Offloader(lambda: [whole, *views, whole])
    assert offloader.offload() == 12 * 4  # once, not for each
    offloader.reload()
    assert all(torch.equal(view, value) for view, value in zip(views, expected, strict=True))
    whole[1, 2] = -1
    assert views[0][2] == views[1][2, 1] == views[2][1, 1] == -1


def test_what_lies_elsewhere_or_moves_by_itself_stays_and_state_in_lists_is_found():
    model = nn.Linear(2, 2)
    model.elsewhere = nn.Parameter(torch.empty(2, device="meta"))
    model.weight.is_paged = True
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.weight] = {"step": 3, "directions": (states := [torch.ones(2), (torch.ones(3),)])}
    found = [id(tensor) for tensor in training_tensors(model, optimizer, CPU)]
    assert found == [id(model.bias), id(states[0]), id(states[1][0])]
