"""Tensors that leave their device and come back. Here both places are host memory; what moves is the same."""

import copy
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


def make_model(kind: str) -> nn.Module:
    """A Llama with an embedding that is tied to the head, and buffers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
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
    assert offloader.offload() > 0
    offloader.reload()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_training_goes_on_as_if_nothing_had_been_moved(kind):
    left_alone, moved = make_model(kind), make_model(kind)
    assert train(moved, away_and_back) == train(left_alone, lambda offloader: None)
    for name, value in left_alone.state_dict().items():
        assert torch.equal(moved.state_dict()[name], value), name


def test_training_in_distributed_data_parallel_goes_on_as_if_nothing_had_been_moved(tmp_path):
    """Its reducer holds the parameters' gradients in buckets of its own."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(make_model("full"))
        assert train(model, away_and_back) == train(make_model("full"), lambda offloader: None)
    finally:
        dist.destroy_process_group()


def test_every_tensor_stays_the_object_it_is_and_keeps_its_value():
    model = make_model("lora")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    objects = {id(tensor): copy.deepcopy(tensor.detach()) for tensor in training_tensors(model, optimizer, CPU)}
    requires_grad = [parameter.requires_grad for parameter in model.parameters()]
    num_tensors = len(objects)
    assert num_tensors == len(list(model.parameters())) + len(list(model.buffers())) + 4 * sum(requires_grad)

    offloader = Offloader(lambda: training_tensors(model, optimizer, CPU))
    offloader.offload()
    assert all(tensor.numel() == 0 for tensor in training_tensors(model, optimizer, CPU))
    offloader.reload()
    found = {id(tensor): tensor for tensor in training_tensors(model, optimizer, CPU)}
    assert found.keys() == objects.keys()
    assert all(torch.equal(found[key], value) for key, value in objects.items())
    assert [parameter.requires_grad for parameter in model.parameters()] == requires_grad
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_weights_of_four_bits_are_moved_too(tmp_path):
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    with torch.no_grad():
        before = model(input_ids=torch.arange(8)[None]).logits
    storages = [StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()]
    offloader = Offloader(lambda: training_tensors(model, None, CPU))
    offloader.offload()
    assert all(storage.expired() for storage in storages)
    offloader.reload()
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


def test_memory_is_free_while_tensors_are_away_and_the_policy_cannot_be_used():
    model = make_model("full")
    storages = [StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()]
    num_bytes = sum(parameter.nbytes for parameter in model.parameters()) + sum(b.nbytes for b in model.buffers())
    offloader = Offloader(lambda: training_tensors(model, None, CPU))
    assert offloader.offload() == num_bytes
    assert all(storage.expired() for storage in storages)
    with pytest.raises(RuntimeError):
        model(input_ids=torch.arange(8)[None])
    offloader.reload()
    model(input_ids=torch.arange(8)[None])


def test_moving_twice_is_moving_once():
    tensor = torch.arange(4.0)
    offloader = Offloader(lambda: [tensor])
    offloader.reload()
    assert [offloader.offload(), offloader.offload()] == [16, 0]
    offloader.reload()
    offloader.reload()
    assert tensor.tolist() == [0, 1, 2, 3]


def test_what_lies_elsewhere_or_moves_by_itself_stays():
    model = nn.Linear(2, 2)
    model.elsewhere = nn.Parameter(torch.empty(2, device="meta"))
    model.weight.is_paged = True
    assert [id(tensor) for tensor in training_tensors(model, None, CPU)] == [id(model.bias)]


def test_state_of_every_shape_is_found():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.LBFGS(model.parameters())  # keeps lists of tensors
    for _ in range(3):
        optimizer.step(lambda: _backward(model))
    state = optimizer.state[model.weight]
    found = {id(tensor) for tensor in training_tensors(model, optimizer, CPU)}
    assert state["old_dirs"] and {id(direction) for direction in state["old_dirs"]} <= found


def _backward(model: nn.Module) -> torch.Tensor:
    model.zero_grad()
    loss = (model(torch.ones(2)) ** 2).sum() + (model(torch.tensor([1.0, -2.0])) ** 4).sum()
    loss.backward()
    return loss
