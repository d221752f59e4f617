"""The policy in SB3's sense: all networks, their optimizers, and acting with them."""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_iris.actor_critic import ActorCritic, sample_categorical
from sb3_iris.tokenizer import PatchTokenizer, Tokenizer
from sb3_iris.type_aliases import LSTMState
from sb3_iris.validation import check_network_sizes, check_positive
from sb3_iris.world_model import WorldModel

RecurrentState = tuple[np.ndarray, ...]  # LSTM state (h, c) as `predict` takes and gives it, each (1, N, hidden)


class CnnLstmPolicy(BasePolicy):
    """
    Tokenizer, world model and actor-critic of IRIS ("Transformers are Sample-Efficient World Models",
    https://arxiv.org/abs/2209.00588) with one optimizer each. Its ``predict`` is recurrent like that of sb3-contrib.

    :param observation_space: uint8 images, channels first, (C, H, W).
    :param action_space: Discrete actions.
    :param lr_schedule: Learning rate of all three optimizers; called with the remaining progress, 1 to 0.
    :param sequence_length: Steps in the world model's context.
    :param weight_decay: Weight decay of the world model's ``Linear`` weights.
    :param eval_temperature: Temperature at which ``predict`` samples when it is not deterministic; the model sets it.
    :param image_size: Side in pixels to which every observation is resized, small ones too; None keeps the environment's own
        height and width.
    :param codebook_size: Number of frame tokens V.
    :param codebook_dim: Dimension of a codebook entry.
    :param latent_channels: Channels that the tokenizer's convolutions hand to the codebook's; ``codebook_dim`` if None.
    :param tokenizer_channels: Base number of channels of the tokenizer.
    :param channel_multipliers: Channels of each level of the tokenizer over ``tokenizer_channels``; each level halves the
        resolution of the one before, so an image side must be divisible by 2 ** (levels - 1).
    :param n_res_blocks: Residual blocks per level of the tokenizer's encoder; the decoder has one more.
    :param attention_resolutions: Sides of feature maps at which the tokenizer uses self-attention.
    :param robust_tokenizer: Whether to train the tokenizer in a way that needs no perceptual loss, see ``Tokenizer``;
        ``"auto"``: where ``IRIS`` has no perceptual loss. After construction its ``policy_kwargs`` say which of the two it is.
    :param patch_tokenizer: Whether tokens are the frame's patches of 2 ** (levels - 1) pixels a side, see ``PatchTokenizer``:
        for games drawn from few tiles. ``codebook_size`` is how many at most, no other size of the tokenizer counts.
        ``image_size`` must be None, or divide both sides of the environment's images.
    :param n_layers: Transformer blocks of the world model.
    :param n_heads: Attention heads per block.
    :param embed_dim: Embedding size of the world model; a multiple of ``n_heads``.
    :param dropout: Dropout probability of the world model, in [0, 1).
    :param relative_positions: Whether the world model's attention also goes by how many steps, rows and columns tokens are
        apart, so that what it learns of neighbours at one place holds at all others; the paper's does not.
    :param lstm_hidden_size: Size of the actor-critic's LSTM state.
    :param actor_critic_input: What the actor-critic sees: ``"frames"`` as the tokenizer decodes them, the paper's, or
        ``"codes"``, the codebook's entries for the frame's tokens on their grid, which saves all decoding (of patches, how
        they differ from the background). ``"auto"``: codes if a side of the image, resized to ``image_size`` or not, has less
        than 32 pixels, where the paper's four max-pools would leave a single position.
    :raises ValueError: If a size is not positive, or sizes do not go together.
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        sequence_length: int = 20,
        weight_decay: float = 0.01,
        eval_temperature: float = 0.5,
        image_size: int | None = 64,
        codebook_size: int = 512,
        codebook_dim: int = 512,
        latent_channels: int | None = None,
        tokenizer_channels: int = 64,
        channel_multipliers: Sequence[int] = (1, 1, 1, 1, 1),
        n_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (8, 16),
        robust_tokenizer: bool | str = "auto",
        patch_tokenizer: bool = False,
        n_layers: int = 10,
        n_heads: int = 4,
        embed_dim: int = 256,
        dropout: float = 0.1,
        relative_positions: bool = False,
        lstm_hidden_size: int = 512,
        actor_critic_input: str = "auto",
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__", "lr_schedule")}
        super().__init__(observation_space, action_space)
        self._arguments = arguments
        for name in ("channel_multipliers", "attention_resolutions"):
            if not isinstance(arguments[name], Sequence):
                raise ValueError(f"{name}={arguments[name]!r} must be a sequence of whole numbers, for instance (1, 1)")
        check_positive(
            sequence_length=sequence_length,
            codebook_size=codebook_size,
            codebook_dim=codebook_dim,
            tokenizer_channels=tokenizer_channels,
            n_res_blocks=n_res_blocks,
            n_layers=n_layers,
            n_heads=n_heads,
            embed_dim=embed_dim,
            lstm_hidden_size=lstm_hidden_size,
            **{"image_size": image_size} if image_size is not None else {},
            **{"latent_channels": latent_channels} if latent_channels is not None else {},
            **{f"channel_multipliers[{i}]": value for i, value in enumerate(channel_multipliers)},
            **{f"attention_resolutions[{i}]": value for i, value in enumerate(attention_resolutions)},
        )
        if actor_critic_input not in ("auto", "frames", "codes"):
            raise ValueError(f"actor_critic_input={actor_critic_input!r} must be 'frames', 'codes' or 'auto'")
        channels, height, width = observation_space.shape
        if image_size is not None:
            if patch_tokenizer and (height % image_size or width % image_size):  # else a pixel is the mean of whole ones
                raise ValueError(
                    f"image_size={image_size}, but patch_tokenizer=True wants images drawn from tiles, and resizing "
                    f"{height}x{width} images to {image_size}x{image_size} blurs them: image_size=None keeps their size"
                )
            height = width = image_size
        check_network_sizes(height, width, channel_multipliers, embed_dim, n_heads, dropout)
        self.image_space = spaces.Box(0, 255, (channels, height, width), dtype=np.uint8)
        self.eval_temperature = eval_temperature

        image_shape = (channels, height, width)
        self.tokenizer: Tokenizer | PatchTokenizer
        if patch_tokenizer:
            self.tokenizer = PatchTokenizer(image_shape, codebook_size, 2 ** (len(channel_multipliers) - 1))
        else:
            self.tokenizer = Tokenizer(
                image_shape,
                codebook_size,
                codebook_dim,
                tokenizer_channels,
                channel_multipliers,
                n_res_blocks,
                attention_resolutions,
                latent_channels,
                robust_tokenizer is True,  # a policy without an algorithm is not trained
            )
        n_actions = int(action_space.n)
        self.world_model = WorldModel(
            codebook_size,
            n_actions,
            self.tokenizer.tokens_per_frame,
            sequence_length,
            embed_dim,
            n_layers,
            n_heads,
            dropout,
            self.tokenizer.grid if relative_positions else None,
        )
        sees_codes = actor_critic_input == "codes" or (actor_critic_input == "auto" and min(height, width) < 32)
        input_shape = (self.tokenizer.codebook_dim, *self.tokenizer.grid) if sees_codes else image_shape
        self.actor_critic = ActorCritic(input_shape, n_actions, lstm_hidden_size, sees_codes)
        self.set_training_mode(False)  # only the world model's own training phase wants its dropout

        learning_rate = lr_schedule(1)
        self.tokenizer_optimizer = th.optim.Adam(self.tokenizer.parameters(), lr=learning_rate)
        linear_weights = {module.weight for module in self.world_model.modules() if isinstance(module, nn.Linear)}
        self.world_model_optimizer = th.optim.AdamW(
            [
                {"params": [p for p in self.world_model.parameters() if p in linear_weights], "weight_decay": weight_decay},
                {"params": [p for p in self.world_model.parameters() if p not in linear_weights], "weight_decay": 0.0},
            ],
            lr=learning_rate,
        )
        self.actor_critic_optimizer = th.optim.Adam(self.actor_critic.parameters(), lr=learning_rate)

        # Acting has a random stream of its own, so that an evaluation in the middle of a run does not change the run
        self._generator = th.Generator()
        self._generator.manual_seed(th.initial_seed())

    def _get_constructor_parameters(self) -> dict[str, Any]:
        """What ``save`` needs to remember for ``load``; learning rates belong to the algorithm."""
        return {**self._arguments, "lr_schedule": self._dummy_schedule, "eval_temperature": self.eval_temperature}

    def seed(self, seed: int | None) -> None:
        """
        Seed the random stream of ``predict``.

        :param seed: Seed; None draws a fresh one.
        """
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def resize(self, observations: np.ndarray) -> np.ndarray:
        """
        Resize images to the networks' size, by area interpolation.

        :param observations: (N, C, H, W) uint8, of any height and width
        :return: (N, C, H, W) uint8 of the networks' height and width
        """
        _, height, width = self.image_space.shape
        if observations.shape[2:] == (height, width):
            return observations
        resized = np.empty((len(observations), *self.image_space.shape), dtype=np.uint8)
        for n, image in enumerate(observations):
            for c, channel in enumerate(image):  # one by one, as OpenCV takes no more than four together
                resized[n, c] = cv2.resize(np.ascontiguousarray(channel), (width, height), interpolation=cv2.INTER_AREA)
        return resized

    def to_frames(self, observations: np.ndarray | th.Tensor) -> th.Tensor:
        """
        The one place where bytes become numbers.

        :param observations: (..., C, H, W) uint8 of the networks' size
        :return: (..., C, H, W) float32 in [0, 1] on the policy's device
        """
        return th.as_tensor(observations, device=self.device).float() / 255

    @th.no_grad()
    def observe(self, tokens: th.Tensor) -> th.Tensor:
        """
        What the actor-critic sees of frames. On a GPU the imagination's calls of it are recorded once and then replayed, so
        what else it reads must not change.

        :param tokens: (..., K) int64 in [0, V)
        :return: Decoded frames (..., C, H, W) float32 in [0, 1], or codes (..., codebook_dim, h, w) float32
        """
        return self.tokenizer.codes(tokens) if self.actor_critic.sees_codes else self.tokenizer.decode(tokens)

    @th.no_grad()
    def act(self, observations: np.ndarray, state: LSTMState) -> tuple[th.Tensor, LSTMState]:
        """
        What the policy thinks of real frames. Like in imagination it sees what their tokens stand for.

        :param observations: (N, C, H, W) uint8 of the networks' size
        :param state: LSTM state before these frames.
        :return: Action logits (N, A) and the LSTM state after the frames.
        """
        output = self.actor_critic(self.observe(self.tokenizer.encode(self.to_frames(observations))), state)
        return output.logits, output.state

    def _predict(self, observation: Any, deterministic: bool = False) -> th.Tensor:
        """Actions for observations that begin an episode; ``predict`` is the recurrent one."""
        actions, _ = self.predict(observation.cpu().numpy(), deterministic=deterministic)
        return th.as_tensor(actions, device=self.device)

    def predict(  # type: ignore[override]
        self,
        observation: np.ndarray,
        state: RecurrentState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, RecurrentState]:
        """
        Actions for observations, with the conventions of sb3-contrib's ``RecurrentPPO``. Changes nothing in the policy.

        :param observation: uint8 image or N of them, channels first or last, of the environment's or the networks' size
        :param state: LSTM state (h, c), each (1, N, hidden); None at the start of an episode.
        :param episode_start: (N,) bool, whether the observations begin an episode, which resets the state; None: all False.
        :param deterministic: Whether to take the most likely action rather than to sample at ``eval_temperature``.
        :return: Actions (N,) int64, or a single one without axes for a single image, and the new state.
        :raises ValueError: If an image, the state or ``episode_start`` has another shape or type.
        """
        images, batched = self._to_images(observation)
        n_envs = len(images)
        if state is None:
            lstm_state = self.actor_critic.initial_state(n_envs)
        else:
            expected = (1, n_envs, self.actor_critic.lstm.hidden_size)
            parts = [np.asarray(part) for part in state] if isinstance(state, Sequence | np.ndarray) else []
            if len(parts) != 2 or any(part.shape != expected or part.dtype.kind != "f" for part in parts):
                raise ValueError(
                    f"state is {type(state).__name__} of {[(part.shape, part.dtype.name) for part in parts]}, but must be "
                    f"(h, c) of floats, {expected} each: pass what predict returned for as many observations, or None"
                )
            lstm_state = LSTMState(*(th.as_tensor(part[0], dtype=th.float32, device=self.device) for part in parts))
        if episode_start is not None:
            starts = np.asarray(episode_start)
            if starts.size != n_envs or starts.dtype.kind not in "biuf":
                raise ValueError(
                    f"episode_start={episode_start!r} must have one bool for each of the {n_envs} observations, or be None"
                )
            going_on = 1 - th.as_tensor(starts.reshape(n_envs, 1), dtype=th.float32, device=self.device)
            lstm_state = LSTMState(*(part * going_on for part in lstm_state))

        logits, lstm_state = self.act(images, lstm_state)
        temperature = 0.0 if deterministic else self.eval_temperature
        actions = sample_categorical(logits.cpu(), temperature, self._generator).numpy()
        return actions if batched else actions[0], tuple(part.unsqueeze(0).cpu().numpy() for part in lstm_state)

    def _to_images(self, observation: np.ndarray) -> tuple[np.ndarray, bool]:
        """(N, C, H, W) uint8 images of the networks' size, and whether the observation was a batch."""
        if isinstance(observation, tuple):
            raise ValueError("observation is a tuple, as Gymnasium's env.reset() gives it: pass its first part alone")
        observation = np.asarray(observation)
        for space in (self.observation_space, self.image_space):
            assert space.shape is not None
            for shape, channels_last in ((space.shape, False), ((*space.shape[1:], space.shape[0]), True)):
                if observation.dtype == np.uint8 and observation.ndim in (3, 4) and observation.shape[-3:] == shape:
                    images = observation.reshape(-1, *shape)
                    images = images.transpose(0, 3, 1, 2) if channels_last else images
                    # PyTorch takes no flipped views, nor, without a warning, what is read-only
                    return np.array(self.resize(images)), observation.ndim == 4
        raise ValueError(
            f"observation has dtype {observation.dtype} and shape {observation.shape}, but must be uint8 of shape "
            f"{self.observation_space.shape} or {self.image_space.shape}, or a batch of these, channels first or last"
        )


CnnPolicy = CnnLstmPolicy
