"""Watches what training logs: numbers that are not finite stop it, signs that nothing is learned any more are warned of."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch as th
from gymnasium import spaces

from sb3_iris.type_aliases import Logs

ONE_CODE = 1.01  # perplexity of a codebook of which one entry stands for all patches of all frames
NO_ENTROPY = 1e-3  # of a policy, as a share of that of uniform play


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


class CollapseWarnings:
    """Warns once of each way in which training can go on without getting anywhere."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def look(self, logged: Mapping[str, Any], action_space: spaces.Discrete) -> None:
        """
        :param logged: What training phases have logged.
        :param action_space: The policy's actions.
        """
        perplexity = logged.get("tokenizer/codebook_perplexity", math.inf)
        if perplexity < ONE_CODE:
            self._warn_once(
                "codebook",
                f"The codebook is dead: the tokenizer uses one code for everything (perplexity {perplexity:.3f}), so all "
                "frames look the same to the world model and the policy. It may recover in the first epochs; if not, try "
                "policy_kwargs=dict(robust_tokenizer=True), which revives unused codes, or a smaller learning_rate",
            )
        entropy = logged.get("actor_critic/entropy", math.inf)
        if action_space.n > 1 and entropy < NO_ENTROPY * math.log(action_space.n):
            self._warn_once(
                "policy",
                f"The policy has no entropy left ({entropy:.5f} nats): it always takes the same action in a situation, so it "
                "finds nothing new and its gradient vanishes. Raise ent_coef, or lower learning_rate",
            )

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(message)
