"""Watches training: numbers that are not finite stop it, signs that it gets nowhere, or too slowly, are warned of."""

import math
import os
import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from torch import nn

from sb3_iris.projection import projected_days
from sb3_iris.tokenizer import PatchTokenizer
from sb3_iris.type_aliases import NETWORKS, Logs

if TYPE_CHECKING:
    from sb3_iris.checkpoints import LearnProgress
    from sb3_iris.iris import IRIS

ONE_CODE = 1.01  # perplexity of a codebook of which one entry stands for all patches of all frames
NO_POSITION = 0.01  # share of positions whose token varies over a batch, which one position that varies is well above
PHASES = 3  # in a row with a sign of a collapse of the tokenizer, which may pass in the first ones
NO_ENTROPY = 1e-3  # of a policy, as a share of that of uniform play
BUSY = 0.8  # share of their time that threads work or spin, which is near 1 where they have cores of their own
LONG_ENOUGH = 5.0  # seconds of a training phase, to tell
MANY_DAYS = 2


def check_finite(network: str, history: list[Logs], num_timesteps: int) -> None:
    """
    To be called once per training phase of a network: it waits for the device.

    :param network: Name of the network.
    :param history: Loss terms and gradient norm of each gradient step.
    :param num_timesteps: Env steps so far.
    :raises FloatingPointError: If one of them is not finite.
    """
    names = sorted(history[0], key=lambda name: (name == "grad_norm", name == "loss"))  # the sum and its gradient last
    values = th.stack([th.stack([logs[name] for name in names]) for logs in history])  # (gradient steps, terms)
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        step, term = bad[0].tolist()
        raise FloatingPointError(
            f"{network}: {names[term]} is {values[step, term].item()} at gradient step {step + 1} of {len(history)} in the "
            f"training phase after {num_timesteps} env steps. The network is spoilt: go on from the last checkpoint, with a "
            "smaller learning_rate or max_grad_norm"
        )


