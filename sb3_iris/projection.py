"""How long a run will take."""

import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch as th

from sb3_iris.type_aliases import NETWORKS

if TYPE_CHECKING:
    from sb3_iris.iris import IRIS


@th.no_grad()
def projected_days(model: "IRIS", n_steps: int = 100_000) -> float:
    """
    What a run would take on a CPU, judged by a pass of each network; a rough figure from a fraction of a second.

    :param model: The model with its settings.
    :param n_steps: Env steps of the run.
    :return: Days.
    """
    tokenizer, sequence_length = model.policy.tokenizer, model.sequence_length

    def seconds(function: Callable[[], Any]) -> float:
        times = []
        for _ in range(2):  # the first pass may have to wait for memory and threads
            start = time.perf_counter()
            with model._autocast():
                function()
            times.append(time.perf_counter() - start)
        return min(times)

    tokens = th.zeros(1, sequence_length, tokenizer.tokens_per_frame, dtype=th.int64, device=model.device)
    frame = th.zeros(1, *tokenizer.image_shape, device=model.device)
    encode = seconds(lambda: tokenizer.encode(frame))
    decode = seconds(lambda: tokenizer.decode(tokens[:, 0]))
    observe = 0 if model.policy.actor_critic.sees_codes else decode
    read = seconds(lambda: model.policy.world_model(tokens, tokens[:, :, 0]))
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


def warn_of_days(model: "IRIS") -> None:
    """
    Say so if a run on a CPU would take days.

    :param model: The model with its settings.
    """
    if model.device.type == "cpu" and (days := projected_days(model)) > 1:
        warnings.warn(
            f"A run of the paper's length, 100,000 steps, would take about {days:.0f} days on this CPU at these settings. "
            "Use a GPU, or the small settings that the README gives under 'On a laptop'."
        )
