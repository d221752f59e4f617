"""
Times every part of IRIS on this machine and says what a game of 100,000 steps would take here::

    python benchmarks/speed.py --preset small --out speed.json
    python benchmarks/speed.py --preset paper --batch 8

Arithmetic is what PyTorch counts in matrix products, convolutions and attention; the machine's own rate is that of one large
matrix product in the same run. Real frames are encoded and decoded before the gradient steps are timed, as nearly all are in a
training phase; the projection adds that work once for each frame. The last rows repeat a part the plain way, for a ratio in
the same run.
"""

import argparse
import contextlib
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import DQN
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that `benchmarks` is found when this is run as a script

from benchmarks.runs import machine
from sb3_iris import IRIS
from sb3_iris.actor_critic import sample_categorical
from sb3_iris.atari_wrappers import make_atari_env
from sb3_iris.buffers import seen_bytes
from sb3_iris.compilation import compiles
from sb3_iris.imagination import ImaginedGame
from sb3_iris.imagination_graph import CastWorldModel, capture
from sb3_iris.type_aliases import NETWORKS

GAME = "Pong"
N_STEPS = 100_000  # of the game that is projected
FINAL_EPOCHS = 100  # training phases after it
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"policy_kwargs": {"robust_tokenizer": False}},
    "small": {
        "tokenizer_batch_size": 64,
        "world_model_batch_size": 32,
        "actor_critic_batch_size": 256,
        "sequence_length": 8,
        "imagination_horizon": 8,
        "burn_in": 4,
        "policy_kwargs": {
            "image_size": 32,
            "codebook_size": 128,
            "codebook_dim": 32,
            "tokenizer_channels": 16,
            "channel_multipliers": (1, 1, 1, 1),
            "n_res_blocks": 1,
            "attention_resolutions": (),
            "n_layers": 2,
            "embed_dim": 64,
            "dropout": 0.0,
            "lstm_hidden_size": 128,
            "robust_tokenizer": False,
        },
    },
}


Counting = Callable[[], contextlib.AbstractContextManager[None]]


class Stopwatch:
    """
    Times functions and counts their arithmetic.

    :param device: Where they compute; a GPU is waited for before the clock is read.
    :param repeats: Timed calls of each, after one that is not timed.
    :param parts: Names of the rows that are wanted; None for all.
    :param counting: Makes the context in which arithmetic is counted, which cannot be seen in a CUDA graph.
    """

    def __init__(self, device: th.device, repeats: int, parts: Sequence[str] | None, counting: Counting) -> None:
        self.device = device
        self.repeats = repeats
        self.parts = parts
        self.counting = counting
        self.rows: dict[str, dict[str, Any]] = {}
        size = 2048 if device.type == "cpu" else 8192
        matrix = th.randn(size, size, device=device)
        self.matrix_rate = self._flop(lambda: matrix @ matrix) / self._seconds(lambda: matrix @ matrix)[0]

    def _seconds(self, function: Callable[[], Any]) -> tuple[float, float]:
        """Median and minimum of the timed calls."""
        function()  # compiles, records and loads what it needs
        if self.device.type == "cuda":
            th.cuda.reset_peak_memory_stats(self.device)
        times = []
        for _ in range(self.repeats):
            self._wait()
            start = time.perf_counter()
            function()
            self._wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times), min(times)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            th.cuda.synchronize(self.device)

    def _flop(self, function: Callable[[], Any]) -> int:
        with self.counting(), FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    def measure(self, part: str, function: Callable[[], Any], n_items: int, unit: str) -> float:
        """
        :param part: Name of the row.
        :param function: What to time; it does the same at every call.
        :param n_items: Frames, tokens or steps that a call handles.
        :param unit: What they are.
        :return: Median seconds of a call, NaN if the row is not wanted.
        """
        if self.parts is not None and part not in self.parts:
            return math.nan
        flop = self._flop(function)
        seconds, least = self._seconds(function)
        if self.device.type == "cuda":
            peak = th.cuda.max_memory_allocated(self.device) / 1e9
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        rate = flop / seconds
        self.rows[part] = {
            "seconds": seconds,
            "least_seconds": least,
            "items_per_second": n_items / seconds,
            "unit": unit,
            "gflop_per_second": rate / 1e9,
            "share_of_matrix_rate": rate / self.matrix_rate,
            "peak_memory_gb": peak,
        }
        print(
            f"{part:<34} {seconds:>10.4f} s {n_items / seconds:>12,.1f} {unit + '/s':<9} {rate / 1e9:>8.1f} GFLOP/s "
            f"{rate / self.matrix_rate:>6.1%} {peak:>6.2f} GB",
            flush=True,
        )
        return seconds


