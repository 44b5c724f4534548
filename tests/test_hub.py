"""What is pushed where, against a hub on loopback, by runs in processes of their own."""

import pickle
from pathlib import Path

import pytest
from fake_hub import FakeHub
from play_short import play_in_process

from spin_trl import SPINConfig


TOKEN = "hf_secretsecretsecretsecretsecretsecr"


@pytest.fixture
def hub():
    hub = FakeHub()
    yield hub
    hub.close()


@pytest.fixture
def run(hub, tiny_model, tmp_path):
    """Plays a run of two iterations of two steps in a process, and gives what it printed."""
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    config = {
        "output_dir": str(tmp_path / "run"),
        "push_to_hub": True,
        "hub_iteration_revisions": True,
        "hub_token": TOKEN,
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "disable_tqdm": True,
    }

    def play(succeeds: bool = True, **job) -> str:
        return play_in_process(tmp_path, environment, succeeds, model=tiny_model, config=config, **job)

    return play


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_each_iteration_is_a_revision_and_the_final_model_the_main_one(hub, run, tmp_path, lora):
    output = run(lora=lora, push=True)
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    assert set(hub.branches) == {"main", "iteration-0", "iteration-1"}
    own = {branch: hub.branches[branch][name] for branch in hub.branches}
    assert own["main"] == own["iteration-1"] != own["iteration-0"]
    assert own["main"] == (tmp_path / "run" / name).read_bytes()
    for branch, files in hub.branches.items():
        assert "config.json" in files or "adapter_config.json" in files
        assert "tokenizer.json" in files
        card = files["README.md"].decode()
        assert "SPIN" in card and "chen2024self" in card and "| start |" in card
        # An iteration's card shows its own evaluation and nothing later.
        assert ("| iteration 1 |" in card) == (branch != "iteration-0")
        others = [path for path in files if path != "README.md" and not path.startswith("tokenizer")]
        assert {Path(path).suffix for path in others} <= {".safetensors", ".json", ".jinja"}
        assert not [path for path in files if "/" in path or "self_play" in path or "state" in path]
    assert hub.tokens == {TOKEN}
    assert TOKEN not in output
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_failed_push_is_a_warning_and_the_same_command_pushes_what_is_missing(hub, run, tmp_path):
    hub.refuses = lambda branch: True
    output = run(fail_at=3, succeeds=False)  # in iteration 1, after iteration 0 could not be pushed
    assert "stopped by the test" in output
    assert "could not be pushed to me/run, revision 'iteration-0'" in output and "start" in output
    expected = (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").read_bytes()
    assert hub.commits == []
    hub.refuses = lambda branch: branch == "main"
    run()
    assert [branch for branch, _ in hub.commits] == ["iteration-0", "iteration-1"]
    assert hub.branches["iteration-0"]["adapter_model.safetensors"] == expected
    hub.refuses = lambda branch: False
    run()  # all is played, but not all is pushed
    own = {branch: hub.branches[branch]["adapter_model.safetensors"] for branch in hub.branches}
    assert own["main"] == own["iteration-1"] != expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hub_iteration_revisions": True}, "but `push_to_hub` is False"),
        ({"hub_iteration_revisions": True, "push_to_hub": True, "save_strategy": "no"}, "`save_strategy='no'`"),
        (
            {"hub_iteration_revisions": True, "push_to_hub": True, "hub_revision": "iteration-0"},
            "gives revisions of that form",
        ),
        ({"push_to_hub": True, "hub_strategy": "every_save"}, "`hub_strategy=.*your data"),
    ],
)
def test_contradicting_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        SPINConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_pickled_arguments_hold_no_token(tmp_path):
    args = SPINConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, hub_token=TOKEN)
    content = pickle.dumps(args)
    assert TOKEN.encode() not in content
    assert args.hub_token == TOKEN  # and the run still has it
