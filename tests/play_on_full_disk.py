"""A short run on two processes; at the end of a step process 0 fills the disk. See test_disk.py.

play_on_full_disk.py MODEL DISK FOLDER STEP BYTES_LEFT_FREE
"""

import os
import sys
from pathlib import Path

from conftest import read_rows
from datasets import Dataset
from play_distributed import settings
from stopping import AtStep

from spin_trl import SPINConfig, SPINTrainer


if __name__ == "__main__":
    model, disk, folder, step, room = sys.argv[1:]
    config = SPINConfig(
        **settings(f"{disk}/run", save_strategy="epoch", num_iterations=1, learning_rate=1e-3, beta=0.1)
    )

    def fill() -> None:
        if config.process_index == 0:
            status = os.statvfs(disk)
            Path(disk, "filler").write_bytes(bytes(status.f_bavail * status.f_frsize - int(room)))

    rows = Dataset.from_list(read_rows("accent_train.jsonl", 30))
    try:
        SPINTrainer(model, config, train_dataset=rows, callbacks=[AtStep(int(step), fill)]).train()
    except OSError as error:
        Path(folder, str(config.process_index)).write_text(f"{type(error).__name__}: {error}")
