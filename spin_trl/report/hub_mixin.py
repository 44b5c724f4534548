"""`HubTrainer`: an IterativeTrainer's way to the hub, and its model card. Knows nothing of opponents and pairs."""

from pathlib import Path

from huggingface_hub import CommitInfo

from ..iterative_trainer import IterativeTrainer
from ..play.setup import SelfPlaySetup
from ..processes.ranks import on_main_process
from ..run_directory.store import IterationStore
from .hub import IterationPusher, push
from .model_card import self_play_section, with_section, without_hub


class HubTrainer(IterativeTrainer):
    """
    Differs from [`IterativeTrainer`] in what it pushes, and when: the model that an iteration made, as soon as it has
    been evaluated, and nothing else of the run directory.
    """

    store: IterationStore
    self_play_setup: SelfPlaySetup

    def create_model_card(self, *args, **kwargs) -> None:
        """As [`~trl.DPOTrainer`]'s, with scores and answers by iteration and the settings. Needs no hub."""
        super().create_model_card(*args, **kwargs)
        self._in_step(self._complete_card)

    def _complete_card(self) -> None:
        if self.is_world_process_zero():
            self._write_card()

    def _write_card(self, last: int | None = None) -> str:
        """Add to the card what the iterations up to `last` were; by default all."""
        path = Path(self.args.output_dir, "README.md")
        card = without_hub(path.read_text(), self.self_play_setup.model_name, self.args.output_dir)
        card = with_section(card, self_play_section(self.store.all_metrics(), self.args, last))
        path.write_text(card)
        return card

    def _card_of(self, iteration: int) -> str:
        """The model card of what an iteration made."""
        super().create_model_card(model_name=self.hub_model_id.split("/")[-1])
        return self._write_card(iteration)

    def _begin_pushes(self) -> None:
        if self.args.push_to_hub and self.is_world_process_zero():
            self.pusher = IterationPusher(self.store, self.args, self.hub_model_id, self._card_of)
        if self.args.push_to_hub:
            on_main_process(lambda: self.pusher.forget_from(self.start.next_iteration))

    def push_results(self, num_iterations: int, is_end: bool = False) -> None:
        """Push what the hub lacks of the models that so many iterations made. A failure is a warning."""
        if self.args.push_to_hub:
            on_main_process(lambda: self.pusher.push_results(num_iterations, is_end))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Trainer would push the run directory. An iteration's model is pushed when it has been evaluated."""

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs,
    ) -> CommitInfo | None:
        """
        As [`~transformers.Trainer.push_to_hub`], but only the model and its card: nothing else of the run directory.
        It always waits for the push.
        """
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**{"model_name": self.hub_model_id.split("/")[-1], **kwargs})
        card = Path(self.args.output_dir, "README.md").read_text()
        folder = Path(self.args.output_dir)
        return push(folder, card, self.hub_model_id, revision or self.args.hub_revision, commit_message, token)
