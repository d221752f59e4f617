"""Saving and loading models, parameters, policies and replay buffers."""

import copy
import io
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.save_util import save_to_pkl
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_iris import IRIS, CnnLstmPolicy
from tests.presets import (
    NETWORKS,
    NO_TRAINING,
    SETTINGS,
    SIZE,
    SIZES,
    FrameEnv,
    GradientSteps,
    assert_equal,
    decided,
    differing,
    frame_env,
    frame_envs,
    parameters,
    steps_in_buffer,
    tiny,
)


@pytest.fixture(scope="module")
def trained() -> IRIS:
    """A model after 12 steps; tests must leave it as it is."""
    return tiny(FrameEnv(), learning_rate=2e-4, gamma=0.9, eval_temperature=0.7).learn(12)


@pytest.fixture
def file(trained, tmp_path):
    trained.save(tmp_path / "model.zip")
    return tmp_path / "model.zip"


def play(model: IRIS, n_steps: int = 20, deterministic: bool = True) -> np.ndarray:
    """The LSTM states of a game with given frames, (n_steps, 2, hidden)."""
    rng, state, states = np.random.default_rng(3), None, []
    for _ in range(n_steps):
        frame = rng.integers(256, size=(SIZE, SIZE, 3), dtype=np.uint8)
        _, state = model.policy.predict(frame, state, deterministic=deterministic)
        states.append(np.concatenate(state)[:, 0])
    return np.array(states)


@pytest.mark.parametrize("kind", ["str", "path", "no suffix", "bytes", "open file"])
def test_all_kinds_of_files(trained, kind, tmp_path):
    path = tmp_path / ("model" if kind == "no suffix" else "model.zip")
    if kind == "bytes":
        target = io.BytesIO()
        trained.save(target)
        loaded = IRIS.load(io.BytesIO(target.getvalue()), device="cpu")
    elif kind == "open file":
        with open(path, "wb") as target:
            trained.save(target)
        with open(path, "rb") as source:
            loaded = IRIS.load(source, device="cpu")
            assert not source.closed
    else:
        trained.save(str(path) if kind == "str" else path)
        loaded = IRIS.load(str(path) if kind == "str" else path, device="cpu")
    assert (tmp_path / "model.zip").is_file() == (kind != "bytes")
    # the three optimizers' states are among them
    assert {name.split(".")[0] for name in parameters(trained)} == {*NETWORKS, *(f"{name}_optimizer" for name in NETWORKS)}
    assert_equal(parameters(trained), parameters(loaded))
    np.testing.assert_array_equal(play(trained), play(loaded))


def test_hyperparameters_and_counters(trained, file):
    loaded = IRIS.load(file, device="cpu")
    names = vars(trained).keys() - {*trained._excluded_save_params(), "lr_schedule", "ep_info_buffer", "_rng", "_last_obs"}
    assert {"gamma", "num_timesteps", "_n_updates", "learning_rate", "policy_kwargs", "world_model_batch_size"} <= names
    different = [name for name in names if np.any(getattr(trained, name) != getattr(loaded, name))]
    assert not different
    assert loaded.gamma == 0.9 and loaded.num_timesteps == 12 and loaded._n_updates == 12
    assert loaded.policy.eval_temperature == 0.7
    assert [info["l"] for info in loaded.ep_info_buffer] == [5, 5]
    assert {group["lr"] for group in loaded.policy.world_model_optimizer.param_groups} == {2e-4}


def test_loaded_model_goes_on_as_if_never_saved(file, trained, tmp_path):
    """Loaded with its replay buffer and seeded alike, a model learns bit for bit what the one in memory learns."""
    trained.save_replay_buffer(tmp_path / "buffer")
    runs = []
    for _ in range(2):
        model = IRIS.load(file, env=FrameEnv(), device="cpu")
        assert model.replay_buffer.size() == 0
        model.load_replay_buffer(tmp_path / "buffer")
        assert_equal(steps_in_buffer(model), steps_in_buffer(trained))
        runs.append(model)
    original = tiny(FrameEnv(), learning_rate=2e-4, gamma=0.9, eval_temperature=0.7).learn(12)
    assert_equal(parameters(original), parameters(trained))
    original._last_obs = None  # loading a buffer begins a new episode
    for model in (original, *runs):
        model.set_env(FrameEnv())
        model.set_random_seed(7)
        before = parameters(model)
        model.learn(8, reset_num_timesteps=False)
        assert model.num_timesteps == 20
        assert differing(before, parameters(model)) >= set(NETWORKS)
    for model in runs:
        assert_equal(parameters(original), parameters(model))
        assert_equal(steps_in_buffer(original), steps_in_buffer(model))


