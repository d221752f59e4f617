"""IRIS as a Stable-Baselines3 algorithm: it plays, and it trains what plays."""

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import safe_mean
from stable_baselines3.common.vec_env import VecEnv
from torch import nn
from torch._compile import _disable_dynamo
from tqdm import tqdm

from sb3_iris import (
    atari_wrappers,  # noqa: F401  (registers ale-py's games, so that their names can be given as env)
    imagination_cpu,
)
from sb3_iris.actor_critic import actor_critic_loss, sample_categorical
from sb3_iris.buffers import SequenceReplayBuffer, Starts
from sb3_iris.checkpoint_callback import RunCheckpointCallback
from sb3_iris.checkpoints import FolderLock, LearnProgress
from sb3_iris.compilation import Compiled, compiles
from sb3_iris.exploration import Exploration
from sb3_iris.frame_cache import TOGETHER
from sb3_iris.held_out import HeldOut
from sb3_iris.imagination import ImaginedGame, imagine
from sb3_iris.imagination_graph import ImaginationGraph
from sb3_iris.mixed_precision import autocast_dtype
from sb3_iris.perceptual_loss import set_up_perceptual_loss
from sb3_iris.policies import CnnLstmPolicy
from sb3_iris.saving import SavingAlgorithm, tuples_to_lists
from sb3_iris.training_health import TrainingWarnings, check_finite
from sb3_iris.type_aliases import NETWORKS, Logs, LSTMState, Observe, PerceptualLoss
from sb3_iris.validation import check_hyperparameters, check_learn_arguments, check_policy_kwargs, check_spaces
from sb3_iris.world_model_env import WorldModelVecEnv

SelfIRIS = TypeVar("SelfIRIS", bound="IRIS")


