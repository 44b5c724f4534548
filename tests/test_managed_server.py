"""A server that a run starts for itself, played by a small program in real processes.

That vLLM itself is started, and started again, is tested in `test_server_restarts.py`.
"""

import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from managed import fake_server, kill, listens, processes_of, program_of, wait_for

from spin_trl.generation.sampler import SamplerError


# Starting and stopping


def test_server_is_reached_by_this_user_alone_and_leaves_nothing_behind(make_server, connect):
    server = make_server()
    folder = Path(server.base_url.removeprefix("unix:")).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    connect(server.base_url).close()
    server.stop()
    assert not folder.exists() and processes_of(server.base_url) == []


def test_long_path_for_temporary_files_is_no_obstacle(make_server, monkeypatch, tmp_path):
    """A socket's path may have 107 bytes."""
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    assert listens(make_server().base_url)


def test_server_that_cannot_start_shows_the_end_of_its_log(make_server, tmp_path):
    (tmp_path / "broken").touch()
    with pytest.raises(SamplerError, match=r"ended with status 1 while starting(.|\n)*out of memory"):
        make_server(max_restarts=3)


def test_server_that_takes_too_long_is_stopped(tmp_path):
    (tmp_path / "slow").touch()
    server = fake_server(tmp_path, timeout=1)
    with pytest.raises(SamplerError, match=r"was not up after `vllm_server_timeout` \(1 s\)(.|\n)*starting"):
        server.start()
    assert processes_of(server.base_url) == []


def test_key_for_a_users_own_server_is_not_passed_on(make_server, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "sk-secret")
    assert "VLLM_API_KEY" not in program_of(make_server()).environ()


# A server that ends by itself


def test_server_that_is_killed_is_started_again_at_the_same_address(make_server, connect, caplog):
    server = make_server(max_restarts=2)
    address = server.base_url
    sampler = connect(server.base_url)
    for number in (1, 2):
        kill(server)
        assert wait_for(lambda number=number: f"(restart {number} of at most 2)" in caplog.text)
        sampler.publish(number, None)  # as soon as it answers again
    assert server.base_url == address and not server.has_ended
    assert "ended with status 137 and is started again" in caplog.text
    assert server.log_path.read_text().count("starting\n") == 3  # nothing was cut off


def test_server_whose_supervisor_is_killed_is_started_again(make_server, caplog):
    server = make_server(max_restarts=1)
    program = program_of(server)
    program.parent().kill()
    assert wait_for(lambda: "(restart 1 of at most 1)" in caplog.text and listens(server.base_url))
    assert wait_for(lambda: not program.is_running() or program.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize("max_restarts", [0, 1])
def test_server_that_ends_too_often_stays_away_and_every_client_learns_why(make_server, connect, max_restarts):
    server = make_server(max_restarts=max_restarts)
    sampler = connect(server.base_url)
    for _ in range(max_restarts + 1):
        assert wait_for(lambda: listens(server.base_url))
        kill(server)
    with pytest.raises(SamplerError) as error:
        sampler.publish(1, None)
    message = str(error.value)
    assert f"started again {max_restarts} time(s)" in message
    assert "ended with status 137" in message and f"The end of {server.log_path}:\n" in message
    assert server.has_ended


def test_server_that_is_stopped_while_it_is_started_again_is_gone(make_server, tmp_path):
    server = make_server(max_restarts=3)
    (tmp_path / "slow").touch()
    kill(server)
    assert wait_for(lambda: server.num_restarts == 1)
    server.stop()
    assert processes_of(server.base_url) == [] and server.num_restarts == 1


def test_server_is_gone_when_the_trainer_is_killed(tmp_path):
    script = f"""
    import sys, time
    from pathlib import Path
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    from managed import fake_server

    server = fake_server(Path({str(tmp_path)!r}))
    server.start()
    print(server.base_url, flush=True)
    time.sleep(600)
    """
    trainer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    address = trainer.stdout.readline().strip()
    assert len(processes_of(address)) == 2
    trainer.kill()
    trainer.wait()
    assert wait_for(lambda: processes_of(address) == [])


@pytest.mark.parametrize(
    ("dtype", "bf16", "expected"),
    [("float32", False, "float32"), ("bfloat16", False, "bfloat16"), ("float32", True, "bfloat16")],
)
def test_server_computes_in_the_precision_of_the_policy(build_trainer, dtype, bf16, expected):
    init = {"model_init_kwargs": {"dtype": dtype}, "bf16": bf16}
    trainer = build_trainer(use_vllm=True, vllm_server_timeout=0.1, **init)
    with pytest.raises(SamplerError, match="was not up"):
        trainer.train()
    assert f"--dtype {expected} " in trainer.store.server_log.read_text().splitlines()[0]
