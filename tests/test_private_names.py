"""Every private name of others that `spin_trl` relies on: after an upgrade these tests name what is gone."""

import ast
import inspect
import sys

import accelerate
import pytest
import transformers
from conftest import ROOT
from transformers import Trainer
from transformers.integrations import deepspeed
from trl import DPOTrainer

from spin_trl import SPINTrainer


sys.path.insert(0, str(ROOT / "scripts"))  # scripts, not a package

from rooms import files, name_of  # noqa: E402


# What is read or called, and who has it.
USED = {
    "_attn_implementation": transformers.PreTrainedConfig,
    "_dataloaders": accelerate.Accelerator,
    "_hf_deepspeed_config_weak_ref": deepspeed,
    "_load_from_checkpoint": Trainer,
    "_load_in_4bit": transformers.BitsAndBytesConfig,
    "_metrics": DPOTrainer,
    "_name": DPOTrainer,
    "_paper": DPOTrainer,
    "_prepare_inputs": Trainer,
    "_tag_names": DPOTrainer,
    "_tokenizer": DPOTrainer,
}

# Methods of DPOTrainer that ours replace, and their parameters. The public ones change without notice too.
OVERRIDDEN = {
    "_get_train_sampler": "self train_dataset",
    "_init_training_state": "self max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial",
    "_precompute_ref_logps": "self dataset name batch_size",
    "_prepare_dataset": "self dataset processing_class args dataset_name",
    "_run_epoch": (
        "self model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval "
        "start_time resume_from_checkpoint epochs_trained steps_trained_in_current_epoch"
    ),
    "compute_loss": "self model inputs return_outputs num_items_in_batch",
    "evaluate": "self eval_dataset ignore_keys metric_key_prefix",
    "create_model_card": "self model_name dataset_name tags",
    "push_to_hub": "self commit_message blocking token revision kwargs",
    "set_initial_training_values": "self args dataloader",
    "train": "self resume_from_checkpoint trial ignore_keys_for_eval",
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


@pytest.mark.parametrize("name", USED)
def test_private_name_is_still_there(name):
    owner = USED[name]
    is_set_in_init = inspect.isclass(owner) and any(
        f"self.{name}" in inspect.getsource(parent) for parent in owner.__mro__[:-1]
    )
    assert hasattr(owner, name) or is_set_in_init, f"{owner.__name__} no longer has {name}: see who uses it in spin_trl"


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_method_still_takes_the_same(name):
    method = getattr(DPOTrainer, name, None)
    assert method is not None, f"DPOTrainer no longer has {name}, so that ours is never called"
    assert " ".join(inspect.signature(method).parameters) == OVERRIDDEN[name], f"see {name} of ours"


def test_every_overridden_method_is_listed():
    ours = [parent for parent in SPINTrainer.__mro__ if parent.__module__.startswith("spin_trl")]
    names = {name for parent in ours for name, value in vars(parent).items() if callable(value)}
    assert {name for name in names if hasattr(DPOTrainer, name) and not name.startswith("__")} == set(OVERRIDDEN)


def test_every_private_name_of_others_that_is_used_is_listed():
    """A private name that no file of the package defines or assigns to `self` belongs to others."""
    trees = {name_of(file): ast.parse(file.read_text()) for file in files()}
    ours = {name for tree in trees.values() for node in ast.walk(tree) for name in names_made_by(node)}
    used = {}
    for file, tree in trees.items():
        for node in ast.walk(tree):
            for name in names_used_by(node):
                if is_private(name) and name not in ours:
                    used.setdefault(name, []).append(f"{file}:{node.lineno}")
    overriding = {name for name in USED if name in vars(SPINTrainer)}
    assert {name: where for name, where in used.items() if name not in {*USED, *OVERRIDDEN}} == {}
    assert set(USED) - set(used) - overriding == set(), "these are no longer used: take them off the list"


def names_made_by(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
        return [node.attr]
    return []


def names_used_by(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [*(node.module or "").split("."), *(alias.name for alias in node.names)]
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("getattr", "hasattr", "setattr", "get"):
        return [word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
    return []
