"""How long a run will take."""

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch as th

from sb3_iris.type_aliases import NETWORKS

if TYPE_CHECKING:
    from sb3_iris.iris import IRIS

QUICK = 0.02  # seconds of a pass of one sample, below which passes of several are timed
MANY = 16  # samples


@th.no_grad()
def projected_days(model: "IRIS", n_steps: int = 100_000) -> float:
    """
    What a run would take on a CPU, judged by a pass of each network; a rough figure from a fraction of a second.

    :param model: The model with its settings.
    :param n_steps: Env steps of the run.
    :return: Days.
    """
    tokenizer, sequence_length = model.policy.tokenizer, model.sequence_length
    tokens = th.zeros(MANY, sequence_length, tokenizer.tokens_per_frame, dtype=th.int64, device=model.device)
    frames = th.zeros(MANY, *tokenizer.image_shape, device=model.device)

    def seconds(function: Callable[[int], Any]) -> float:
        n_samples = 1
        best = math.inf
        for _ in range(3):  # the first pass of a kind may have to wait for memory and threads
            start = time.perf_counter()
            with model._autocast():
                function(n_samples)
            best = min(best, (time.perf_counter() - start) / n_samples)
            # Of a small network one sample would tell what the calls of PyTorch cost, and not the arithmetic
            n_samples = MANY if best < QUICK else 1
        return best

    encode = seconds(lambda n: tokenizer.encode(frames[:n]))
    decode = seconds(lambda n: tokenizer.decode(tokens[:n, 0]))
    observe = 0 if model.policy.actor_critic.sees_codes else decode
    read = seconds(lambda n: model.policy.world_model(tokens[:n], tokens[:n, :, 0]))
    # A gradient step costs about three passes. Frames are encoded once; those burnt in count as if each were decoded each
    # time; imagining a step costs more than reading it, and the small actor-critic adds its part
    per_sample = {
        "tokenizer": 3 * (encode + decode),
        "world_model": 3 * read,
        "actor_critic": 2 * model.imagination_horizon * (read / sequence_length + observe) + model.burn_in * observe,
    }
    epochs = n_steps / model.train_freq + model.final_training_epochs
    samples = {name: getattr(model, f"{name}_batch_size") * getattr(model, f"{name}_gradient_steps") for name in NETWORKS}
    return epochs * sum(per_sample[name] * samples[name] for name in NETWORKS) / 86_400