@contextlib.contextmanager
def plain(model: IRIS) -> Iterator[None]:
    """Inside, losses and imagination are computed without ``torch.compile`` and CUDA graphs."""
    compile, model.compile = model.compile, False
    try:
        yield
    finally:
        model.compile = compile


class ImaginedSteps:
    """
    The world model's passes of an imagination alone, as in training: no policy, nothing decoded.

    :param model: The model.
    :param batch_size: Games.
    """

    def __init__(self, model: IRIS, batch_size: int) -> None:
        self.model = model
        self.batch_size = batch_size
        self.graph: th.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        model = self.model
        if model.device.type != "cuda" or not model.compile:
            self._play(model._imagined_game(lambda tokens: tokens, model._autocast_dtype))
            return
        if self.graph is None:
            cast = CastWorldModel(model.policy.world_model, model._autocast_dtype, compiles(model.compile, model.device))
            self.graph, _ = capture(lambda: self._play(cast.game(lambda tokens: tokens, cast.refresh())), model.device)
        self.graph.replay()

    def _play(self, game: ImaginedGame) -> None:
        model = self.model
        with model._autocast():
            game.reset(th.zeros(self.batch_size, game.world_model.tokens_per_frame, dtype=th.int64, device=model.device))
            actions = th.zeros(self.batch_size, dtype=th.int64, device=model.device)
            for t in range(model.imagination_horizon):
                game.step(actions, predict_frame=t + 1 < model.imagination_horizon)


@th.no_grad()
def imagine_without_cache(model: IRIS, batch_size: int) -> None:
    """The same the plain way: the whole segment is read anew for every token."""
    world_model, horizon = model.policy.world_model, model.imagination_horizon
    K = world_model.tokens_per_frame
    tokens = th.zeros(batch_size, horizon, K, dtype=th.int64, device=model.device)
    actions = th.zeros(batch_size, horizon, dtype=th.int64, device=model.device)
    for t in range(horizon):
        output = world_model(tokens[:, : t + 1], actions[:, : t + 1])
        sample_categorical(output.reward_logits[:, t])
        sample_categorical(output.end_logits[:, t])
        if t + 1 < horizon:
            for k in range(K):
                logits = world_model(tokens[:, : t + 2], actions[:, : t + 2]).token_logits
                tokens[:, t + 1, k] = sample_categorical(logits[:, (t + 1) * K + k - 1])


def preparation(model: IRIS, encode: float, decode: float) -> float:
    """
    Seconds of a training phase that go into encoding and decoding real frames, in a buffer that is half full.

    :param model: The model.
    :param encode: Seconds to encode a frame.
    :param decode: Seconds to decode one.
    """

    def distinct(draws: float, n: float) -> float:
        return n * (1 - math.exp(-draws / n))

    n_frames = N_STEPS / 2
    burnt_in = model.actor_critic_gradient_steps * model.actor_critic_batch_size * model.burn_in
    read = model.world_model_gradient_steps * model.world_model_batch_size * model.sequence_length
    seconds = encode * distinct(burnt_in + read, n_frames)
    if not model.policy.actor_critic.sees_codes:
        share_kept = min(seen_bytes(model.device) / (4 * math.prod(model.policy.tokenizer.image_shape)) / n_frames, 1)
        seconds += decode * (share_kept * distinct(burnt_in, n_frames) + (1 - share_kept) * burnt_in)
    return seconds


def in_training(model: IRIS, function: Callable[[], Any]) -> Callable[[], None]:
    """The function in the precision of a training phase."""

    def run() -> None:
        with model._autocast():
            function()

    return run