def test_other_weight_decay(tmp_path):
    """It holds from then on, whatever the optimizer was saved with."""
    model = tiny(FrameEnv()).learn(8)
    model.save(tmp_path / "model")
    model.save_checkpoint(tmp_path / "run")
    for load, path in ((IRIS.load, "model"), (IRIS.resume, "run")):
        ends = []
        for kwargs in ({}, {"world_model_weight_decay": 0.5}):
            loaded = load(tmp_path / path, env=FrameEnv(), device="cpu", **kwargs).learn(8, reset_num_timesteps=False)
            ends.append(parameters(loaded))
        assert [group["weight_decay"] for group in loaded.policy.world_model_optimizer.param_groups] == [0.5, 0.0]
        assert "world_model" in differing(*ends)


def test_optimizers_matter(file):
    """The test above can see a lost optimizer state: without one, the next steps are others."""
    runs = []
    for forget in (False, True):
        model = IRIS.load(file, env=FrameEnv(), device="cpu")
        if forget:
            for name in NETWORKS:
                getattr(model.policy, f"{name}_optimizer").state.clear()
        runs.append(parameters(model.learn(8, reset_num_timesteps=False)))
    assert differing(*runs) >= set(NETWORKS)


def test_parameters_of_another_model(trained):
    other = tiny(FrameEnv(), seed=5)
    assert set(trained.get_parameters()) == {"policy", *(f"policy.{name}_optimizer" for name in NETWORKS)}
    other.set_parameters(trained.get_parameters())
    assert_equal(parameters(other), parameters(trained))


def test_parameters_from_file(trained, file):
    other = tiny(FrameEnv(), seed=5)
    other.set_parameters(str(file))
    assert_equal(parameters(other), parameters(trained))


def test_some_parameters(trained):
    other = tiny(FrameEnv(), seed=5)
    before = parameters(other)
    actor = {name: value for name, value in trained.policy.state_dict().items() if name.startswith("actor_critic.actor")}
    other.set_parameters({"policy": actor}, exact_match=False)
    changed = {name for name, value in parameters(other).items() if not th.equal(value, before[name])}
    assert changed == {"actor_critic.actor.weight", "actor_critic.actor.bias"}
    with pytest.raises(ValueError, match="Names of parameters do not match"):
        other.set_parameters({"policy": trained.policy.state_dict()})
    with pytest.raises(ValueError, match="nonsense"):
        other.set_parameters({"nonsense": {}})
    with pytest.raises(RuntimeError, match=r"Missing key.*codebook"):
        other.set_parameters({"policy": actor})


def test_exclude(trained, tmp_path):
    trained.save(tmp_path / "model", exclude=["learning_rate", "gamma"])
    loaded = IRIS.load(tmp_path / "model")
    assert loaded.learning_rate == 1e-4 and loaded.gamma == 0.995  # the defaults
    assert loaded.ent_coef == trained.ent_coef
    assert_equal(parameters(trained), parameters(loaded))


def test_replay_buffer_of_another_machine(tmp_path):
    """One that was on a GPU goes to where the model is loaded, also where there is no GPU."""
    model = tiny(FrameEnv()).learn(8)
    model.replay_buffer.device = th.device("cuda")
    model.save(tmp_path / "model", include=["replay_buffer"])
    loaded = IRIS.load(tmp_path / "model", env=FrameEnv(), device="cpu")
    assert loaded.replay_buffer.size() == 8
    assert loaded.learn(4, reset_num_timesteps=False).replay_buffer.size() == 12


