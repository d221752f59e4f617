"""Regular checkpoints of whole runs, as a callback."""

import os
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stable_baselines3.common.callbacks import BaseCallback

from sb3_iris.checkpoint_folder import find_checkpoints
from sb3_iris.checkpoints import refuse_checkpoints_of_another_run, save_checkpoint
from sb3_iris.validation import check_positive, refuse_events

if TYPE_CHECKING:
    from sb3_iris.iris import IRIS


class RunCheckpointCallback(BaseCallback):
    """
    Writes checkpoints from which ``IRIS.resume`` goes on as if the run had not stopped; a sibling of SB3's
    ``CheckpointCallback``, which saves what one needs to play or to start anew.

    Ctrl-C and SIGTERM end the run: a write under way is finished, during a collection a last checkpoint is written, as soon as
    the other callbacks are done with the step (a second Ctrl-C does not wait for it), and where the last one lies is said. So
    it is if the environment fails. A disk that is full costs a checkpoint, not the run: it is warned of, and the next one is
    tried in its time.

    :param save_freq: Env steps (over all environments) between two checkpoints, which are written at ends of collections.
        After the last collection a training phase counts like the steps of an epoch. At the end of ``learn`` there is one too.
    :param save_path: Folder of the checkpoints of this run alone.
    :param verbose: 0: silent, 1: say when a checkpoint is written.
    :raises ValueError: At the beginning of ``learn``, if there are checkpoints of another run in the folder, or if this is
        part of a callback such as SB3's ``EveryNTimesteps``.
    """

    model: "IRIS"  # type: ignore[assignment]

    def __init__(self, save_freq: int, save_path: str | os.PathLike, verbose: int = 0) -> None:
        super().__init__(verbose)
        check_positive(save_freq=save_freq)
        self.save_freq = save_freq
        self.save_path = Path(save_path)
        self._saved_at = 0
        self._position: tuple[int, int] | None = None  # env steps and epochs of the last checkpoint of this call of `learn`
        self._in_collection = False
        self._received: int | None = None  # a signal that the next step attends to
        self._handlers: dict[int, Any] = {}

    def _init_callback(self) -> None:
        refuse_checkpoints_of_another_run(self.model, self.save_path.resolve())
        self.model._run_checkpoints.append(self)

    def _on_training_start(self) -> None:
        refuse_events(self)
        self._position = self._received = None
        self._in_collection = False
        self._saved_at = self._time()
        if threading.current_thread() is threading.main_thread():  # no other thread gets signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.getsignal(number)
                signal.signal(number, self._on_signal)

    def _time(self) -> int:
        """Env steps and, after those, as many for each final training phase as an epoch has."""
        at = self.model._learn_progress
        assert at is not None
        return self.model.num_timesteps + (at.final_epochs - at.final_epochs_left) * self.model.train_freq

    def _on_rollout_start(self) -> None:
        self._in_collection = True

    def _on_step(self) -> bool:
        self._stop_if_asked()
        return True

    def _on_rollout_end(self) -> None:
        self._in_collection = False
        self._stop_if_asked()
        self._save_if_due()

    def on_epoch_end(self) -> None:
        """After each training phase; the final ones follow no collection."""
        at = self.model._learn_progress
        assert at is not None
        if at.final_epochs_left < at.final_epochs:
            self._save_if_due()

    def on_failure(self) -> None:
        """Something has raised an error, in a collection perhaps: what was played before is not lost."""
        if self._in_collection:
            self._stop_if_asked()  # the workers of a SubprocVecEnv get Ctrl-C as well, and answer no more
            self._in_collection = False
            self._save()
            self._say("Failed")

    def _on_training_end(self) -> None:
        self._save()

    def _save_if_due(self) -> None:
        if self._time() - self._saved_at >= self.save_freq:
            self._saved_at = self._time()
            self._save()

    def _save(self) -> None:
        at = self.model._learn_progress
        assert at is not None
        position = (self.model.num_timesteps, at.epochs)
        if self._position == position:
            return
        try:
            checkpoint = save_checkpoint(self.model, self.save_path)
        except OSError as error:
            warnings.warn(f"no checkpoint could be written to {self.save_path} ({error}). {self._where()}")
            return
        self._position = position
        if self.verbose >= 1:
            print(f"Checkpoint at {self.model.num_timesteps} steps: {checkpoint}")

    def _where(self) -> str:
        newest = next(iter(find_checkpoints(self.save_path)), None)
        return f"The last checkpoint is {newest}" if newest is not None else f"There is no checkpoint in {self.save_path} yet"

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._in_collection and (self._received is None or number == signal.SIGTERM):
            # A moment, and there is a checkpoint of this very step. A job that ends may be told so by several
            self._received = self._received or number
        else:
            self._stop(number)

    def _stop_if_asked(self) -> None:
        if self._received is not None:
            self._save()
            self._stop(self._received)

    def _say(self, what: str) -> None:
        print(f"{what}. {self._where()}; IRIS.resume({str(self.save_path)!r}, env) goes on", file=sys.stderr, flush=True)

    def _stop(self, number: int) -> None:
        self._say("Stopped")
        self.leave()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)  # what shells call the end by a signal

    def leave(self) -> None:
        """Give the signals back, at the end of ``learn``, however it ends."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._handlers = {}
        self._received = None
        self._in_collection = False
