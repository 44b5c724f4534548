"""Locks in torch's extension cache, old and new, in either layout."""

import os
import time

import pytest
from accelerate import PartialState

from spin_trl import SPINTrainer
from spin_trl.processes.compiler_locks import warn_of_old_locks


@pytest.fixture
def make_lock(monkeypatch, tmp_path):
    """Makes a lock in a cache of the test's own, aged by so many minutes."""
    PartialState(cpu=True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))

    def make(path: str, minutes: float):
        lock = tmp_path / path / "lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
        os.utime(lock, (time.time() - 60 * minutes,) * 2)
        return lock

    return make


def test_each_old_lock_is_named_with_what_to_do(make_lock, caplog):
    old = [make_lock("cpu_adam", minutes=90), make_lock("utils", minutes=6)]
    make_lock("fused_adam", minutes=1)
    warn_of_old_locks()
    first, second = caplog.messages
    assert f"The lock {old[0]} of torch's extension cache is 90 minutes old" in first and f"rm {old[0]}" in first
    assert str(old[1]) in second


def test_default_cache_has_a_folder_for_each_version(make_lock, monkeypatch, tmp_path, caplog):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lock = make_lock("torch_extensions/py311_cpu/cpu_adam", minutes=30)
    warn_of_old_locks()
    assert str(lock) in caplog.text


@pytest.mark.parametrize("uses_deepspeed", [True, False])
def test_run_looks_before_training_if_it_uses_deepspeed(
    make_lock, tiny_model, train_dataset, make_config, caplog, uses_deepspeed
):
    make_lock("cpu_adam", minutes=90)
    trainer = SPINTrainer(tiny_model, make_config(), train_dataset=train_dataset)
    trainer.is_deepspeed_enabled = uses_deepspeed

    def stop(*args):
        raise InterruptedError("nothing is trained with this pretence")

    trainer.self_play_setup.open_sampler = stop
    with pytest.raises(InterruptedError):
        trainer.train()
    assert ("extension cache" in caplog.text) is uses_deepspeed
