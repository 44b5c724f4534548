"""What is pushed where, against a hub on loopback, by runs in processes of their own."""

import pickle
from pathlib import Path

import pytest
from fake_hub import FakeHub
from play_short import play_in_process


TOKEN = "hf_secretsecretsecretsecretsecretsecr"


@pytest.fixture
def hub():
    hub = FakeHub()
    yield hub
    hub.close()


@pytest.fixture
def run(hub, tiny_model, tmp_path):
    """Plays a run of two iterations of two steps in a process, and gives what it printed."""
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment["HF_HOME"] = str(tmp_path / "home")
    config = {"output_dir": str(tmp_path / "run"), "push_to_hub": True, "hub_iteration_revisions": True}
    config |= {"hub_token": TOKEN, "save_strategy": "epoch"}

    def play(settings: dict | None = None, **job) -> str:
        return play_in_process(tmp_path, environment, model=tiny_model, config={**config, **(settings or {})}, **job)

    return play


def assert_all_is_pushed(hub: FakeHub, output_dir: Path, weights: str) -> None:
    """Each iteration is a revision, the final model the main one, and nothing else of the run is on the hub."""
    assert set(hub.branches) == {"main", "iteration-0", "iteration-1"}
    own = {branch: hub.branches[branch][weights] for branch in hub.branches}
    assert own["main"] == own["iteration-1"] != own["iteration-0"]
    assert own["main"] == (output_dir / weights).read_bytes()
    for branch, files in hub.branches.items():
        assert "config.json" in files or "adapter_config.json" in files
        assert "tokenizer.json" in files
        card = files["README.md"].decode()
        assert "SPIN" in card and "chen2024self" in card and "| start |" in card
        # An iteration's card shows its own evaluation and nothing later.
        assert ("| iteration 1 |" in card) == (branch != "iteration-0")
        assert {Path(path).suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md"}
        assert not [path for path in files if "/" in path or "self_play" in path or "state" in path]
    assert hub.tokens == {TOKEN}
    for path in output_dir.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_each_iteration_is_a_revision_and_the_final_model_the_main_one(hub, run, tmp_path):
    assert TOKEN not in run({"save_total_limit": 1}, lora=False, push=True)
    assert_all_is_pushed(hub, tmp_path / "run", "model.safetensors")


def test_failed_push_is_a_warning_and_the_same_command_pushes_what_is_missing(hub, run, tmp_path):
    hub.refuses = True
    output = run()
    for branch in ("iteration-0", "iteration-1", "main"):
        assert f"could not be pushed to me/run, revision '{branch}'" in output
    assert hub.commits == []
    hub.refuses = False
    run()  # all is played, but not pushed
    assert hub.commits == ["iteration-0", "iteration-1", "main"]
    assert_all_is_pushed(hub, tmp_path / "run", "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("revisions", "settings", "message"),
    [
        (True, {"push_to_hub": False}, "but `push_to_hub` is False"),
        (True, {"save_strategy": "no"}, "`save_strategy='no'`"),
        (True, {"save_strategy": "epoch", "hub_revision": "iteration-0"}, "gives revisions of that form"),
        (False, {"hub_strategy": "every_save"}, "`hub_strategy=.*your data"),
    ],
)
def test_contradicting_settings_are_refused(make_config, revisions, settings, message):
    with pytest.raises(ValueError, match=message):
        make_config(**{"push_to_hub": True, "hub_iteration_revisions": revisions, **settings})


def test_pickled_arguments_hold_no_token(make_config):
    args = make_config(hub_token=TOKEN)
    content = pickle.dumps(args)
    assert TOKEN.encode() not in content
    assert args.hub_token == TOKEN  # and the run still has it
