"""Looking into a model: reconstructions, imagined videos and used tokens."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import TensorBoardOutputFormat
from torch.utils.tensorboard.summary import Summary  # type: ignore[attr-defined]

from sb3_iris.type_aliases import SequenceSamples
from sb3_iris.validation import check_positive, refuse_events
from sb3_iris.world_model_env import make_game, reconstruct, to_bytes, to_images, to_rgb

if TYPE_CHECKING:
    from sb3_iris.iris import IRIS

SHORTEST_SIDE = 128  # pixels of a frame in a picture, at least


def reconstruction_grid(model: "IRIS", observations: np.ndarray) -> np.ndarray:
    """
    Frames above their reconstructions above the absolute error, one column per frame.

    :param model: The model.
    :param observations: (N, ...) uint8 images of the environment's or the model's size, channels first or last
    :return: (height, width, 3) uint8
    """
    images = to_images(model.policy, observations)
    reconstructions = reconstruct(model, images)
    errors = np.abs(images.astype(np.int16) - reconstructions).astype(np.uint8)
    rows = [np.concatenate([_tile(image) for image in row], axis=1) for row in (images, reconstructions, errors)]
    return np.concatenate(rows)


@th.no_grad()
def token_counts(model: "IRIS", observations: np.ndarray) -> np.ndarray:
    """
    How often each token occurs in frames.

    :param model: The model.
    :param observations: (N, C, H, W) uint8 of the model's size
    :return: (V,) int64
    """
    tokenizer = model.policy.tokenizer
    tokens = tokenizer.encode(model.policy.to_frames(observations)).flatten().cpu().numpy()
    return np.bincount(tokens, minlength=tokenizer.codebook_size)


def token_histogram(counts: np.ndarray, height: int = SHORTEST_SIDE, bar: int = 4) -> np.ndarray:
    """
    Bars of token counts, the most used one first, as high as the square root of their share of the highest.

    :param counts: (V,) counts
    :param height: Height in pixels.
    :param bar: Width of a bar in pixels.
    :return: (height, V * bar, 3) uint8
    """
    heights = np.ceil(height * np.sqrt(np.sort(counts)[::-1] / max(counts.max(), 1)))
    filled = np.arange(height)[::-1, None] < heights.repeat(bar)[None]
    return np.where(filled[..., None], np.uint8(80), np.uint8(255)).repeat(3, axis=-1)


class Comparison(NamedTuple):
    """A real segment and what the world model imagines under the same actions; T steps, so T + 1 frames."""

    real: np.ndarray  # (T + 1, C, H, W) uint8
    imagined: np.ndarray  # (T + 1, C, H, W) uint8; the first one is the reconstruction that the game starts from
    actions: np.ndarray  # (T,) int64
    real_rewards: np.ndarray  # (T,) float32
    imagined_rewards: np.ndarray  # (T,) float32 in {-1, 0, 1}
    imagined_ends: np.ndarray  # (T,) bool
    values: np.ndarray  # (T + 1,) float32, what the critic expects of each imagined frame


@th.no_grad()
def compare(
    model: "IRIS",
    observations: np.ndarray,
    actions: np.ndarray,
    rewards: np.ndarray,
    temperature: float = 1.0,
    generator: th.Generator | None = None,
) -> Comparison:
    """
    Imagine how a real segment goes on from its first frame under its actions.

    :param model: The model.
    :param observations: (T + 1, C, H, W) uint8 of the model's size
    :param actions: (T,) int64, ``actions[t]`` taken on ``observations[t]``
    :param rewards: (T,) float, received for them
    :param temperature: Temperature of the world model's sampling.
    :param generator: Random stream of it, on the model's device; torch's global one if None.
    :return: Both continuations.
    """
    policy = model.policy
    game = make_game(model, temperature, generator)
    tokens = policy.tokenizer.encode(policy.to_frames(observations[:1]))
    frames: th.Tensor | None = game.reset(tokens)
    state = policy.actor_critic.initial_state(1)
    steps, imagined, values = [], [], []
    for t in range(len(actions) + 1):
        assert frames is not None
        output = policy.actor_critic(policy.observe(game.tokens), state)
        state = output.state
        imagined.append(frames[0])
        values.append(output.values[0])
        if t < len(actions):
            action = th.as_tensor(actions[t : t + 1], device=policy.device)
            step_rewards, step_ends, frames = game.step(action)
            steps.append((step_rewards[0], step_ends[0]))
    imagined_rewards, imagined_ends = (th.stack(column).cpu().numpy() for column in zip(*steps, strict=True))
    return Comparison(
        np.asarray(observations),
        to_bytes(th.stack(imagined)),
        np.asarray(actions),
        np.asarray(rewards, dtype=np.float32),
        imagined_rewards,
        imagined_ends,
        th.stack(values).cpu().numpy(),
    )


def comparison_video(comparison: Comparison) -> np.ndarray:
    """
    The real segment on the left, the imagined one on the right. Below: the last action, the rewards, the critic's value of the
    imagined frame, and END from the step on after which the world model says that the episode is over.

    :param comparison: What to show.
    :return: (T + 1, height, width, 3) uint8
    """
    video = []
    ended = False
    for t in range(len(comparison.real)):
        real, imagined = (_tile(images[t]) for images in (comparison.real, comparison.imagined))
        left, right = ["real"], ["imagined"]
        if t > 0:
            ended = ended or bool(comparison.imagined_ends[t - 1])
            left += [f"action {comparison.actions[t - 1]}", f"reward {comparison.real_rewards[t - 1]:+.3g}"]
            right += [f"reward {comparison.imagined_rewards[t - 1]:+.0f}"]
        else:
            right += [""]
        right += [f"value {comparison.values[t]:+.2f}" + ("  END" if ended else "")]
        video.append(np.concatenate([with_text(real, left), with_text(imagined, right)], axis=1))
    return np.stack(video)


def with_text(image: np.ndarray, lines: list[str], n_lines: int = 3) -> np.ndarray:
    """
    Write below a picture.

    :param image: (H, W, 3) uint8
    :param lines: At most ``n_lines`` lines.
    :param n_lines: For how many lines to make room.
    :return: (H + 16 * n_lines, W, 3) uint8
    """
    canvas = np.zeros((16 * n_lines, image.shape[1], 3), dtype=np.uint8)
    for n, line in enumerate(lines):
        cv2.putText(canvas, line, (4, 16 * n + 12), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255, 255, 255), 1, cv2.LINE_AA)
    return np.concatenate([image, canvas])


def write_video(path: str | Path | io.BytesIO, frames: np.ndarray, fps: int = 5) -> None:
    """
    Write a video with ``imageio``.

    :param path: File to write; its suffix says the format. ``.gif`` needs nothing else, ``.mp4`` the package
        ``imageio-ffmpeg``. A file object gets a GIF.
    :param frames: (T, H, W, 3) uint8
    :param fps: Frames per second.
    :raises ImportError: If ``imageio`` is not installed.
    """
    try:
        import imageio.v3
    except ImportError as error:
        raise ImportError("Videos need the package imageio: pip install 'sb3_iris[extra]'") from error
    if isinstance(path, io.BytesIO) or Path(path).suffix == ".gif":
        imageio.v3.imwrite(path, frames, extension=".gif", duration=1000 / fps, loop=0)
    else:
        imageio.v3.imwrite(path, frames, fps=fps, macro_block_size=2)


class WorldModelCallback(BaseCallback):
    """
    Every so often looks into the world model, at what is in the replay buffer. Writes to TensorBoard, if the model does:
    ``world_model/reconstruction``, a grid of frames, reconstructions and errors; ``world_model/imagined``, a video of real
    segments beside imagined ones; ``world_model/tokens``, a histogram of the tokens. The run goes as it would without it.

    :param freq: Env steps between two looks; each is taken at the end of a collection.
    :param folder: Folder to write the same pictures to, as ``step_<n>_reconstruction.png`` and so on; None for none.
    :param n_frames: Frames in the grid.
    :param horizon: Imagined steps in the video.
    :param n_segments: Segments in the video, one above the other.
    :param seed: Seed of the callback's own random streams.
    :raises ValueError: If a number is not positive, or, at the beginning of ``learn``, if this is part of a callback such as
        SB3's ``EveryNTimesteps``.
    """

    def __init__(
        self,
        freq: int = 10_000,
        folder: str | Path | None = None,
        n_frames: int = 8,
        horizon: int = 20,
        n_segments: int = 2,
        seed: int = 0,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        check_positive(freq=freq, n_frames=n_frames, horizon=horizon, n_segments=n_segments)
        self.freq = freq
        self.folder = None if folder is None else Path(folder)
        self.n_frames = n_frames
        self.horizon = horizon
        self.n_segments = n_segments
        self.seed = seed
        self.n_looks = 0
        self._last_look: int | None = None

    def _on_training_start(self) -> None:
        refuse_events(self)
        if self._last_look is None or self._last_look > self.num_timesteps:  # else the run goes on in another call of `learn`
            self._rng = np.random.default_rng(self.seed)
            self._generator = th.Generator(self.model.device).manual_seed(self.seed)
            self._last_look = self.num_timesteps

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        assert self._last_look is not None
        if self.num_timesteps - self._last_look >= self.freq:
            self._last_look = self.num_timesteps
            self.look()

    def look(self) -> None:
        """Write all pictures now."""
        model: Any = self.model
        frames = model.replay_buffer.sample(max(self.n_frames, 64), 1, self._rng).observations[:, 0].cpu().numpy()
        grid = reconstruction_grid(model, frames[: self.n_frames])
        video = self._video(model.replay_buffer.sample(16 * self.n_segments, self.horizon + 1, self._rng))
        counts = token_counts(model, frames)
        self.n_looks += 1
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = str(self.folder / f"step_{self.num_timesteps}")
            cv2.imwrite(f"{name}_reconstruction.png", grid[:, :, ::-1])
            cv2.imwrite(f"{name}_tokens.png", token_histogram(counts)[:, :, ::-1])
            write_video(f"{name}_imagined.gif", video)
        for output in self.logger.output_formats:
            if isinstance(output, TensorBoardOutputFormat):
                step = self.num_timesteps
                tokens = np.arange(len(counts)).repeat(counts)
                output.writer.add_histogram("world_model/tokens", tokens, step, bins=np.arange(len(counts) + 1) - 0.5)
                gif = io.BytesIO()
                write_video(gif, video)
                # SummaryWriter.add_video would need moviepy, and makes a GIF of it as well
                picture = Summary.Image(height=video.shape[1], width=video.shape[2], colorspace=3)
                picture.encoded_image_string = gif.getvalue()
                summary = Summary(value=[Summary.Value(tag="world_model/imagined", image=picture)])
                assert output.writer.file_writer is not None
                output.writer.file_writer.add_summary(summary, step)
                output.writer.add_image("world_model/reconstruction", grid, step, dataformats="HWC")

    def _video(self, samples: SequenceSamples) -> np.ndarray:
        """The longest of some segments, one above the other; those that end early wait with their last frame."""
        model: Any = self.model
        lengths = samples.mask.sum(1).cpu().numpy()
        videos = []
        for n in np.argsort(-lengths, kind="stable")[: self.n_segments]:
            length = max(int(lengths[n]), 2)  # a segment of one step is shown with the black frame behind it
            segment = [part[n, :length].cpu().numpy() for part in samples[:3]]
            comparison = compare(model, segment[0], segment[1][:-1], segment[2][:-1], generator=self._generator)
            videos.append(comparison_video(comparison))
        longest = max(map(len, videos))
        padded = [np.concatenate([video, video[-1:].repeat(longest - len(video), axis=0)]) for video in videos]
        return np.concatenate(padded, axis=1)


def _tile(image: np.ndarray) -> np.ndarray:
    """(C, H, W) as RGB, its pixels repeated until the shorter side has SHORTEST_SIDE, with a line to tell it from the next."""
    factor = -(-SHORTEST_SIDE // min(image.shape[1:]))
    tile = to_rgb(image).repeat(factor, axis=0).repeat(factor, axis=1)
    tile[-1] = tile[:, -1] = 128
    return tile
