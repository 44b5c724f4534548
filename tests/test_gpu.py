"""What only a GPU shows: bfloat16, gradient checkpointing, and server and policy on one card. Run by `make test-gpu`.

The same runs with a tiny model on the CPU, in bfloat16 too, show here that they are written right.
"""

import math

import pytest
import torch
from gpu_runs import Place, Record, play

from spin_trl.generation.vllm.serve_command import can_serve


ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and there is none here"),
]
SLOW = [pytest.mark.slow]
TINY, SMALL, LARGE = Place("cpu", "tiny"), Place("cuda", "small"), Place("cuda", "large")

# Share of the GPU's memory for the server: more than would leave room for the policy beside it on a card of 16 GB.
SERVERS_SHARE = 0.6


def places(*on_gpu: Place, on_cpu=()) -> pytest.MarkDecorator:
    """The test on these, and a tiny model on the CPU."""
    chosen = [pytest.param(TINY, marks=on_cpu), *(pytest.param(place, marks=ON_GPU) for place in on_gpu)]
    return pytest.mark.parametrize("place", chosen, ids=str)


@pytest.fixture
def model(place, tmp_path, tokenizer) -> str:
    return place.make_model(tmp_path / "model", tokenizer)


def assert_trained(record: Record, place: Place) -> None:
    """At each iteration's first step policy and opponent are one: the loss is ln 2, but for bfloat16's rounding."""
    assert all(math.isfinite(loss) for loss in record.losses) and len(record.losses) == 4 + 8
    assert record.first_losses == pytest.approx([math.log(2)] * 2, abs=0.02)
    parameters = list(record.trainer.model.parameters())
    assert all(parameter.device.type == place.device and parameter.isfinite().all() for parameter in parameters)
    for iteration in range(2):
        pairs = record.trainer.store.read_pairs(iteration)
        assert all(0 < len(ids) <= 12 for ids in pairs["rejected_ids"])
        assert all(logps < 0 for logps in pairs["ref_rejected_logps"])


@pytest.mark.parametrize("kind", ["lora", "full"])
@places(SMALL, LARGE)
def test_policy_plays_in_process_and_trains_in_bfloat16_with_gradient_checkpointing(place, kind, model, tmp_path):
    record = play(place, kind, model, tmp_path / "run", use_vllm=False)
    assert_trained(record, place)


@pytest.mark.skipif(not can_serve(), reason="needs vLLM, which is not installed")
@pytest.mark.parametrize("kind", ["lora", "full"])
@places(LARGE, on_cpu=SLOW)
def test_server_and_policy_share_one_gpu_in_turns(place, kind, model, tmp_path):
    turns = {"vllm_sleep": True, "offload_policy_during_generation": True}
    share = {"vllm_gpu_memory_utilization": SERVERS_SHARE}
    record = play(place, kind, model, tmp_path / "run", use_vllm=True, **turns, **share)
    assert_trained(record, place)
    for iteration in range(2):
        metrics = record.trainer.store.read_metrics(iteration)
        assert metrics["publish_check_difference"] < 0.05
        assert metrics["gigabytes_freed_by_policy"] > 0
    if place.device == "cuda":
        assert_memory_is_freed(record)


def assert_memory_is_freed(record: Record) -> None:
    """Each has most of its memory in its own turn only. The margins leave room for contexts, graphs and workspaces."""
    servers = SERVERS_SHARE * torch.cuda.mem_get_info()[1]
    policys = min(memory.policy for memory in record.while_training)
    assert max(memory.others for memory in record.while_training) < 0.4 * servers
    servers_turn = [memory for memory in record.watch.seen if memory.others > 0.7 * servers]
    assert servers_turn and min(memory.policy for memory in servers_turn) < 0.25 * policys
    assert record.trainer.store.read_metrics(0)["gigabytes_freed_by_server"] * 1e9 > 0.5 * servers
