"""Whatever a server does, in whatever order: each prompt gets its answer, once, from the opponent."""

import random
import threading
import time

import pytest
from fault_server import (
    BASE,
    HANG_UP,
    PARAMS,
    Answer,
    CutOff,
    FakeVLLM,
    assert_all_are_the_opponents,
    make_requests,
    publish,
)


NUM_REQUESTS = 400


class Chaos:
    """A server that does one thing wrong in four, and is restarted without the opponent every now and then."""

    def __init__(self, seed: int):
        self.vllm = FakeVLLM()
        self.random = random.Random(seed)
        self.lock = threading.Lock()
        self.num_restarts = 0
        self.num_since_restart = 0  # so few that nothing comes in between would be the run's end, as they should be
        self.num_faults = 0

    def __call__(self, path: str, body: dict | None) -> Answer:
        with self.lock:
            fault = self.choose_fault(path)
            self.num_faults += fault is not None
        if fault == "restart":
            self.vllm.restart()
        if fault == "slow":
            time.sleep(0.02)
        if fault in (429, 500, 503):
            return fault, "broken"
        if fault == "hang up":
            return HANG_UP
        status, content, *headers = self.vllm(path, body)
        if fault == "abort" and status == 200:
            content["choices"][0].update(finish_reason="abort", token_ids=[BASE])
        if fault == "cut off":
            return CutOff((status, content))
        if fault == "lost answer":
            return HANG_UP
        return status, content

    def choose_fault(self, path: str) -> str | int | None:
        # What the engine makes of an adapter or of weights is final, so only there 500 is no fault that may pass.
        faults = ["slow", 429, 503, "hang up", "cut off", "lost answer"]
        if path == "/v1/completions":
            faults += [500, "abort"]
            self.num_since_restart += 1
            if self.num_since_restart > 60 and self.random.random() < 0.02:
                self.num_restarts += 1
                self.num_since_restart = 0
                return "restart"
        return self.random.choice(faults) if self.random.random() < 0.25 else None


@pytest.mark.parametrize("lora_rank", [8, None], ids=["lora", "full"])
@pytest.mark.parametrize("seed", range(3))
def test_every_prompt_gets_its_answer_once_and_from_the_opponent(play, tmp_path, record_property, seed, lora_rank):
    chaos = Chaos(seed)
    sampler = play(chaos, lora_rank=lora_rank, max_concurrent_requests=4, vocab_size=NUM_REQUESTS + 20)
    found = list(publish(sampler, tmp_path).sample(make_requests(NUM_REQUESTS), PARAMS))
    record_property("faults", chaos.num_faults)
    record_property("completions_lost", NUM_REQUESTS - len({completion.key for completion in found}))
    assert_all_are_the_opponents(found, NUM_REQUESTS)
    assert chaos.num_restarts >= 2 and chaos.num_faults > 100