def test_include_replay_buffer(trained, tmp_path):
    trained.save(tmp_path / "model", include=["replay_buffer"])
    loaded = IRIS.load(tmp_path / "model", env=FrameEnv())
    assert_equal(steps_in_buffer(trained), steps_in_buffer(loaded))
    loaded.learn(4, reset_num_timesteps=False)
    assert loaded.replay_buffer.size() == 16
    assert loaded.replay_buffer.episode_starts[:16, 0].tolist() == ([True] + 4 * [False]) * 2 + 2 * [True, False] + 2 * [False]
    # it says nothing about other environments
    assert IRIS.load(tmp_path / "model", env=frame_envs(2)).replay_buffer.size() == 0
    with pytest.warns(UserWarning, match="is of 300 steps and stays so, whatever buffer_size says"):
        assert IRIS.load(tmp_path / "model", env=FrameEnv(), buffer_size=50).replay_buffer.buffer_size == 300


def test_custom_objects_and_keywords(file):
    loaded = IRIS.load(file, env=FrameEnv(), custom_objects={"learning_rate": 5e-3, "train_freq": 6}, gamma=0.5)
    assert loaded.gamma == 0.5
    steps = GradientSteps(loaded)
    loaded.learn(6, reset_num_timesteps=False)
    assert steps.learning_rates == [5e-3] * 6  # one epoch and a final phase
    with pytest.raises(ValueError, match=r"gamma=2"):
        IRIS.load(file, gamma=2)
    assert IRIS.load(file, stats_window_size=7, env=FrameEnv()).learn(4).ep_info_buffer.maxlen == 7
    for changes in ({"sequence_length": 5}, {"custom_objects": {"sequence_length": 5}}):
        with pytest.raises(ValueError, match="sequence_length=5 cannot be changed: it is 4"):
            IRIS.load(file, **changes)
    assert IRIS.load(file, sequence_length=4).sequence_length == 4
    with pytest.raises(ValueError, match=r"gama, temprature: IRIS has no such argument"):
        IRIS.load(file, temprature=2, gama=0.5)


def test_device(file):
    loaded = IRIS.load(file, device="cpu")
    assert loaded.device == th.device("cpu") and loaded.policy.device == th.device("cpu")
    assert loaded.replay_buffer.device == th.device("cpu")


def test_policy_kwargs(file, trained):
    IRIS.load(file, policy_kwargs=trained.policy_kwargs)
    IRIS.load(file, policy_kwargs=SIZES)  # as they were given, with tuples, which the file has as lists
    with pytest.raises(ValueError, match="policy kwargs"):
        IRIS.load(file, policy_kwargs={**trained.policy_kwargs, "embed_dim": 32})
    with pytest.raises(RuntimeError, match="size mismatch"):
        IRIS.load(file, custom_objects={"policy_kwargs": {**trained.policy_kwargs, "embed_dim": 32}})


@pytest.mark.parametrize("n_envs", [2, 3])
def test_other_number_of_envs(file, n_envs):
    env = frame_envs(n_envs)
    loaded = IRIS.load(file, env=env)
    assert loaded.n_envs == n_envs
    loaded.learn(12, reset_num_timesteps=False)
    assert loaded.num_timesteps == 24
    assert frame_env(env).n_steps == loaded.replay_buffer.size() == 12 // n_envs


def test_load_without_env(file, trained):
    loaded = IRIS.load(file, device="cpu")
    assert loaded.get_env() is None
    np.testing.assert_array_equal(play(loaded), play(trained))
    with pytest.raises(ValueError, match=r"env=None.*set_env"):
        loaded.learn(4)
    loaded.set_env(FrameEnv())
    loaded.learn(4)
    assert loaded.num_timesteps == 4


def test_set_env():
    first, second = frame_envs(), frame_envs()
    model = tiny(first, **NO_TRAINING)
    model.learn(3)
    model.set_env(second)
    model.learn(4, reset_num_timesteps=False)
    assert (frame_env(first).n_steps, frame_env(second).n_steps) == (3, 4)
    # the new environment begins with an episode of its own
    assert model.replay_buffer.episode_starts[:7, 0].tolist() == [True, False, False, True, False, False, False]
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(frame_envs(2))

    class MoreActions(FrameEnv):
        def __init__(self) -> None:
            super().__init__()
            self.action_space = gym.spaces.Discrete(4)

    with pytest.raises(ValueError, match="Action space"):
        model.set_env(MoreActions())


def test_env_of_other_spaces(file):
    class LargerFrames(FrameEnv):
        observation_space = gym.spaces.Box(0, 255, (16, 16, 3), np.uint8)

    with pytest.raises(ValueError, match="Observation space"):
        IRIS.load(file, env=LargerFrames())


