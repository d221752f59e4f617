"""
Trains IRIS on a small game for some minutes and shows what it learned: ``make demo``.

The game is MinAtar's Breakout (https://github.com/kenjyoung/MinAtar); the settings are in ``hyperparams/iris.yml``. Under
``runs/demo-SEED/`` it leaves the model, a TensorBoard log, a learning curve and a GIF of real frames, their reconstructions
and what the world model imagines from the first of them.
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that `benchmarks` is found when this is run as a script

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import yaml
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from benchmarks.atari100k import with_schedules
from benchmarks.compare import RandomPlayer
from benchmarks.minatar_env import make_minatar
from sb3_iris import IRIS
from sb3_iris.visualization import compare, comparison_video, reconstruction_grid, with_text, write_video

ROOT = Path(__file__).resolve().parent.parent
GAME = "Breakout"
N_EVAL_EPISODES = 50


def returns_of(player: IRIS | RandomPlayer, env: VecEnv) -> np.ndarray:
    """
    :param player: Who plays.
    :param env: Environments with a ``Monitor`` each.
    :return: Returns of ``N_EVAL_EPISODES`` episodes, actions sampled.
    """
    returns, _ = evaluate_policy(player, env, N_EVAL_EPISODES, deterministic=False, return_episode_rewards=True)  # type: ignore[arg-type]
    return np.array(returns)


def mean_and_error(returns: np.ndarray) -> str:
    """
    :param returns: Returns of episodes.
    :return: Their mean and its standard error.
    """
    return f"{returns.mean():.2f} +- {returns.std(ddof=1) / len(returns) ** 0.5:.2f}"


def plot_learning_curve(folder: Path, random_mean: float) -> None:
    """
    :param folder: Where ``EvalCallback`` left its file; the picture is put there too.
    :param random_mean: Mean return of random play.
    """
    evaluations = np.load(folder / "evaluations.npz")
    steps, returns = evaluations["timesteps"], evaluations["results"]
    means, errors = returns.mean(1), returns.std(1, ddof=1) / np.sqrt(returns.shape[1])
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.plot(steps, means, label="IRIS")
    axes.fill_between(steps, means - errors, means + errors, alpha=0.3)
    axes.axhline(random_mean, color="gray", linestyle="--", label="random play")
    axes.set(xlabel="env steps", ylabel="return", title=f"MinAtar {GAME}: mean and standard error")
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / "learning_curve.png", dpi=120)


def write_gif(model: IRIS, folder: Path, n_steps: int = 20) -> None:
    """
    The reconstructions of real frames, these frames, and the imagined game that starts with the first of them.

    :param model: The trained model.
    :param folder: Where the GIF is put.
    :param n_steps: Longest game to show.
    """
    samples = model.replay_buffer.sample(64, n_steps, np.random.default_rng(0))
    longest = int(samples.mask.sum(1).argmax())
    n_frames = int(samples.mask[longest].sum())
    observations = samples.observations[longest, :n_frames].cpu().numpy()
    actions, rewards = (part[longest, : n_frames - 1].cpu().numpy() for part in (samples.actions, samples.rewards))
    dream = comparison_video(compare(model, observations, actions, rewards))
    reconstructions = [np.split(reconstruction_grid(model, observation[None]), 3)[1] for observation in observations]
    frames = [
        np.concatenate([with_text(left, ["reconstruction"]), right], axis=1)
        for left, right in zip(reconstructions, dream, strict=True)
    ]
    write_video(folder / "demo.gif", np.stack(frames), fps=3)


def main() -> None:
    """Train, evaluate, and write everything under ``runs/``."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n-timesteps", type=int, help="env steps, if not those of the settings")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning, module="gymnasium")  # MinAtar's renderer gives floats

    start = time.time()
    settings = yaml.safe_load((ROOT / "benchmarks" / "hyperparams" / "iris.yml").read_text())[f"MinAtar/{GAME}-v1"]
    n_envs, n_timesteps = settings.pop("n_envs"), args.n_timesteps or settings.pop("n_timesteps")
    settings = {name: value for name, value in settings.items() if name not in ("env_wrapper", "env_kwargs", "n_timesteps")}
    settings = with_schedules(settings)
    folder = ROOT / "runs" / f"demo-{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)

    env = make_vec_env(lambda: make_minatar(GAME), n_envs=n_envs, seed=args.seed)
    eval_env = make_vec_env(lambda: make_minatar(GAME), n_envs=10, seed=args.seed + 1_000)
    before = returns_of(RandomPlayer(eval_env.action_space, args.seed), eval_env)
    print(f"MinAtar {GAME}, random play: return {before.mean():.2f} over {len(before)} episodes")

    model = IRIS(env=env, seed=args.seed, tensorboard_log=str(folder), **settings)
    evaluation = EvalCallback(
        eval_env,
        n_eval_episodes=20,
        eval_freq=max(n_timesteps // 10 // n_envs, 1),
        log_path=str(folder),
        deterministic=False,
        verbose=0,
    )
    model.learn(n_timesteps, callback=evaluation, progress_bar=True)
    model.save(folder / "iris_demo", include=["replay_buffer"])  # the learned game starts from its frames

    returns = returns_of(model, eval_env)
    plot_learning_curve(folder, before.mean())
    write_gif(model, folder)
    print(
        f"random play: return {mean_and_error(before)}\n"
        f"IRIS after {model.num_timesteps} steps: return {mean_and_error(returns)} "
        f"(mean and standard error over {len(returns)} episodes)\n"
        f"{(time.time() - start) / 60:.1f} minutes. See {folder.relative_to(ROOT)}/: "
        f"{', '.join(sorted(path.name for path in folder.iterdir()))}"
    )


if __name__ == "__main__":
    main()