def training_step(model: IRIS, name: str) -> Callable[[], None]:
    """One gradient step of a network, sampling included."""
    network, optimizer = getattr(model.policy, name), getattr(model.policy, f"{name}_optimizer")
    compute_loss = getattr(model, f"_{name}_loss")

    def step() -> None:
        network.train()
        with model._autocast():
            loss, _ = compute_loss()
        optimizer.zero_grad()
        loss.backward()
        th.nn.utils.clip_grad_norm_(network.parameters(), model.max_grad_norm)
        optimizer.step()
        network.eval()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument("--batch", type=int, help="batch size of all three networks, if not that of the preset")
    parser.add_argument("--parts", nargs="+", help="rows to measure, by their names in the table (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each part (default: %(default)s)")
    parser.add_argument("--amp", choices=["auto", "bfloat16", "none"], default="auto", help="precision of training")
    parser.add_argument("--compile", choices=["auto", "true", "false"], default="auto", help="whether training is compiled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()

    if args.repeats < 1 or (args.batch is not None and args.batch < 1):
        parser.error(f"--repeats {args.repeats} --batch {args.batch}: both must be at least 1")
    settings = {**PRESETS[args.preset], **{f"{name}_learning_starts": N_STEPS for name in NETWORKS}}
    if args.batch is not None:
        settings |= {f"{name}_batch_size": args.batch for name in NETWORKS}
    env = make_atari_env(GAME, seed=args.seed)
    model = IRIS(
        "CnnPolicy",
        env,
        buffer_size=10_000,
        # `learn` only collects, the gradient steps are taken below
        final_training_epochs=0,
        perceptual_loss=None,
        seed=args.seed,
        device=args.device,
        amp=None if args.amp == "none" else args.amp,
        compile="auto" if args.compile == "auto" else args.compile == "true",
        **settings,
    )
    watch = Stopwatch(model.device, args.repeats, args.parts, lambda: plain(model))
    precision = str(model._autocast_dtype or th.float32).removeprefix("torch.")
    print(
        f"{args.preset} settings, {precision}, {th.get_num_threads()} threads, "
        f"float32 matrix product {watch.matrix_rate / 1e9:,.0f} GFLOP/s"
    )
    model.learn(1, log_interval=None)  # prepares collections
    callback = model._init_callback(None)
    env.reset()
    watch.measure("env step", lambda: env.step(np.zeros(1, dtype=np.int64)), 1, "step")
    collection = watch.measure("collection", lambda: model.collect_rollouts(callback, 50), 50, "step")
    dqn = DQN("CnnPolicy", env, buffer_size=1_000, learning_starts=10**9, seed=args.seed, device=args.device)
    watch.measure("collection of SB3's DQN", lambda: dqn.learn(50, log_interval=10**9), 50, "step")
    model.learn(400, log_interval=None, reset_num_timesteps=False)
    observation = np.asarray(env.reset())
    watch.measure("predict", lambda: model.predict(observation), 1, "frame")

    policy = model.policy
    batch_size = model.actor_critic_batch_size
    frames = policy.to_frames(model.replay_buffer.sample(model.tokenizer_batch_size, 1, model._rng).observations[:, 0])
    tokens = policy.tokenizer.encode(frames)
    encode = watch.measure("encode", in_training(model, lambda: policy.tokenizer.encode(frames)), len(frames), "frame")
    decode = watch.measure("decode", in_training(model, lambda: policy.tokenizer.decode(tokens)), len(frames), "frame")

    buffer = model.replay_buffer
    for _ in range(20 * buffer.size() // (batch_size * max(model.burn_in, 1)) + 1):
        buffer.sample_contexts(batch_size, model.burn_in, model._rng, model._encode, policy.observe)
    steps = {}
    steps["tokenizer"] = watch.measure("tokenizer step", training_step(model, "tokenizer"), len(frames), "frame")
    n_positions = model.world_model_batch_size * model.sequence_length * (policy.tokenizer.tokens_per_frame + 1)
    steps["world_model"] = watch.measure("world-model step", training_step(model, "world_model"), n_positions, "token")
    n_imagined = batch_size * model.imagination_horizon
    cached = watch.measure("imagined Transformer steps", ImaginedSteps(model, batch_size), n_imagined, "step")
    steps["actor_critic"] = watch.measure("actor-critic step", training_step(model, "actor_critic"), n_imagined, "step")
    anew = watch.measure(
        "imagined steps without a cache", lambda: imagine_without_cache(model, batch_size), n_imagined, "step"
    )

    phase = sum(seconds * getattr(model, f"{name}_gradient_steps") for name, seconds in steps.items())
    phase += preparation(model, encode / len(frames), decode / len(frames))
    played = collection / 50
    hours = (phase * (N_STEPS / model.train_freq + FINAL_EPOCHS) + played * N_STEPS) / 3600
    if args.parts is None:
        print(f"The cache makes imagined Transformer steps {anew / cached:.1f} times as fast as reading all anew")
        print(f"A whole epoch: {phase + played * model.train_freq:.1f} s; {N_STEPS:,} steps: {hours:,.1f} hours")
        if model.device.type == "cuda":  # CUDA graphs keep theirs; what a part allocates does not show it
            print(f"Memory of the GPU taken in all: {th.cuda.max_memory_reserved(model.device) / 1e9:.1f} GB")
    if not watch.rows:
        parser.error(f"--parts {args.parts}: the table has no such row")
    if args.out is not None:
        result = {
            "command": sys.argv[1:],
            "precision": precision,
            "matrix_gflop_per_second": watch.matrix_rate / 1e9,
            "hours": hours if args.parts is None else None,
        }
        args.out.write_text(json.dumps({**machine(), **result, "parts": watch.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