class TrainingWarnings:
    """Warns once of each way in which training can go on without getting anywhere, or far too slowly."""

    def __init__(self) -> None:
        self._warned: set[str] = set()
        self._phases = 0  # of the tokenizer, in a row, in which all frames looked the same
        self._postponed: list[str] = []

    def postpone(self, message: str) -> None:
        """
        :param message: A warning that can wait for the training it is about, as a model may be loaded to play only.
        """
        self._postponed.append(message)

    def begin(self, model: "IRIS", at: "LearnProgress") -> None:
        """
        To be called before the first step of a call of ``learn``.

        :param model: The model.
        :param at: Where the call is.
        """
        for message in self._postponed:
            warnings.warn(message, stacklevel=3)  # where `learn` was called
        self._postponed.clear()
        self._look_at_schedule(model, at)
        if model.device.type == "cpu" and "days" not in self._warned and (days := projected_days(model)) > MANY_DAYS:
            self._warn_once(
                "days",
                f"A run of the paper's length, 100,000 steps, would take about {days:.0f} days on this CPU at these settings. "
                "Use a GPU, or smaller networks and fewer gradient steps, as the README does under 'On a laptop'.",
            )

    def look(self, network: str, logged: Mapping[str, Any], model: "IRIS") -> None:
        """
        To be called after each training phase of a network.

        :param network: Its name.
        :param logged: What it has logged.
        :param model: The model.
        """
        if network == "world_model":
            self._look_at_rewards(model)
        elif network == "tokenizer":
            look = self._look_at_patches if "tokenizer/n_patches" in logged else self._look_at_tokenizer
            look(logged, model)
        elif network == "actor_critic":
            self._look_at_policy(logged, model)

    def look_at_threads(self, seconds: float, cpu_seconds: float) -> None:
        """
        To be called after each training phase of a network on a CPU. On Linux PyTorch's threads wait by spinning: one that has
        no core holds all others up, and small networks then take many times as long.

        :param seconds: What the phase took.
        :param cpu_seconds: What the process had of all cores together in that time.
        """
        n_threads = th.get_num_threads()
        spin = sys.platform == "linux" and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
        if spin and seconds > LONG_ENOUGH and n_threads > 1 and cpu_seconds < BUSY * n_threads * seconds:
            n_cores = cpu_seconds / seconds
            fewer = max(int(n_cores + 0.1), 1)
            self._warn_once(
                "threads",
                f"PyTorch has {n_threads} threads here, but only {n_cores:.1f} cores to itself: other programs keep the rest "
                "busy, or a limit does. As its threads wait for each other, training can take many times as long as with "
                f"fewer: call torch.set_num_threads({fewer}), or start with OMP_NUM_THREADS={fewer} in the environment",
            )

    def _look_at_schedule(self, model: "IRIS", at: "LearnProgress") -> None:
        n_steps = at.last_step - at.first_step
        if n_steps <= 0:
            return
        last_step = at.first_step + math.ceil(n_steps / model.n_envs) * model.n_envs
        wanted = [name for name in NETWORKS if getattr(model, f"{name}_gradient_steps") > 0]
        starts = {name: getattr(model, f"{name}_learning_starts") for name in wanted}
        late = [name for name in wanted if starts[name] > last_step]
        if late:
            listed = ", ".join(f"{name}_learning_starts={starts[name]}" for name in late)
            self._warn_once(
                "late",
                f"This call of learn ends at step {last_step}, before {listed}: {', '.join(late)} will not be trained in it. "
                "Give it more steps, or let training start earlier",
            )
        trains_at_once = any(model._trains(name, at.first_step) for name in NETWORKS)
        if at.first_step > 0 and trains_at_once and model.replay_buffer.size() == 0:
            self._warn_once(
                "buffer",
                f"The replay buffer is empty, though {at.first_step} steps were taken before: from this call's first "
                "collection on networks are trained on what it holds, and soon know nothing else. Keep the buffer, too, by "
                "save_replay_buffer() and load_replay_buffer(), or by save_checkpoint() and resume()",
            )
        n_epochs = math.ceil(n_steps / model.train_freq)
        if at.final_epochs > n_epochs and any(model._trains(name, last_step) for name in NETWORKS):
            self._warn_once(
                "final",
                f"final_training_epochs={at.final_epochs} training phases follow the last step of this call of learn, more "
                f"than the {n_epochs} of its {n_steps} steps. For a short run, or several calls in a row "
                "(reset_num_timesteps=False), give fewer",
            )

    def _look_at_rewards(self, model: "IRIS") -> None:
        if "rewards" in self._warned:
            return
        rewards = model.replay_buffer.rewards
        rewards = rewards[rewards != 0]
        if not len(rewards):
            return
        least, most = rewards[np.abs(rewards).argmin()], rewards[np.abs(rewards).argmax()]
        # In games with scores, whole numbers of one sign, that is as usual
        shaped = rewards.min() < 0 < rewards.max() or bool((rewards % 1).any())
        if shaped and abs(most) > 2 * abs(least):
            self._warn_once(
                "rewards",
                f"env gives rewards of different size, such as {least:g} and {most:g}, but IRIS learns their signs only, as "
                "in the paper's runs: all that are above 0 count the same, and all below. Give none for what matters little, "
                "such as the cost of a step",
            )

    def _look_at_patches(self, logged: Mapping[str, Any], model: "IRIS") -> None:
        size = model.policy.tokenizer.codebook_size
        if logged["tokenizer/n_patches"] >= size and logged["tokenizer/loss"] > 0:
            self._warn_once(
                "patches",
                f"The codebook is full: the game is drawn from more than codebook_size={size} patches, and new ones look like "
                f"the nearest of those (tokenizer/moving_error {logged['tokenizer/moving_error']:.3f}). Start anew with a "
                "larger codebook_size, or with patch_tokenizer=False if the images are no mosaic of tiles",
            )

    def _look_at_tokenizer(self, logged: Mapping[str, Any], model: "IRIS") -> None:
        perplexity = logged["tokenizer/codebook_perplexity"]
        varying, moving = logged["tokenizer/varying_positions"], logged["tokenizer/moving_error"]
        self._phases = self._phases + 1 if perplexity < ONE_CODE or (varying < NO_POSITION and moving > 0) else 0
        if self._phases >= PHASES:
            what = f"The codebook is dead: the tokenizer uses one code for everything (perplexity {perplexity:.3f})"
            if perplexity >= ONE_CODE:
                what = (
                    "The tokenizer tells no frames apart: it gives each position of a frame the same code in all frames of a "
                    f"batch (varying_positions {varying:.3f}), however many codes that are (perplexity {perplexity:.1f})"
                )
            way_out = "a smaller learning_rate or a larger tokenizer_batch_size"
            if not model.policy.tokenizer.robust:
                way_out = f"policy_kwargs=dict(robust_tokenizer=True), which is made against that, or {way_out}"
            self._warn_once(
                "codebook",
                f"{what}, in its last {PHASES} training phases. So all frames look the same to the world model and the "
                f"policy, and neither can learn. If that does not change soon, start anew with {way_out}",
            )

    def _look_at_policy(self, logged: Mapping[str, Any], model: "IRIS") -> None:
        if noise := untrained(model):
            self._warn_once(
                "noise",
                f"The actor-critic is trained in a game that is noise, as the {' and the '.join(noise)} had no training: let "
                "them start earlier, by tokenizer_learning_starts and world_model_learning_starts",
            )
        entropy, n_actions = logged["actor_critic/entropy"], model.action_space.n
        if n_actions > 1 and entropy < NO_ENTROPY * math.log(n_actions):
            self._warn_once(
                "policy",
                f"The policy has no entropy left ({entropy:.5f} nats): it always takes the same action in a situation, so it "
                "finds nothing new and its gradient vanishes. Unless the game is solved, start anew with a larger ent_coef or "
                "a smaller learning_rate",
            )

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(message)


def untrained(model: "IRIS") -> list[str]:
    """
    :param model: A model.
    :return: What of that which makes its learned game has had no training: a network by whether all biases that start from
        zero still are there, a ``PatchTokenizer`` by whether it knows a patch.
    """
    names = []
    for name, network in (("tokenizer", model.policy.tokenizer), ("world model", model.policy.world_model)):
        if isinstance(network, PatchTokenizer):
            trained = bool(network.quantizer.n_patches)
        else:
            norms = [module for module in network.modules() if isinstance(module, nn.LayerNorm | nn.GroupNorm)]
            trained = not norms or any(bool(norm.bias.any()) for norm in norms)  # without norms there is nothing to tell by
        if not trained:
            names.append(name)
    return names
