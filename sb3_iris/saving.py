"""All of the algorithm that has to do with files."""

import io
import json
import pathlib
import zipfile
from typing import Any, BinaryIO, TypeVar

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.type_aliases import GymEnv

from sb3_iris import checkpoints
from sb3_iris.buffers import SequenceReplayBuffer
from sb3_iris.reference_checkpoint import read_reference_checkpoint
from sb3_iris.type_aliases import NETWORKS

SelfSavingAlgorithm = TypeVar("SelfSavingAlgorithm", bound="SavingAlgorithm")


class SavingAlgorithm(BaseAlgorithm):
    """The base of ``IRIS`` that saves and loads it. Only ``save`` and ``load`` use pickle, as SB3 does."""

    replay_buffer: SequenceReplayBuffer

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """
        Save the replay buffer, as an npz file whatever its suffix; no pickle is in it.

        :param path: File to write, ``.pkl`` is added if it has no suffix, or a file object.
        """
        file = open_path(path, "w", self.verbose, suffix="pkl")
        try:
            self.replay_buffer.save(file)
        finally:
            if file is not path:
                file.close()

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer; no code in the file can run. What is played next begins a new episode.

        :param path: File or file object from ``save_replay_buffer``.
        :param truncate_last_traj: SB3's, which is for other buffers than this one: the last episode is always cut off.
        :raises ValueError: If it is no replay buffer of this algorithm, or one of other images or number of environments.
        """
        file = open_path(path, "r", self.verbose, suffix="pkl")
        try:
            self.replay_buffer = self.replay_buffer.load(file)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(
                f"path={path!r} is not a file saved by save_replay_buffer, or of another model: {error}"
            ) from error
        finally:
            if file is not path:
                file.close()
        self._last_obs = None  # the steps to come do not follow those in the file

    def save_checkpoint(self, path: str | pathlib.Path) -> pathlib.Path:
        """
        Write all that the run needs to go on as if it had not stopped: networks, optimizers, replay buffer, counters,
        statistics and random streams. ``RunCheckpointCallback`` does so regularly.

        Frames that are in the folder already are not written again. The last two checkpoints stay there. Until its process
        ends or the model is gone, no other process can write to the folder.

        :param path: Folder of the run's checkpoints.
        :return: Folder of the new checkpoint, in ``path``.
        :raises ValueError: If there are checkpoints of another run in ``path``, or another process writes to it.
        :raises FloatingPointError: If the networks are spoilt by numbers that are not finite.
        """
        return checkpoints.save_checkpoint(self, path)  # type: ignore[arg-type]

    @classmethod
    def resume(
        cls: type[SelfSavingAlgorithm],
        path: str | pathlib.Path,
        env: GymEnv | str,
        device: th.device | str = "auto",
        **kwargs: Any,
    ) -> SelfSavingAlgorithm:
        """
        Take up a run from its last whole checkpoint; no code in the files can run. ``learn`` with the same arguments as
        before then does what was left to do. On a CPU its training phases give bit for bit what they would have given
        without the stop. ``env`` begins new episodes; those that were running count as truncated.

        :param path: Folder that ``save_checkpoint`` wrote to, or one of the checkpoints in it.
        :param env: The same environment as before.
        :param device: ``"auto"``, ``"cpu"``, ``"cuda"`` ...
        :param kwargs: Arguments of the constructor to change. Functions and classes that were given to it, such as a
            learning rate schedule or a policy class, are not in the files and must be given again.
        :return: The model.
        :raises ValueError: If there is no whole checkpoint, it does not fit ``env``, or another process writes to ``path``.
        """
        return checkpoints.resume(cls, path, env, device, kwargs)  # type: ignore[arg-type, return-value]

    def set_parameters(self, *args: Any, **kwargs: Any) -> None:
        """As in ``BaseAlgorithm``."""
        super().set_parameters(*args, **kwargs)
        self.replay_buffer.forget_tokens()

    def _excluded_save_params(self) -> list[str]:
        of_this_process = [
            "_autocast_dtype",
            "_compiled",
            "_imagination_graph",
            "_perceptual_loss",
            "_progress_bar",
            "_checkpoint_locks",
        ]
        of_this_call = ["_learn_progress", "_resumed", "_run_checkpoints", "_held_out", "_training_warnings", "_exploration"]
        return [*super()._excluded_save_params(), *of_this_process, *of_this_call]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", *(f"policy.{name}_optimizer" for name in NETWORKS)], []

    @classmethod
    def load(  # type: ignore[override]
        cls: type[SelfSavingAlgorithm],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfSavingAlgorithm:
        """
        Load a model saved with ``save``; see ``BaseAlgorithm.load``. Parts of such a file are pickles, which can run code:
        load only files you trust.

        :raises ValueError: If the file was not saved by this algorithm, ``kwargs`` has a name that it does not know, or
            ``sequence_length`` is not the model's.
        """
        file = open_path(path, "r", verbose=0, suffix="zip")
        try:
            archive = zipfile.ZipFile(file) if zipfile.is_zipfile(file) else None
            names = [] if archive is None else archive.namelist()
            data = archive.read("data") if archive is not None and "data" in names and (kwargs or custom_objects) else b"{}"
            file.seek(0)
        finally:
            if file is not path:
                file.close()
        if not {f"policy.{name}_optimizer.pth" for name in NETWORKS} <= set(names):
            raise ValueError(
                f"path={path!r} was not saved by IRIS: its optimizers are not in it. Load it with the class that saved it, "
                "or with IRIS.load_reference_checkpoint if it comes from the authors' program"
            )
        saved = json.loads(data)
        known = checkpoints.argument_names(cls)  # type: ignore[arg-type]
        unknown = sorted(kwargs.keys() - saved.keys() - {*known})
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: {cls.__name__} has no such argument")
        if "stats_window_size" in kwargs:
            kwargs["_stats_window_size"] = kwargs.pop("stats_window_size")  # SB3's attribute
        custom_objects = {**(custom_objects or {})}
        length = saved.get("sequence_length")  # which the world model is made for
        for changes in (kwargs, custom_objects):
            if changes.get("sequence_length", length) != length:
                raise ValueError(f"sequence_length={changes['sequence_length']} cannot be changed: it is {length}")
            if "policy_kwargs" not in changes:
                continue
            given = tuples_to_lists(changes["policy_kwargs"] or {})
            if given.get("robust_tokenizer", "auto") == "auto":  # it was settled when the model was made
                given.pop("robust_tokenizer", None)
                settled = saved.get("policy_kwargs", {})
                given |= {name: value for name, value in settled.items() if name == "robust_tokenizer"}
            changes["policy_kwargs"] = given
        return super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)

    @classmethod
    def load_reference_checkpoint(
        cls: type[SelfSavingAlgorithm], path: str | pathlib.Path | BinaryIO, env: GymEnv | str, **kwargs: Any
    ) -> SelfSavingAlgorithm:
        """
        Make a model from a checkpoint of the paper's authors' program, to play with or to train on.

        Sizes are read off the file. Attention heads leave no trace in it: if there are other than the paper's four, give
        ``policy_kwargs=dict(n_heads=...)``.

        :param path: Their file, a PyTorch state dict; it is read without running any code in it.
        :param env: Environment with the actions that the checkpoint was trained with, see ``make_atari_env``.
        :param kwargs: Further arguments of the constructor.
        :return: The model.
        :raises ValueError: If the file is no such checkpoint, or does not fit the environment or ``kwargs``.
        """
        checkpoint = read_reference_checkpoint(path)
        policy_kwargs = {
            "actor_critic_input": "frames",
            **checkpoint.policy_kwargs,
            **(kwargs.pop("policy_kwargs", None) or {}),
        }
        if policy_kwargs.get("robust_tokenizer", "auto") == "auto":
            policy_kwargs["robust_tokenizer"] = False  # as their networks are
        kwargs = {"policy": "CnnPolicy", "sequence_length": checkpoint.sequence_length, **kwargs}
        model = cls(env=env, policy_kwargs=policy_kwargs, **kwargs)
        if model.replay_buffer.n_actions != checkpoint.n_actions:
            raise ValueError(
                f"path={path!r} is an agent of {checkpoint.n_actions} actions, but env has {model.action_space}: "
                "give the environment that it was trained on"
            )
        try:
            model.policy.load_state_dict(checkpoint.state_dict)
        except RuntimeError as error:
            raise ValueError(f"path={path!r} does not fit env or policy_kwargs={policy_kwargs}: {error}") from error
        return model


def tuples_to_lists(policy_kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    :param policy_kwargs: Arguments for the policy.
    :return: The same with lists in place of tuples: that is how saved ones come back, and the two should compare equal.
    :raises ValueError: If they are no dict.
    """
    if not isinstance(policy_kwargs, dict):
        raise ValueError(f"policy_kwargs={policy_kwargs!r} must be a dict, for instance dict(image_size=64), or None")
    return {name: list(value) if isinstance(value, tuple) else value for name, value in policy_kwargs.items()}
