"""A few prompts with their ground truth and what every opponent so far answered, shown once in each iteration.

The same prompts each time, so that one sees the answers change. Knows nothing of the trainer.
"""

import random
import sys
from importlib import import_module

import pandas
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from trl.trainer.utils import print_prompt_completions_sample

from ..run_directory.store import IterationStore
from ..spin_config import SPINConfig


_NUM_PROMPTS = 5


class ShowCompletions(TrainerCallback):
    """
    A callback that prints the table when the pairs of an iteration have been made, and logs it to trackio and Weights &
    Biases where the run reports to them. The run's seed chooses the prompts.
    """

    def __init__(self, store: IterationStore, tokenizer: PreTrainedTokenizerBase):
        self.store = store
        self.tokenizer = tokenizer

    def on_epoch_begin(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        iteration, epoch = divmod(int(state.epoch + 1e-6), args.epochs_per_iteration)
        if not state.is_world_process_zero or epoch > 0 or control.should_training_stop:
            return
        dataset = self.store.read_data()
        chosen = random.Random(args.seed).sample(range(len(dataset)), min(_NUM_PROMPTS, len(dataset)))
        rows = dataset[sorted(chosen)]
        prompts = self.tokenizer.batch_decode(rows["prompt_ids"])
        truths = self.tokenizer.batch_decode(rows["chosen_ids"], skip_special_tokens=True)
        answers = {f"Iteration {i}": self._first_answers(i, rows["row"]) for i in range(iteration + 1)}
        *_, newest = answers.values()
        columns = {"Ground truth": truths, **answers}
        with tqdm.external_write_mode(file=sys.stdout):
            print_prompt_completions_sample(prompts, newest, {}, None, state.global_step, extra=columns)
        frame = pandas.DataFrame({"Iteration": iteration, "Prompt": prompts, **columns})
        for name in {"wandb", "trackio"}.intersection(args.report_to):
            tracker = import_module(name)
            if name == "trackio" or tracker.run is not None:
                tracker.log({"completions": tracker.Table(dataframe=frame)})

    def _first_answers(self, iteration: int, rows: list[int]) -> list[str]:
        """The text of the first answer to each of these rows."""
        texts = {}
        parts = self.store.completions(iteration, "generations")
        for path in parts.paths():
            table = parts.read(path, ["row", "sample", "completion_ids"])
            wanted = pc.and_(pc.is_in(table["row"], pa.array(rows)), pc.equal(table["sample"], 0))
            for answer in table.filter(wanted).to_pylist():
                texts[answer["row"]] = self.tokenizer.decode(answer["completion_ids"], skip_special_tokens=True)
        return [texts[row] for row in rows]