def test_file_of_another_algorithm(tmp_path):
    PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu").save(tmp_path / "ppo.zip")
    with pytest.raises(ValueError, match=r"ppo\.zip.*not saved by IRIS"):
        IRIS.load(tmp_path / "ppo.zip")
    with pytest.raises(ValueError, match=r"ppo.*not saved by IRIS"):
        IRIS.load(str(tmp_path / "ppo"))


@pytest.mark.parametrize("content", [b"", b"x" * 1000, pickle.dumps({"a": 1})])
def test_file_that_is_no_model(content, tmp_path):
    path = tmp_path / "model.zip"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.zip.*not saved by IRIS"):
        IRIS.load(path)
    with pytest.raises(ValueError, match=r"not saved by IRIS"):
        IRIS.load(io.BytesIO(content))


def test_missing_files(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        IRIS.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tiny(FrameEnv()).load_replay_buffer(tmp_path / "nowhere")


@pytest.mark.parametrize("n_steps", [0, 7, 30])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_replay_buffer(n_steps, as_bytes, tmp_path):
    """Empty, partly filled and overwritten ones; the file is as large as what is in the buffer."""
    model = tiny(frame_envs(2), buffer_size=20, **NO_TRAINING)
    model.learn(2 * n_steps)
    target = io.BytesIO() if as_bytes else tmp_path / "buffer.pkl"
    model.save_replay_buffer(target)
    if isinstance(target, io.BytesIO):
        target.seek(0)
    other = tiny(frame_envs(2), buffer_size=200, seed=1, **NO_TRAINING)
    other.learn(6)
    other.load_replay_buffer(target)
    assert other.replay_buffer.size() == min(n_steps, 10)
    assert other.replay_buffer.pos == model.replay_buffer.pos
    if n_steps:
        assert_equal(steps_in_buffer(model), steps_in_buffer(other))
        np.testing.assert_array_equal(model.replay_buffer.episodes, other.replay_buffer.episodes)
    n_episodes = len(other.replay_buffer.episodes)
    other.learn(2, reset_num_timesteps=False)  # what follows in the buffer is a new episode
    newest = other.replay_buffer.episode_starts[(other.replay_buffer.pos - 1) % 10]
    assert newest.all()
    assert len(other.replay_buffer.episodes) >= min(n_episodes, 2)


@pytest.mark.parametrize("at", ["_on_training_start", "_on_step", "_on_rollout_end"])
def test_replay_buffer_loaded_by_a_callback(at, trained, tmp_path):
    """The run goes on behind what is in the file, with a new episode."""
    trained.save_replay_buffer(tmp_path / "buffer")
    model = tiny(FrameEnv())

    class Load(BaseCallback):
        def _on_step(self) -> bool:
            return True

    def load() -> bool:
        if model.num_timesteps in (0, 2, 4) and model.replay_buffer.size() < 12:
            model.load_replay_buffer(tmp_path / "buffer")
        return True

    callback = Load()
    setattr(callback, at, load)
    model.learn(8, callback)
    buffer = model.replay_buffer
    assert model.num_timesteps == 8 and 12 + 4 <= buffer.size() <= 12 + 8
    assert_equal({name: value[:12] for name, value in steps_in_buffer(model).items()}, steps_in_buffer(trained))
    assert buffer.episode_starts[12] and buffer.observations[12, 0, 0, 0, 0] == 0  # the first frame of an episode
    assert buffer.observations[13, 0, 0, 0, 0] == 1 and not buffer.episode_starts[13]


def test_size_of_replay_buffer_file(tmp_path):
    model = tiny(FrameEnv(), buffer_size=10_000, **NO_TRAINING).learn(10)
    model.save_replay_buffer(tmp_path / "buffer")
    assert (tmp_path / "buffer.pkl").stat().st_size < 10 * SIZE * SIZE * 3 + 5_000


def test_replay_buffer_that_does_not_fit(trained, tmp_path):
    trained.save_replay_buffer(tmp_path / "buffer")
    with pytest.raises(ValueError, match=r"n_envs.*\(1, .*\(2, "):
        tiny(frame_envs(2)).load_replay_buffer(tmp_path / "buffer")
    with pytest.raises(ValueError, match=r"\(3, 8, 8\).*\(3, 16, 16\).*image_size"):
        tiny(FrameEnv(), policy_kwargs={"image_size": 16}).load_replay_buffer(tmp_path / "buffer")

    class MoreActions(FrameEnv):
        def __init__(self) -> None:
            super().__init__()
            self.action_space = gym.spaces.Discrete(4)

    model = tiny(MoreActions())
    buffer = model.replay_buffer
    with pytest.raises(ValueError, match="actions"):
        model.load_replay_buffer(tmp_path / "buffer")
    assert model.replay_buffer is buffer  # as it was


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\x80\x05random", b"cnowhere\nNothing\n."])
def test_file_that_is_no_replay_buffer(content, tmp_path):
    (tmp_path / "buffer.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"buffer\.pkl.*save_replay_buffer"):
        tiny(FrameEnv()).load_replay_buffer(tmp_path / "buffer.pkl")


def test_replay_buffer_of_another_algorithm(tmp_path):
    env = DummyVecEnv([FrameEnv])
    buffer = ReplayBuffer(10, env.observation_space, env.action_space, device="cpu")
    save_to_pkl(tmp_path / "buffer", buffer)
    with pytest.raises(ValueError, match=r"buffer.*not a file saved by save_replay_buffer"):
        tiny(env).load_replay_buffer(tmp_path / "buffer")


def test_policy_alone(trained, tmp_path):
    trained.policy.save(tmp_path / "policy.pt")
    policy = CnnLstmPolicy.load(tmp_path / "policy.pt")
    assert_equal(trained.policy.state_dict(), policy.state_dict())
    frame = FrameEnv().reset(seed=0)[0]
    for ours, theirs in zip(
        trained.predict(frame, deterministic=True), policy.predict(frame, deterministic=True), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert policy.eval_temperature == 0.7


def test_custom_policy(tmp_path):
    """A subclass with one more argument, saved and loaded with the model."""

    class Policy(CnnLstmPolicy):
        def __init__(self, *args, note: str = "", **kwargs):
            super().__init__(*args, **kwargs)
            self.note = note

    kwargs = {**tiny(FrameEnv()).policy_kwargs, "note": "hello"}
    model = IRIS(Policy, FrameEnv(), policy_kwargs=kwargs, perceptual_loss=None, device="cpu")
    model.save(tmp_path / "model")
    loaded = IRIS.load(tmp_path / "model", env=FrameEnv())
    assert type(loaded.policy).__name__ == "Policy" and loaded.policy.note == "hello"


def test_robust_tokenizer(tmp_path):
    """What its quantizer counts comes back as well."""
    model = tiny(FrameEnv(), policy_kwargs={"robust_tokenizer": True}).learn(8)
    model.save(tmp_path / "model")
    loaded = IRIS.load(tmp_path / "model")
    assert "tokenizer.quantizer.idle" in parameters(model)
    assert_equal(parameters(model), parameters(loaded))


def test_patch_tokenizer(tmp_path):
    """Its patches and how many they are."""
    model = tiny(FrameEnv(), policy_kwargs={"patch_tokenizer": True, "codebook_size": 500}).learn(8)
    model.save(tmp_path / "model")
    loaded = IRIS.load(tmp_path / "model", env=FrameEnv())
    assert 1 < loaded.policy.tokenizer.quantizer.n_patches < 500
    assert_equal(parameters(model), parameters(loaded))
    assert loaded.learn(8, reset_num_timesteps=False).num_timesteps == 16


def test_relative_positions(tmp_path):
    model = tiny(FrameEnv(), policy_kwargs={"relative_positions": True}).learn(8)
    model.save(tmp_path / "model")
    loaded = IRIS.load(tmp_path / "model", env=FrameEnv())
    assert "world_model.position_bias.scores.weight" in parameters(loaded)
    assert_equal(parameters(model), parameters(loaded))
    assert loaded.learn(8, reset_num_timesteps=False).num_timesteps == 16


@pytest.mark.parametrize("uniform", [False, True])
def test_uniform_replay(tmp_path, uniform):
    """It is the model's, whatever the model was whose replay buffer is taken over."""
    model = tiny(FrameEnv(), uniform_replay=uniform).learn(8)
    other = tiny(FrameEnv(), uniform_replay=not uniform).learn(8)
    other.save_replay_buffer(tmp_path / "buffer")
    model.save(tmp_path / "model", include=["replay_buffer"])
    loaded = IRIS.load(tmp_path / "model", env=FrameEnv())
    assert model.replay_buffer.uniform is loaded.replay_buffer.uniform is loaded.uniform_replay is uniform
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert loaded.replay_buffer.uniform is uniform
    loaded = IRIS.load(tmp_path / "model", env=FrameEnv(), uniform_replay=not uniform)
    assert loaded.replay_buffer.uniform is not uniform


def test_networks_changed_from_outside():
    """Between two calls of ``learn``: no token of the old tokenizer is trained on."""
    runs = []
    for remember in (True, False):
        model = tiny(FrameEnv(), tokenizer_gradient_steps=0).learn(12)
        model.policy.load_state_dict(tiny(FrameEnv(), seed=9).policy.state_dict())
        decided(model)
        if not remember:
            buffer = io.BytesIO()
            model.save_replay_buffer(buffer)  # which leaves the tokens out
            buffer.seek(0)
            last_obs = model._last_obs
            model.load_replay_buffer(buffer)
            model._last_obs = last_obs
        model.set_random_seed(1)
        runs.append(parameters(model.learn(8, reset_num_timesteps=False)))
    assert_equal(*runs)


def test_save_in_the_middle(tmp_path):
    """Saved by a callback within an epoch, with its progress bar on, and loaded to go on."""
    model = tiny(FrameEnv())

    def save(local, _):
        if local["self"].num_timesteps == 6:
            local["self"].save(tmp_path / "model")
        return True

    model.learn(8, callback=save, progress_bar=True)
    loaded = IRIS.load(tmp_path / "model", env=FrameEnv())
    assert loaded.num_timesteps == 6
    loaded.learn(4, reset_num_timesteps=False)
    assert loaded.num_timesteps == 10
    assert th.isfinite(th.cat([p.flatten() for p in loaded.policy.parameters()])).all()


def test_eval_temperature(tmp_path):
    """Setting it takes effect at once, and so it stays in all kinds of files."""
    model = tiny(FrameEnv(), **NO_TRAINING).learn(4)
    model.eval_temperature = 0.25
    assert model.policy.eval_temperature == 0.25
    model.save(tmp_path / "model")
    model.save_checkpoint(tmp_path / "run")
    model.policy.save(tmp_path / "policy")
    for loaded in (IRIS.load(tmp_path / "model"), IRIS.resume(tmp_path / "run", FrameEnv(), device="cpu")):
        assert loaded.eval_temperature == loaded.policy.eval_temperature == 0.25
    assert IRIS.load(tmp_path / "model", eval_temperature=2.0).policy.eval_temperature == 2.0
    assert CnnLstmPolicy.load(tmp_path / "policy").eval_temperature == 0.25


def test_policy_kwargs_as_they_were_given(tmp_path):
    """Without what was settled when the model was made, by either way to give them."""
    given = {name: value for name, value in SIZES.items() if name != "robust_tokenizer"}
    IRIS("CnnPolicy", FrameEnv(), policy_kwargs=given, **SETTINGS).save(tmp_path / "model")
    for kwargs in ({"policy_kwargs": given}, {"custom_objects": {"policy_kwargs": given}}):
        before = copy.deepcopy(kwargs)
        assert IRIS.load(tmp_path / "model", **kwargs).policy.tokenizer.robust is True
        assert kwargs == before


def test_replay_buffer_of_other_environments(tmp_path):
    """It cannot be kept, which is said."""
    tiny(frame_envs(2)).learn(8).save(tmp_path / "model", include=["replay_buffer"])
    with pytest.warns(UserWarning, match="of 2 environments, env has 1: it is left out"):
        assert IRIS.load(tmp_path / "model", env=frame_envs(1)).replay_buffer.size() == 0


def test_replay_buffer_as_the_zoo_loads_it(tmp_path):
    model = tiny(FrameEnv()).learn(8)
    model.save_replay_buffer(tmp_path / "buffer")
    other = tiny(FrameEnv())
    other.load_replay_buffer(tmp_path / "buffer", truncate_last_traj=False)
    assert_equal(steps_in_buffer(other), steps_in_buffer(model))