class IRIS(SavingAlgorithm):
    """
    IRIS: "Transformers are Sample-Efficient World Models" (ICLR 2023), https://arxiv.org/abs/2209.00588

    Plays ``train_freq`` steps, then trains the tokenizer, the world model and, in imagination alone, the actor-critic; that
    pair is an epoch. After the last step of every call of ``learn`` ``final_training_epochs`` more training phases follow, of
    which callbacks hear nothing. Of rewards the sign alone is learned, as in the paper's runs: all that are above 0 count the
    same, and all below.

    Every default is the paper's, except where that is known to fail: see ``robust_tokenizer`` and ``actor_critic_input`` of
    ``CnnLstmPolicy``; and ``amp``.

    Beside SB3's ``rollout/``, ``time/`` and ``train/`` it logs:

    - ``tokenizer/``, ``world_model/`` and ``actor_critic/``, as means over a training phase: every term of the loss and the
      gradient's norm (a ``patch_tokenizer`` has none).
    - ``tokenizer/``: ``codebook_usage`` (share of codes used in a batch) and ``codebook_perplexity``; ``varying_positions``
      (share of a frame's positions whose code is not the same in the whole batch; near 0 all frames look alike);
      ``moving_error`` (of reconstructions, where pixels move); ``n_patches`` (how many a ``patch_tokenizer`` knows).
    - ``world_model/``: ``token_``, ``reward_`` and ``end_accuracy``, one step ahead.
    - ``actor_critic/``: entropy, value and imagined return; ``imagined_reward``, the sum of reward signs over the imagined
      steps up to an end; ``real_reward``, the same of the real steps of the last 10 epochs; ``imagined_ends``, the share of
      imagined games with an end.
    - ``held_out/``: the world model on the steps just collected, before it is trained on them. ``token_``, ``reward_`` and
      ``end_accuracy`` compare with those of ``world_model/``; ``reward_`` and ``end_precision`` and ``_recall`` are those of
      rewards that are not 0 and of ends, sampled as in imagination, over the last 10 epochs. With ``imagined_`` in front the
      same at the last of ``horizon`` steps imagined from a real frame under the real actions, 20 or what the episodes are long
      enough for. ``changed_token_accuracy``, one step ahead, is that of tokens which are not as in the frame before. What is
      undefined is left out. Training stays as it is.
    - ``time/``: seconds of collection, of each network's training and of ``held_out``.

    Warnings say, once, when one of the networks is sick, or settings, rewards or threads stand in its way, and what to do.

    :param policy: ``"CnnPolicy"`` or a subclass of ``CnnLstmPolicy``.
    :param env: Environment with uint8 images and Discrete actions, or its name if it is registered with Gymnasium.
    :param learning_rate: Learning rate of all three optimizers, or a schedule: a function of the remaining progress, which
        falls from 1 at the start of ``learn`` (less with ``reset_num_timesteps=False``, by the share of steps already taken)
        to 0 at the end of its last training phase.
    :param buffer_size: Most steps to keep for replay, over all environments.
    :param train_freq: Env steps collected before each training phase.
    :param tokenizer_batch_size: Frames in a batch.
    :param tokenizer_gradient_steps: Gradient steps of the tokenizer per training phase.
    :param tokenizer_learning_starts: Env steps before the tokenizer is trained.
    :param world_model_batch_size: Segments in a batch.
    :param world_model_gradient_steps: Gradient steps of the world model per training phase.
    :param world_model_learning_starts: Env steps before the world model is trained.
    :param world_model_weight_decay: Weight decay of the world model's ``Linear`` weights.
    :param actor_critic_batch_size: Imagined trajectories in a batch.
    :param actor_critic_gradient_steps: Gradient steps of the actor-critic per training phase.
    :param actor_critic_learning_starts: Env steps before the actor-critic is trained.
    :param sequence_length: Steps in the world model's context and training segments, at least 2.
    :param imagination_horizon: Imagined steps per trajectory, at least 2.
    :param burn_in: Real steps before an imagined trajectory or a collection that warm up the LSTM, at least 0.
    :param gamma: Discount in [0, 1].
    :param gae_lambda: The lambda of the lambda-returns, in [0, 1].
    :param ent_coef: Weight of the entropy bonus, at least 0.
    :param max_grad_norm: Norm at which each network's gradient is clipped.
    :param exploration_rate: Probability of a uniformly random action in collection, in [0, 1].
    :param temperature: Temperature of the policy's sampling in collection; 0 takes the most likely action.
    :param eval_temperature: Temperature of the sampling of ``predict(..., deterministic=False)``.
    :param final_training_epochs: Training phases after the last env step of a call of ``learn``, none of them where no network
        has reached its start. For several calls in a row (``reset_num_timesteps=False``) only the last one may want them.
    :param perceptual_loss: ``"auto"``: LPIPS if the package ``lpips`` and its weights are there; ``"lpips"``: LPIPS or an
        error; None: none; or a function of frames and reconstructions, (B, C, H, W) on the [-1, 1] scale, whose mean is added.
        Without one the tokenizer is trained in another way, unless ``policy_kwargs`` have ``robust_tokenizer=False``.
    :param stats_window_size: Episodes over which ``rollout/`` figures are averaged.
    :param tensorboard_log: Folder of the TensorBoard logs; None for none.
    :param policy_kwargs: Sizes of the networks, see ``CnnLstmPolicy``.
    :param verbose: 0: silent, 1: info, 2: debug.
    :param seed: Seed of all random streams.
    :param device: ``"auto"``, ``"cpu"``, ``"cuda"`` ...
    :param tokenizer_learning_stops: Env steps from which on the tokenizer is frozen, so that the world model's language stays
        as it is; None never freezes it, as in the paper.
    :param uniform_replay: Whether all replayed steps are drawn alike. Else an episode is drawn first, whatever its length, as
        in the paper: where good play makes episodes long, most of what is drawn is then old and bad play.
    :param world_model_recent_share: Share of the world model's segments that begin in the last two collections, in [0, 1]; the
        paper's is 0.
    :param actor_critic_recent_share: The same of the imagined trajectories.
    :param rewarded_share: Share of the world model's segments with a reward in them, and of the imagined trajectories that
        begin at most a horizon before a real one, in [0, 1]; the shares above are then of the rest. For games in which
        rewards are rare. The paper's is 0.
    :param repeat_exploration: Whether a random action of collection is held for n steps, with a probability that falls with n
        squared (temporally-extended epsilon-greedy, https://arxiv.org/abs/2006.01782); the paper takes it once. For games
        whose rewards a random walk does not come to. ``exploration_rate`` is then how often such a stretch begins.
    :param amp: ``"bfloat16"``: ``torch.autocast`` to it in training, the actor-critic itself excepted; None: float32;
        ``"auto"``: bfloat16 where the hardware computes it, on a CPU if ``embed_dim`` is 256 or more too; else float32.
        ``predict`` and collection are always in float32.
    :param compile: Whether to use ``torch.compile`` in training, which ``"auto"`` does on a GPU, and, unless this is False, to
        imagine in a CUDA graph or, on a CPU, by kernels that a C++ compiler makes once. On a GPU it takes a few minutes at the
        first training steps; False for runs that are shorter than what that saves.
    :param _init_setup_model: Whether to build the networks; False when loading.
    :raises ValueError: If an argument does not fit, named with its value and the way out.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"CnnPolicy": CnnLstmPolicy, "CnnLstmPolicy": CnnLstmPolicy}
    policy: CnnLstmPolicy
    replay_buffer: SequenceReplayBuffer
    observation_space: spaces.Box
    action_space: spaces.Discrete

    def __init__(
        self,
        policy: str | type[CnnLstmPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 1e-4,
        buffer_size: int = 100_000,
        train_freq: int = 200,
        tokenizer_batch_size: int = 256,
        tokenizer_gradient_steps: int = 200,
        tokenizer_learning_starts: int = 1_000,
        world_model_batch_size: int = 64,
        world_model_gradient_steps: int = 200,
        world_model_learning_starts: int = 5_000,
        world_model_weight_decay: float = 0.01,
        actor_critic_batch_size: int = 64,
        actor_critic_gradient_steps: int = 200,
        actor_critic_learning_starts: int = 10_000,
        sequence_length: int = 20,
        imagination_horizon: int = 20,
        burn_in: int = 20,
        gamma: float = 0.995,
        gae_lambda: float = 0.95,
        ent_coef: float = 0.001,
        max_grad_norm: float = 10.0,
        exploration_rate: float = 0.01,
        temperature: float = 1.0,
        eval_temperature: float = 0.5,
        final_training_epochs: int = 100,
        perceptual_loss: str | PerceptualLoss | None = "auto",
        stats_window_size: int = 100,
        tensorboard_log: str | os.PathLike[str] | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        tokenizer_learning_stops: int | None = None,
        uniform_replay: bool = False,
        world_model_recent_share: float = 0.0,
        actor_critic_recent_share: float = 0.0,
        rewarded_share: float = 0.0,
        repeat_exploration: bool = False,
        amp: str | None = "auto",
        compile: bool | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        if env is not None:
            env = maybe_make_env(env, verbose)
            if not isinstance(env, gym.Env | VecEnv):
                raise ValueError(f"env={env!r} is no Gymnasium environment, no VecEnv of SB3's and no name of one")
            check_spaces(env.observation_space, env.action_space)
        elif _init_setup_model:
            raise ValueError("env=None: give an environment, or the name of one that is registered with Gymnasium")
        super().__init__(
            policy,
            env,
            learning_rate,
            policy_kwargs=tuples_to_lists(policy_kwargs or {}),
            stats_window_size=stats_window_size,
            tensorboard_log=None if tensorboard_log is None else os.fspath(tensorboard_log),
            verbose=verbose,
            device=device,
            support_multi_env=True,
            seed=seed,
        )
        self.buffer_size = buffer_size
        self.train_freq = train_freq
        self.tokenizer_batch_size = tokenizer_batch_size
        self.tokenizer_gradient_steps = tokenizer_gradient_steps
        self.tokenizer_learning_starts = tokenizer_learning_starts
        self.tokenizer_learning_stops = tokenizer_learning_stops
        self.world_model_batch_size = world_model_batch_size
        self.world_model_gradient_steps = world_model_gradient_steps
        self.world_model_learning_starts = world_model_learning_starts
        self.world_model_weight_decay = world_model_weight_decay
        self.actor_critic_batch_size = actor_critic_batch_size
        self.actor_critic_gradient_steps = actor_critic_gradient_steps
        self.actor_critic_learning_starts = actor_critic_learning_starts
        self.sequence_length = sequence_length
        self.imagination_horizon = imagination_horizon
        self.burn_in = burn_in
        self.gamma = gamma
        self.gae_lambda = gae_lambda
        self.ent_coef = ent_coef
        self.max_grad_norm = max_grad_norm
        self.exploration_rate = exploration_rate
        self.temperature = temperature
        self.eval_temperature = eval_temperature
        self.final_training_epochs = final_training_epochs
        self.perceptual_loss = perceptual_loss
        self.uniform_replay = uniform_replay
        self.world_model_recent_share = world_model_recent_share
        self.actor_critic_recent_share = actor_critic_recent_share
        self.rewarded_share = rewarded_share
        self.repeat_exploration = repeat_exploration
        self.amp = amp
        self.compile = compile
        self._compiled: dict[str, Compiled] = {}
        self._imagination_graph = ImaginationGraph()
        self._progress_bar: tqdm | None = None
        self._learn_progress: LearnProgress | None = None
        self._resumed = False  # whether the next call of `learn` goes on with the one that a checkpoint was written in
        self._checkpoint_locks: dict[Path, FolderLock] = {}
        self._run_checkpoints: list[RunCheckpointCallback] = []  # those of the running call of `learn`
        self._held_out = HeldOut()
        self._training_warnings = TrainingWarnings()
        if _init_setup_model:
            self.policy_kwargs.setdefault("robust_tokenizer", "auto")
            self._setup_model()

    @property
    def eval_temperature(self) -> float:
        """Temperature of the sampling of ``predict(..., deterministic=False)``."""
        return self.__dict__["eval_temperature"]  # where ``load`` puts it

    @eval_temperature.setter
    def eval_temperature(self, value: float) -> None:
        self.__dict__["eval_temperature"] = value
        if hasattr(self, "policy"):
            self.policy.eval_temperature = value

    @classmethod
    def _get_policy_from_name(cls, policy_name: str) -> type[BasePolicy]:
        if policy_name not in cls.policy_aliases:
            raise ValueError(f"policy={policy_name!r} is unknown: it must be one of {sorted(cls.policy_aliases)}")
        return cls.policy_aliases[policy_name]

    def _setup_model(self) -> None:
        check_hyperparameters(self)
        if not (isinstance(self.policy_class, type) and issubclass(self.policy_class, CnnLstmPolicy)):
            raise ValueError(f"policy={self.policy_class!r} must be 'CnnPolicy' or a subclass of CnnLstmPolicy")
        check_policy_kwargs(self.policy_class, self.policy_kwargs)
        self._perceptual_loss = set_up_perceptual_loss(self)
        self.set_random_seed(self.seed)
        self.policy = self._make_policy().to(self.device)
        if self.seed is None:  # each model plays in its own way
            self.policy.seed(None)
        self._autocast_dtype = autocast_dtype(self.amp, self.device, self.policy.world_model.transformer.embed_dim)
        compiles(self.compile, self.device)  # raises if it is something else
        if self.verbose >= 1 and self._autocast_dtype is not None:
            print("Training in mixed precision, bfloat16 (amp)")
        if self.verbose >= 1 and self.policy.actor_critic.sees_codes:
            print("The actor-critic sees codes, not decoded frames as in the paper (actor_critic_input in policy_kwargs)")
        self._exploration = Exploration(self.n_envs)
        saved = getattr(self, "replay_buffer", None)  # only when loading, after `save(..., include=["replay_buffer"])`
        if saved is not None and saved.n_envs == self.n_envs:
            saved.to(self.device)
            saved.uniform = self.uniform_replay
            if saved.buffer_size != max(self.buffer_size // self.n_envs, 1):
                size = saved.buffer_size * self.n_envs
                warnings.warn(f"The replay buffer in the file is of {size} steps and stays so, whatever buffer_size says")
        else:
            if saved is not None:
                warnings.warn(
                    f"The replay buffer in the file is of {saved.n_envs} environments, env has {self.n_envs}: it is left out"
                )
            self.replay_buffer = SequenceReplayBuffer(
                self.buffer_size, self.policy.image_space, self.action_space, self.device, self.n_envs, self.uniform_replay
            )
            if self.env is not None:  # else it may have been loaded to play only, on a smaller machine
                self.replay_buffer.allocate()

    def _make_policy(self) -> CnnLstmPolicy:
        self._setup_lr_schedule()
        return self.policy_class(  # type: ignore[return-value]
            self.observation_space,
            self.action_space,
            self.lr_schedule,
            sequence_length=self.sequence_length,
            weight_decay=self.world_model_weight_decay,
            eval_temperature=self.eval_temperature,
            **self.policy_kwargs,
        )

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Seed all random streams: torch's, the environment's, and the algorithm's own.

        :param seed: None draws fresh ones where they are the algorithm's own, and leaves the others as they are.
        """
        seed = None if seed is None else int(seed)  # Python's own streams take no NumPy numbers
        super().set_random_seed(seed)
        self._rng = np.random.default_rng(seed)
        if hasattr(self, "policy"):
            self.policy.seed(seed)

    def collect_rollouts(self, callback: BaseCallback, n_steps: int) -> bool:
        """
        Play in the environment and store what happens.

        :param callback: Called once per step of all environments.
        :param n_steps: Env steps to take, over all environments; rounded up to a multiple of their number.
        :return: False if the callback asked to stop.
        """
        assert self.env is not None and self._last_episode_starts is not None
        callback.on_rollout_start()
        start = time.perf_counter()
        # The networks may have changed since the last collection: rebuild the LSTM state from the frames it has seen
        seen = self.replay_buffer.latest(self.burn_in, self._last_episode_starts)
        parts = seen.observations.flatten(0, 1).split(TOGETHER)  # of many environments they take much memory
        inputs = th.cat([self.policy.observe(self._encode(part)) for part in parts])
        state = self.policy.actor_critic.burn_in(inputs.unflatten(0, seen.mask.shape), seen.mask)

        going_on = True
        for _ in range(0, n_steps, self.n_envs):
            env, replay_buffer = self.env, self.replay_buffer  # callbacks look for them among the locals, as in SB3
            if self._last_obs is None:  # a callback has loaded a replay buffer, which the running episodes do not follow
                self._last_obs = env.reset()  # type: ignore[assignment]
                self._last_episode_starts = np.ones(self.n_envs, dtype=bool)
            obs = self._images(self._last_obs)
            episode_starts = self._last_episode_starts
            keep = th.as_tensor(~episode_starts, dtype=th.float32, device=self.device).unsqueeze(-1)
            logits, state = self.policy.act(obs, LSTMState(state.hidden * keep, state.cell * keep))
            actions = sample_categorical(logits, self.temperature).cpu().numpy()
            actions = self._exploration(
                actions, episode_starts, logits.shape[1], self.exploration_rate, self.repeat_exploration, self._rng
            )

            new_obs, rewards, dones, infos = env.step(actions)
            if self._vec_normalize_env is not None:
                rewards = self._vec_normalize_env.get_original_reward()
            if not (np.abs(rewards) <= np.finfo(np.float32).max).all():  # they are kept as float32
                raise ValueError(
                    f"env gave the rewards {rewards.tolist()} after {self.num_timesteps} steps: IRIS wants finite numbers, so "
                    "clip or replace the others in the environment"
                )
            truncated = dones & np.array([info.get("TimeLimit.truncated", False) for info in infos], dtype=bool)
            replay_buffer.add(obs, actions, rewards, dones & ~truncated, truncated, episode_starts)
            self._last_obs = new_obs  # type: ignore[assignment]
            self._last_episode_starts = dones.copy()  # the env may write to it
            self.num_timesteps += self.n_envs
            self._episode_num += int(dones.sum())
            self._update_info_buffer(infos, dones)
            if self._progress_bar is not None:
                self._progress_bar.update(self.n_envs)
            callback.update_locals(locals())
            if not callback.on_step():
                going_on = False
                break
        callback.on_rollout_end()
        self.logger.record("time/collection_seconds", time.perf_counter() - start)
        return going_on

    def _images(self, obs: Any) -> np.ndarray:
        """Observations of the env, (N, C, H, W) uint8, at the networks' size, as a copy that no env writes to."""
        return np.array(self.policy.resize(obs))

    def train(self) -> None:
        """One training phase: gradient steps of each network whose start has been reached (Sec. 2 and App. A of the paper)."""
        self.replay_buffer.forget_seen()
        self._update_learning_rate([getattr(self.policy, f"{name}_optimizer") for name in NETWORKS])
        # An optimizer that was loaded has the one that it was saved with
        self.policy.world_model_optimizer.param_groups[0]["weight_decay"] = self.world_model_weight_decay
        losses: dict[str, Callable[[], tuple[th.Tensor, Logs]]] = {
            "tokenizer": self._tokenizer_loss,
            "world_model": self._world_model_loss,
            "actor_critic": self._actor_critic_loss,
        }
        for name in NETWORKS:
            if self._trains(name, self.num_timesteps):
                optimizer, n_steps = getattr(self.policy, f"{name}_optimizer"), getattr(self, f"{name}_gradient_steps")
                self._train_network(name, getattr(self.policy, name), optimizer, losses[name], n_steps)
                if name == "tokenizer":
                    self.replay_buffer.forget_tokens()
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _trains(self, network: str, num_timesteps: float) -> bool:
        """
        :param network: ``"tokenizer"``, ``"world_model"`` or ``"actor_critic"``.
        :param num_timesteps: Env steps taken.
        :return: Whether a training phase after so many steps trains the network.
        """
        if network == "tokenizer" and num_timesteps >= (self.tokenizer_learning_stops or math.inf):
            return False
        return getattr(self, f"{network}_gradient_steps") > 0 and num_timesteps >= getattr(self, f"{network}_learning_starts")

    def _train_network(
        self,
        name: str,
        network: nn.Module,
        optimizer: th.optim.Optimizer,
        compute_loss: Callable[[], tuple[th.Tensor, Logs]],
        n_steps: int,
    ) -> None:
        """Gradient steps of one network on fresh batches; means over them are logged under its name."""
        start, cpu_start = time.perf_counter(), time.process_time()
        history: list[Logs] = []
        network.train()
        steps: Iterable[int] = range(n_steps)
        if self._progress_bar is not None:  # a bar that is disabled starts a thread, too, and takes its lock, also in a fork
            steps = tqdm(steps, desc=name.replace("_", " "), position=1, leave=False)
        try:
            for _ in steps:
                with self._autocast():
                    loss, logs = compute_loss()
                if has_gradients(network):
                    optimizer.zero_grad()
                    loss.backward()
                    logs["grad_norm"] = nn.utils.clip_grad_norm_(network.parameters(), self.max_grad_norm)
                    optimizer.step()
                history.append({key: value.clone() for key, value in logs.items()})  # the next step may overwrite them
        finally:  # after Ctrl-C one may want to play in the world model, without dropout
            network.eval()
            optimizer.zero_grad()  # on a GPU the next network's CUDA graphs may overwrite the gradients
        check_finite(name, history, self.num_timesteps)
        self._n_updates += n_steps
        for key in history[0]:
            self.logger.record(f"{name}/{key}", th.stack([logs[key] for logs in history]).mean().item())
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        self.logger.record(f"time/{name}_seconds", seconds)
        self._training_warnings.look(name, self.logger.name_to_value, self)
        if self.device.type == "cpu":
            self._training_warnings.look_at_threads(seconds, cpu_seconds)

    def _autocast(self) -> th.autocast:
        """The precision of a training phase; casts of weights live as long as the context, so one step at most."""
        return th.autocast(self.device.type, self._autocast_dtype, enabled=self._autocast_dtype is not None)

    def _loss_of(self, name: str) -> Callable[..., tuple[th.Tensor, Logs]]:
        """The loss function of tokenizer or world model, compiled where that is wanted."""
        network = getattr(self.policy, name)
        if not (compiles(self.compile, self.device) and has_gradients(network)):
            return network.loss
        if name not in self._compiled or self._compiled[name].function != network.loss:
            # A step of the world model is many small kernels
            self._compiled[name] = Compiled(network.loss, "reduce-overhead" if name == "world_model" else "default")
        return self._compiled[name]

    def _tokenizer_loss(self) -> tuple[th.Tensor, Logs]:
        samples = self.replay_buffer.sample(self.tokenizer_batch_size, 1, self._rng)
        perceptual_loss = self._given_perceptual_loss if callable(self.perceptual_loss) else self._perceptual_loss
        return self._loss_of("tokenizer")(self.policy.to_frames(samples.observations[:, 0]), perceptual_loss)

    @_disable_dynamo  # a function of the user's that keeps something would be compiled anew at each step
    def _given_perceptual_loss(self, x: th.Tensor, x_hat: th.Tensor) -> th.Tensor:
        assert self._perceptual_loss is not None
        return self._perceptual_loss(x, x_hat)

    def _encode(self, observations: np.ndarray | th.Tensor) -> th.Tensor:
        return self.policy.tokenizer.encode(self.policy.to_frames(observations))

    def _world_model_loss(self) -> tuple[th.Tensor, Logs]:
        batch_size, starts = self.world_model_batch_size, self._starts("world_model", self.sequence_length)
        samples = self.replay_buffer.sample_tokens(batch_size, self.sequence_length, self._rng, self._encode, starts)
        return self._loss_of("world_model")(*samples)

    def _actor_critic_loss(self) -> tuple[th.Tensor, Logs]:
        policy, starts = self.policy, self._starts("actor_critic", self.imagination_horizon)
        contexts = self.replay_buffer.sample_contexts(
            self.actor_critic_batch_size, self.burn_in, self._rng, self._encode, policy.observe, starts
        )
        if self.device.type == "cuda" and self.compile:
            compile = compiles(self.compile, self.device)
            trajectory = self._imagination_graph(policy, contexts, self.imagination_horizon, self._autocast_dtype, compile)
        else:
            game = self._imagined_game(policy.observe, self._autocast_dtype)
            trajectory = imagine(game, policy.actor_critic, contexts, self.imagination_horizon)
        return actor_critic_loss(trajectory, self.gamma, self.gae_lambda, self.ent_coef)

    def _imagined_game(self, observe: Observe, dtype: th.dtype | None = None, **kwargs: Any) -> ImaginedGame:
        """
        A game in the world model, by the kernels for a CPU where these are wanted and work; ``dtype`` is theirs, and what
        follows the game's.
        """
        world_model = self.policy.world_model
        if self.device.type == "cpu" and self.compile and imagination_cpu.works():
            return imagination_cpu.CpuGame(observe, world_model, dtype, **kwargs)
        return ImaginedGame(observe, world_model, **kwargs)

    def _starts(self, name: str, reward_within: int) -> Starts:
        """Where a network's batch begins, by the shares that are asked for; recent steps are those of two collections."""
        batch_size, recent_share = getattr(self, f"{name}_batch_size"), getattr(self, f"{name}_recent_share")
        n_rewarded = round(self.rewarded_share * batch_size)
        n_recent = round(recent_share * (batch_size - n_rewarded))
        return Starts(n_recent, math.ceil(2 * self.train_freq / self.n_envs), n_rewarded, reward_within)

    def learn(
        self: SelfIRIS,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1,
        tb_log_name: str = "IRIS",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfIRIS:
        """
        Play ``total_timesteps`` env steps with training phases in between, and ``final_training_epochs`` more behind, in which
        no callback is called: what ``EvalCallback`` has kept as the best is from before.

        After ``resume``, the first call goes on with the call that the checkpoint was written in, so a script that is started
        again says the same as before. With ``reset_num_timesteps=False`` it is a call of its own instead.

        :param total_timesteps: Env steps to take, over all environments; rounded up to a multiple of their number.
        :param callback: Called once per step of all environments, and around each collection.
        :param log_interval: Epochs (a collection and its training phase) between two logs; None for no logs.
        :param tb_log_name: Name of the run for TensorBoard.
        :param reset_num_timesteps: Whether to count steps from zero; False goes on with the run.
        :param progress_bar: Show a bar of the env steps and one of each training phase.
        :return: The model itself.
        :raises ValueError: If an argument does not fit, the model was loaded without an environment, or that gives rewards
            which are no finite numbers.
        :raises FloatingPointError: If a loss or a gradient is not finite. The networks are then spoilt.
        """
        check_learn_arguments(self, total_timesteps, log_interval)
        self.replay_buffer.allocate()
        total_timesteps = math.ceil(total_timesteps)  # 1e5 is welcome
        progress = self._learn_progress if self._resumed and reset_num_timesteps else None
        if progress is not None:
            if total_timesteps != (asked := progress.last_step - progress.first_step):
                raise ValueError(
                    f"total_timesteps={total_timesteps}, but the checkpoint was written in a call of learn({asked}): give the "
                    "same again to go on with it, or reset_num_timesteps=False for so many steps from here on"
                )
            total_timesteps, reset_num_timesteps = max(progress.last_step - self.num_timesteps, 0), False
        self._run_checkpoints = []
        total_timesteps, callback = self._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name)
        if progress is None:
            final_epochs = self.final_training_epochs if self.num_timesteps < total_timesteps else 0
            progress = LearnProgress(self.num_timesteps, total_timesteps, final_epochs, final_epochs)
        self._training_warnings.begin(self, progress)
        self._learn_progress, self._resumed = progress, False
        # The networks may have been changed from outside since the last call, or a training phase of it interrupted
        self.replay_buffer.forget_tokens()
        self.policy.set_training_mode(False)
        if progress_bar:
            self._progress_bar = tqdm(
                total=total_timesteps, initial=self.num_timesteps, desc="env steps", unit="step", position=0
            )
        try:
            callback.on_training_start(locals(), globals())
            self._learn(progress, callback, log_interval)
            callback.on_training_end()
        except Exception:
            for checkpoints in self._run_checkpoints:
                checkpoints.on_failure()
            raise
        finally:
            for checkpoints in reversed(self._run_checkpoints):  # each gives signals back to the one before
                checkpoints.leave()
            self._run_checkpoints = []  # callbacks know all that ran, modules too, so a model that knows them has no copies
            if self._progress_bar is not None:
                self._progress_bar.close()
                self._progress_bar = None
        return self

    def _learn(self, at: LearnProgress, callback: BaseCallback, log_interval: int | None) -> None:
        """All epochs of a call of ``learn``, the final training phases included, from wherever it is."""
        # Schedules run to the end of the final training phases, each of which counts like the steps of an epoch
        progress_at_end = at.last_step + at.final_epochs * self.train_freq
        while self.num_timesteps < at.last_step or at.epoch_end is not None or at.final_epochs_left > 0:
            is_final = self.num_timesteps >= at.last_step and at.epoch_end is None
            if is_final and not any(self._trains(name, self.num_timesteps) for name in NETWORKS):
                at.final_epochs_left = 0
                break
            if is_final:
                progress = max(progress_at_end - (at.final_epochs_left - 1) * self.train_freq, self.num_timesteps)
            else:
                if at.epoch_end is None:
                    at.epoch_end = min(self.num_timesteps + self.train_freq, at.last_step)
                n_steps = at.epoch_end - self.num_timesteps  # none if only the training phase of the epoch is still to do
                if n_steps > 0 and not self.collect_rollouts(callback, n_steps):
                    break
                self._held_out.look(self, n_steps)
                progress = self.num_timesteps
            # Many environments can take more steps than were asked for
            self._update_current_progress_remaining(min(progress, progress_at_end), progress_at_end)
            self.train()
            at.epoch_end = None
            at.final_epochs_left -= is_final
            at.epochs += 1
            if log_interval is not None and at.epochs % log_interval == 0:
                self.dump_logs()
            for checkpoints in self._run_checkpoints:
                checkpoints.on_epoch_end()

    def dump_logs(self) -> None:
        """Write what was logged since the last time to all outputs of the logger."""
        assert self.ep_info_buffer is not None and self.ep_success_buffer is not None
        time_elapsed = max((time.time_ns() - self.start_time) / 1e9, 1e-9)
        fps = int((self.num_timesteps - self._num_timesteps_at_start) / time_elapsed)
        if len(self.ep_info_buffer) > 0:
            self.logger.record("rollout/ep_rew_mean", safe_mean([info["r"] for info in self.ep_info_buffer]))
            self.logger.record("rollout/ep_len_mean", safe_mean([info["l"] for info in self.ep_info_buffer]))
        if len(self.ep_success_buffer) > 0:
            self.logger.record("rollout/success_rate", safe_mean(self.ep_success_buffer))
        self.logger.record("time/episodes", self._episode_num, exclude="tensorboard")
        self.logger.record("time/fps", fps)
        self.logger.record("time/time_elapsed", int(time_elapsed), exclude="tensorboard")
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(step=self.num_timesteps)

    def get_world_model_env(self, n_envs: int = 1, **kwargs: Any) -> WorldModelVecEnv:
        """
        The learned game as an environment, to train other algorithms in it.

        :param n_envs: Number of games.
        :param kwargs: Further arguments of ``WorldModelVecEnv``.
        :return: The games, on the model's device.
        """
        return WorldModelVecEnv(self, n_envs, **kwargs)


def has_gradients(network: nn.Module) -> bool:
    """
    :param network: A network.
    :return: Whether it learns by gradients, which a ``PatchTokenizer`` does not.
    """
    return any(parameter.requires_grad for parameter in network.parameters())
