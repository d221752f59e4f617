"""
Train with the RL Zoo's own command, to which this script adds one algorithm, ``iris``::

    python benchmarks/train.py --algo iris --env PongNoFrameskip-v4
    python benchmarks/train.py --algo iris --env MinAtar/Breakout-v1 --eval-freq 2000 --progress

All flags and all other algorithms are those of ``python -m rl_zoo3.train``. Without ``-conf``, the settings of ``iris`` come
from ``hyperparams/iris.yml`` beside this script. The zoo's evaluations are greedy but for Atari games.
"""

import sys
from pathlib import Path
from typing import Any

import minatar.gym
import optuna
import rl_zoo3
import rl_zoo3.exp_manager
import rl_zoo3.train
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that a settings file can name wrappers in `benchmarks`

import sb3_iris  # noqa: E402

CONFIG = ROOT / "benchmarks" / "hyperparams" / "iris.yml"


class ExperimentManager(rl_zoo3.exp_manager.ExperimentManager):
    """The zoo's manager with our settings file. For IRIS its ``env_kwargs`` hold in evaluations too, and beside given ones."""

    def __init__(self, args: Any, algo: str, *others: Any, config: str | None = None, **kwargs: Any) -> None:
        if algo == "iris" and config is None:
            config = str(CONFIG)
        super().__init__(args, algo, *others, config=config, **kwargs)  # type: ignore[misc]

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        if self.algo != "iris":
            return super().read_hyperparameters()
        given: dict[str, Any] = self.env_kwargs
        self.env_kwargs: dict[str, Any] = {}  # else the zoo would drop the file's, the frame skip among them
        hyperparams, saved_hyperparams = super().read_hyperparameters()
        self.env_kwargs = {**hyperparams.get("env_kwargs", {}), **given}
        self.eval_env_kwargs = {**self.env_kwargs, **(self._eval_env_kwargs_args or {})}
        hyperparams["env_kwargs"] = saved_hyperparams["env_kwargs"] = self.env_kwargs
        if given:
            self.args.env_kwargs = self.env_kwargs  # what the zoo's `enjoy` goes by
        return hyperparams, saved_hyperparams


def sample_iris_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    What ``--optimize`` tries for IRIS: rates, discounts and exploration. Sizes of networks and batches, and gradient steps,
    stay as the settings file has them, since more of them is slower rather than different. The zoo judges a trial at its last
    env step, so what IRIS would train after that is left out.

    :param trial: Optuna's trial.
    :param n_actions: Unused, for continuous actions.
    :param n_envs: Unused.
    :param additional_args: Unused, for hindsight replay.
    :return: Arguments of ``IRIS``.
    """
    params = convert_iris_params(
        {
            "learning_rate": trial.suggest_float("learning_rate", 3e-5, 3e-3, log=True),
            "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.003, 0.1, log=True),
            "one_minus_gae_lambda": trial.suggest_float("one_minus_gae_lambda", 0.01, 0.3, log=True),
            "ent_coef": trial.suggest_float("ent_coef", 1e-4, 3e-2, log=True),
            "imagination_horizon": trial.suggest_int("imagination_horizon", 6, 20),
            "max_grad_norm": trial.suggest_float("max_grad_norm", 0.5, 20.0, log=True),
            "exploration_rate": trial.suggest_float("exploration_rate", 0.001, 0.1, log=True),
            "temperature": trial.suggest_float("temperature", 0.5, 1.5),
        }
    )
    return {**params, "final_training_epochs": 0}


def convert_iris_params(params: dict[str, Any]) -> dict[str, Any]:
    """
    :param params: What was sampled, as Optuna stores it.
    :return: Arguments of ``IRIS``.
    """
    params = dict(params)
    for name in ("gamma", "gae_lambda"):
        params[name] = 1 - params.pop(f"one_minus_{name}")
    return params


def plug_in() -> None:
    """Make ``iris`` an algorithm of the installed zoo, and MinAtar's games known to it."""
    minatar.gym.register_envs()
    rl_zoo3.ALGOS["iris"] = sb3_iris.IRIS
    HYPERPARAMS_SAMPLER["iris"] = sample_iris_params
    HYPERPARAMS_CONVERTER["iris"] = convert_iris_params  # type: ignore[assignment]
    rl_zoo3.train.ExperimentManager = ExperimentManager  # type: ignore[misc]


if __name__ == "__main__":
    plug_in()
    rl_zoo3.train.train()
