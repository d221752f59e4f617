"""Bad input is refused before anything is trained, with the argument's name, its value and the way out."""

import re
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticCnnPolicy

from sb3_iris import IRIS, CnnLstmPolicy
from tests.presets import NETWORKS, NO_TRAINING, FrameEnv, frame_envs, tiny

NAN, INF = float("nan"), float("inf")
IMAGE = spaces.Box(0, 255, (8, 8, 3), np.uint8)


class SpacesEnv(gym.Env):
    """Nothing but its spaces."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space = observation_space
        self.action_space = action_space


@pytest.mark.parametrize(
    "action_space",
    [
        spaces.Box(-1, 1, (2,), np.float32),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiBinary(3),
        spaces.Discrete(3, start=1),
        spaces.Dict({"a": spaces.Discrete(2)}),
    ],
)
def test_actions(action_space):
    with pytest.raises(ValueError, match=r"actions .*Discrete") as error:
        tiny(SpacesEnv(IMAGE, action_space))
    assert str(action_space) in str(error.value)


@pytest.mark.parametrize(
    "observation_space",
    [
        spaces.Dict({"image": IMAGE}),
        spaces.Tuple([IMAGE]),
        spaces.Discrete(5),
        spaces.Box(0, 255, (4,), np.uint8),
        spaces.Box(0, 255, (8, 8), np.uint8),
        spaces.Box(0, 255, (2, 8, 8, 3), np.uint8),
        spaces.Box(0, 255, (8, 8, 3), np.float32),
        spaces.Box(0, 1, (8, 8, 3), np.float32),
        spaces.Box(0, 255, (8, 8, 3), np.int64),
        spaces.Box(0, 1, (8, 8, 3), np.uint8),
        spaces.Box(-1, 1, (8, 8, 3), np.float32),
    ],
)
def test_observations(observation_space):
    with pytest.raises(ValueError, match=r"observations .*uint8.*Wrap the environment") as error:
        tiny(SpacesEnv(observation_space, spaces.Discrete(2)))
    assert str(observation_space) in str(error.value)


def test_no_env():
    with pytest.raises(ValueError, match=r"env=None: give an environment"):
        tiny(None)


@pytest.mark.parametrize("policy", ["MlpPolicy", "MultiInputPolicy", "cnnpolicy", ""])
def test_policy_names(policy):
    with pytest.raises(ValueError, match=rf"policy='{policy}'.*'CnnLstmPolicy', 'CnnPolicy'"):
        IRIS(policy, FrameEnv())


@pytest.mark.parametrize("policy", [ActorCriticCnnPolicy, int, CnnLstmPolicy.predict])
def test_policy_classes(policy):
    with pytest.raises(ValueError, match=r"policy=.*subclass of CnnLstmPolicy"):
        IRIS(policy, FrameEnv())


def cases(names: list[str], values: list[Any], way_out: str) -> list[tuple[str, Any, str]]:
    return [(name, value, way_out) for name in names for value in values]


POSITIVE = ["buffer_size", "train_freq", "stats_window_size", *(f"{network}_batch_size" for network in NETWORKS)]
NOT_NEGATIVE = [f"{network}_{what}" for network in NETWORKS for what in ("gradient_steps", "learning_starts")]
NO_INTEGERS = [1.5, 10.0, "10", None, NAN, INF, True, (5,)]


@pytest.mark.parametrize(
    "name, value, way_out",
    [
        *cases(POSITIVE, [0, -1, *NO_INTEGERS], "whole number of at least 1"),
        *cases([*NOT_NEGATIVE, "burn_in", "final_training_epochs"], [-1, *NO_INTEGERS], "whole number of at least 0"),
        *cases(["sequence_length", "imagination_horizon"], [1, 0, -5, *NO_INTEGERS], "whole number of at least 2"),
        *cases(
            [
                "gamma",
                "gae_lambda",
                "exploration_rate",
                "world_model_recent_share",
                "actor_critic_recent_share",
                "rewarded_share",
            ],
            [-0.1, 1.001, NAN, INF, None, "0.9", [0.9]],
            r"in \[0, 1\]",
        ),
        *cases(
            ["ent_coef", "temperature", "eval_temperature", "world_model_weight_decay"],
            [-1e-9, NAN, INF, None, "1", 1j],
            "finite number of at least 0",
        ),
        *cases(["tokenizer_learning_stops"], [4, 0, -1, 9.0, "9", NAN], "above tokenizer_learning_starts=4, or None"),
        *cases(["max_grad_norm"], [0, -1.0, NAN, None, "1"], "above 0.*inf.* does not clip"),
        *cases(["learning_rate"], [-1e-4, NAN, INF, None, "1e-4"], "finite number of at least 0, or a schedule"),
        *cases(["seed"], [-1, 2**32, 1.5, "1", True], "from 0 to 4294967295, or None"),
        *cases(["uniform_replay", "repeat_exploration"], [1, 0, None, "True"], "True or False"),
        *cases(["perceptual_loss"], ["LPIPS", "vgg", 3], "'auto', 'lpips', None or a function"),
    ],
)
def test_hyperparameters(name, value, way_out):
    with pytest.raises(ValueError, match=rf"{name}.*{way_out}") as error:
        tiny(FrameEnv(), **{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("gamma", 0),
        ("gamma", 1),
        ("gae_lambda", 0.0),
        ("exploration_rate", np.float32(0.5)),
        ("ent_coef", 0),
        ("temperature", 0),
        ("max_grad_norm", INF),
        ("learning_rate", 0.0),
        ("burn_in", 0),
        ("sequence_length", 2),
        ("imagination_horizon", np.int64(2)),
        ("imagination_horizon", 9),  # longer than the context
        ("final_training_epochs", 0),
        ("tokenizer_learning_starts", 0),
        ("train_freq", 1),
        ("seed", np.int64(2**32 - 1)),
        ("policy_kwargs", {"dropout": 0.0}),
        ("policy_kwargs", {"n_heads": 1}),
        ("policy_kwargs", {"codebook_size": 1}),
        ("policy_kwargs", {"channel_multipliers": (1,), "image_size": 5}),
        ("policy_kwargs", {"channel_multipliers": [1, 2], "tokenizer_channels": 3}),
        ("policy_kwargs", {"latent_channels": 5}),
        ("policy_kwargs", {"attention_resolutions": (8, 4, 2)}),
    ],
)
def test_values_at_the_edge_work(name, value):
    model = tiny(FrameEnv(), **{name: value}).learn(5)
    assert model.num_timesteps == 5


@pytest.mark.parametrize(
    "n_envs, kwargs, least",
    [
        (1, {"buffer_size": 3}, 4),
        (1, {"buffer_size": 10, "burn_in": 10}, 11),
        (3, {"buffer_size": 11}, 12),
        (2, {"buffer_size": 19, "sequence_length": 10}, 20),
    ],
)
def test_small_buffers(n_envs, kwargs, least):
    with pytest.raises(ValueError, match=rf"buffer_size={kwargs['buffer_size']} .*at least {least}$"):
        tiny(frame_envs(n_envs), **kwargs)
    model = tiny(frame_envs(n_envs), **{**kwargs, "buffer_size": least}, final_training_epochs=0)
    model.learn(3 * least)  # and with that the buffer is overwritten and trained on
    assert model.replay_buffer.full


SIZES = ["image_size", "codebook_size", "codebook_dim", "latent_channels", "tokenizer_channels", "n_res_blocks"]
SIZES += ["n_layers", "n_heads", "embed_dim", "lstm_hidden_size"]


@pytest.mark.parametrize(
    "name, value, pattern",
    [
        *cases(SIZES, [0, -8, 8.0, "8", True, (8, 8)], "whole number of at least 1"),
        ("codebook_size", None, "whole number of at least 1"),
        ("image_size", 10, r"10x10.*channel_multipliers=\(1, 1, 1\).*divisible by 4"),
        ("n_heads", 3, r"n_heads=3.*embed_dim=16.*multiple"),
        ("embed_dim", 17, r"n_heads=2.*embed_dim=17.*multiple"),
        *cases(["dropout"], [-0.1, 1, 1.5, NAN, None, "0.1"], r"number in \[0, 1\)"),
        ("channel_multipliers", (), "one multiplier per level"),
        ("channel_multipliers", (1, 0), r"channel_multipliers\[1\]=0.*whole number of at least 1"),
        ("channel_multipliers", (1.5, 1), r"channel_multipliers\[0\]=1.5.*whole number of at least 1"),
        ("channel_multipliers", 3, "sequence of whole numbers"),
        ("attention_resolutions", 8, "sequence of whole numbers"),
        ("attention_resolutions", (8, -1), r"attention_resolutions\[1\]=-1.*whole number of at least 1"),
        *cases(["actor_critic_input"], ["code", None, True], "must be 'frames', 'codes' or 'auto'"),
        # no such sizes, or arguments of IRIS itself
        *cases(["n_layer", "net_arch", "sequence_length", "weight_decay"], [4], "among image_size, codebook_size,.*n_layers"),
    ],
)
def test_policy_kwargs(name, value, pattern):
    with pytest.raises(ValueError, match=pattern) as error:
        tiny(FrameEnv(), policy_kwargs={name: value})
    assert name in str(error.value)
    if not isinstance(value, tuple):
        assert re.search(rf"\b{re.escape(str(value))}|{re.escape(repr(value))}", str(error.value))


@pytest.mark.parametrize("value", ["image_size=8", 8, [("image_size", 8)]])
def test_policy_kwargs_that_are_no_dict(value):
    with pytest.raises(ValueError, match=rf"policy_kwargs={re.escape(repr(value))} must be a dict"):
        IRIS("CnnPolicy", FrameEnv(), policy_kwargs=value)


def test_image_size_of_the_env():
    """``image_size=None`` keeps the size of the environment, which must be divisible as well."""

    class Env(FrameEnv):
        observation_space = spaces.Box(0, 255, (8, 10, 3), np.uint8)

    with pytest.raises(ValueError, match=r"image_size.*8x10.*divisible by 4"):
        tiny(Env(), policy_kwargs={"image_size": None})


@pytest.mark.parametrize(
    "height, width, whole", [(8, 8, True), (16, 24, True), (8, 10, False), (4, 8, False), (12, 12, False)]
)
def test_patches_of_resized_images(height: int, width: int, whole: bool) -> None:
    """A tile stays one only where a pixel is the mean of whole ones; else patches would be blurred, and no two alike."""

    class Env(FrameEnv):
        observation_space = spaces.Box(0, 255, (height, width, 3), np.uint8)

    patches = {"patch_tokenizer": True, "channel_multipliers": (1, 1)}
    if whole:
        tiny(Env(), policy_kwargs={**patches, "image_size": 8})
    else:
        with pytest.raises(ValueError, match=rf"image_size=8\b.*patch_tokenizer=True.*{height}x{width}.*image_size=None"):
            tiny(Env(), policy_kwargs={**patches, "image_size": 8})
    tiny(Env(), policy_kwargs={**patches, "image_size": None})


def test_days_on_a_cpu() -> None:
    """Settings with which a run takes days are said to."""
    never: dict[str, Any] = {f"{network}_learning_starts": 10**9 for network in NETWORKS} | {"final_training_epochs": 0}
    for n_steps, warned in ((10**12, True), (0, False)):
        gradient_steps: dict[str, Any] = {f"{network}_gradient_steps": n_steps for network in NETWORKS}
        model = tiny(FrameEnv(), **never, **gradient_steps)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.learn(4)
        assert any("would take about" in str(warning.message) for warning in caught) == warned


@pytest.mark.parametrize(
    "kwargs",
    [
        *({"total_timesteps": value} for value in (-1, NAN, INF, None, "10")),
        *({"total_timesteps": 4, "log_interval": value} for value in (0, -1, 1.5, "1")),
    ],
)
def test_learn(kwargs):
    env = FrameEnv()
    model = tiny(env, **NO_TRAINING)
    name, value = list(kwargs.items())[-1]
    with pytest.raises(ValueError, match=rf"{name}={re.escape(repr(value))} must be"):
        model.learn(**kwargs)
    assert env.n_steps == 0


@pytest.mark.parametrize("env", [FrameEnv, lambda: FrameEnv(), 3, gym.vector.SyncVectorEnv([FrameEnv])])
def test_no_environment(env: Any) -> None:
    """A class, a function that makes one, and a vector environment of Gymnasium's, which is none of SB3's."""
    with pytest.raises(ValueError, match=r"env=.* is no Gymnasium environment, no VecEnv of SB3's and no name of one"):
        tiny(env)
