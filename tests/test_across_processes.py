"""A loss of the pairs of all processes: its value, and the gradient that averaging over the processes makes of it."""

import json
from types import SimpleNamespace

import pytest
import torch
from play_distributed import play, settings
from test_distributed import TRAIN_FILE, launch, slow

from spin_trl import SPINConfig
from spin_trl.objectives.losses.iris import iris
from spin_trl.objectives.objective import LogProbs
from spin_trl.objectives.own_losses import join_log_probs
from spin_trl.run_directory.description import differences


SIDES = ("chosen", "rejected", "ref_chosen", "ref_rejected")


def random_sides(num_pairs: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {side: -5 * torch.rand(num_pairs, generator=generator, dtype=torch.float64) for side in SIDES}


def process(index: int, count: int, everything: list[torch.Tensor]) -> SimpleNamespace:
    """An accelerator that gathers, in the order of `SIDES`, what all processes have."""
    return SimpleNamespace(num_processes=count, process_index=index, gather=lambda own: everything.pop(0))


@pytest.mark.parametrize("num_processes", [2, 3])
def test_averaged_gradient_is_that_of_one_batch(num_processes):
    """A model of one weight for each pair and side: what DDP averages is the gradient of each process."""
    sides = {name: values.requires_grad_() for name, values in random_sides(6).items()}
    expected = iris(LogProbs(**sides), 0.1, iris_alpha=0.7)
    expected_gradient = torch.autograd.grad(expected, [sides["chosen"], sides["rejected"]])
    losses, gradients = [], []
    for index in range(num_processes):
        own = LogProbs(**{name: values.chunk(num_processes)[index] for name, values in sides.items()})
        accelerator = process(index, num_processes, [values.detach() for values in sides.values()])
        losses.append(iris(join_log_probs(own, accelerator), 0.1, iris_alpha=0.7))
        gradients.append(torch.autograd.grad(losses[-1], [sides["chosen"], sides["rejected"]]))
    assert [loss.item() for loss in losses] == pytest.approx([expected.item()] * num_processes, rel=1e-12)
    for side in range(2):
        averaged = torch.stack([gradient[side] for gradient in gradients]).mean(dim=0)
        torch.testing.assert_close(averaged, expected_gradient[side], atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("loss_type", "found"), [("sigmoid", []), ("iris", ["`training.pairs_per_forward`: 8 there, 4 now"])]
)
def test_run_of_a_batch_loss_is_not_continued_with_its_steps_divided_otherwise(build_trainer, loss_type, found):
    def describe(size: int, steps: int) -> dict:
        divided = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        return build_trainer(loss_type=loss_type, **divided).plan.describe()

    assert differences(describe(8, 2), describe(4, 4)) == found


IRIS = {"loss_type": ["iris", "sigmoid"], "loss_weights": [1.0, 0.5], "iris_alpha": 2.0}
T_SPIN = {"loss_type": ["t_spin"], "t_spin_beta": 0.5}


@slow
@pytest.mark.parametrize(
    ("name", "fields", "adapter"),
    [("ddp", IRIS, "full"), ("ddp", T_SPIN, "lora"), ("zero3", IRIS, "lora"), ("zero3", T_SPIN, "full")],
    ids=["ddp-iris", "ddp-t_spin-lora", "zero3-iris-lora", "zero3-t_spin"],
)
def test_two_processes_train_on_the_same_loss_as_one(name, fields, adapter, tiny_model, tmp_path):
    """Each step has eight pairs, divided over the processes or not; in iteration 1 T-SPIN's have three sides."""
    expected = play(tiny_model, str(TRAIN_FILE), SPINConfig(**settings(str(tmp_path / "alone"), **fields)), adapter)
    arguments = [tiny_model, str(TRAIN_FILE), str(tmp_path / "two")]
    for field, value in fields.items():
        arguments += [f"--{field}", *map(str, value if isinstance(value, list) else [value])]
    done = launch(name, tmp_path, [*arguments, "--adapter", adapter])
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    for rank in range(2):
        seen = json.loads((tmp_path / "two" / f"seen-{rank}.json").read_text())
        assert seen["num_processes"] == 2
        assert seen["loss"] == pytest.approx(expected["loss"], abs=1e-4)
