"""The learned game as an environment: its conventions, its exactness, and that other algorithms learn in it."""

import re
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from gymnasium.wrappers import RecordVideo
from sb3_contrib import QRDQN, RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor, VecTransposeImage

from sb3_iris import IRIS
from sb3_iris.imagination import ImaginedGame
from sb3_iris.world_model_env import ReconstructedVecEnv, WorldModelEnv, WorldModelVecEnv, reconstruct, to_rgb
from tests.corridor import LENGTH, Corridor, corridor_frame, learned_model, position_in
from tests.presets import NO_TRAINING, SIZE, FrameEnv, assert_equal, frame_envs, parameters, tiny
from tests.test_imagination import CONTEXT, A, K, Networks, V

SMALL_POLICY: dict[str, Any] = {
    "features_extractor_class": FlattenExtractor,
    "net_arch": [32],
}  # SB3's own CNN wants 36 pixels


@pytest.fixture
def model() -> IRIS:
    return learned_model()


def frames_of(*positions: int) -> np.ndarray:
    return np.stack([corridor_frame(position) for position in positions])


def play(env: WorldModelVecEnv, n_steps: int, seed: int = 0) -> list[tuple]:
    rng = np.random.default_rng(seed)
    n_actions = env.get_attr("action_space")[0].n
    return [env.step(rng.integers(n_actions, size=env.num_envs)) for _ in range(n_steps)]


def test_the_game_is_the_corridor(model):
    """Frames, rewards and ends are those of the real game; games that end begin anew by themselves."""
    env = model.get_world_model_env(3, temperature=0, start_observations=frames_of(1), seed=0)
    assert isinstance(env, WorldModelVecEnv)
    assert env.observation_space == model.policy.image_space and env.action_space == model.action_space
    obs = env.reset()
    assert obs.shape == (3, 3, SIZE, SIZE) and obs.dtype == np.uint8
    assert np.array_equal(obs, reconstruct(model, frames_of(1, 1, 1)))
    expected = [  # actions, then positions, rewards and dones of the three games
        ([1, 0, 1], [2, 0, 2], [0, 0, 0], [False, False, False]),
        ([1, 0, 0], [3, 1, 1], [0, -1, 0], [False, True, False]),
        ([1, 1, 1], [1, 2, 2], [1, 0, 0], [True, False, False]),
        ([0, 1, 1], [0, 3, 3], [0, 0, 0], [False, False, False]),
    ]
    for actions, positions, expected_rewards, expected_dones in expected:
        obs, rewards, dones, infos = env.step(np.array(actions))
        assert [position_in(image) for image in obs] == positions
        assert rewards.dtype == np.float32 and rewards.tolist() == expected_rewards
        assert dones.dtype == bool and dones.tolist() == expected_dones
        for n in range(3):
            assert infos[n]["TimeLimit.truncated"] is False
            assert ("terminal_observation" in infos[n]) == dones[n]
    with pytest.raises(RuntimeError, match="reset"):
        env.step_wait()  # without an action


def test_time_limit(model):
    """Long games are truncated, each by its own clock; a game that ends at the limit has ended."""
    env = model.get_world_model_env(2, temperature=0, start_observations=frames_of(1), max_episode_steps=3, seed=0)
    env.reset()
    env.step(np.array([1, 0]))
    _, _, dones, _ = env.step(np.array([0, 0]))
    assert dones.tolist() == [False, True]  # past the left end: its clock begins anew
    obs, rewards, dones, infos = env.step(np.array([1, 1]))
    assert dones.tolist() == [True, False] and rewards.tolist() == [0, 0]
    assert infos[0]["TimeLimit.truncated"] is True and infos[1]["TimeLimit.truncated"] is False
    assert position_in(infos[0]["terminal_observation"]) == 2 and position_in(obs[0]) == 1
    env.step(np.array([1, 1]))
    _, rewards, dones, infos = env.step(np.array([1, 1]))
    assert rewards.tolist() == [0, 1] and dones.tolist() == [False, True]
    assert infos[1]["TimeLimit.truncated"] is False  # the limit, and the end
    forever = model.get_world_model_env(1, temperature=0, start_observations=frames_of(1), max_episode_steps=None)
    forever.reset()
    assert not any(forever.step(np.array([t % 2]))[2][0] for t in range(30))


def test_starts(model):
    env = model.get_world_model_env(200, seed=0)
    positions = [position_in(image) for image in env.reset()]
    assert sorted(set(positions)) == list(range(LENGTH))
    replay = reconstruct(model, model.replay_buffer.observations.reshape(-1, 3, SIZE, SIZE)[: model.replay_buffer.size() * 4])
    known = {image.tobytes() for image in replay}
    assert all(image.tobytes() in known for image in env.reset())
    given = model.get_world_model_env(50, start_observations=frames_of(0, 3).transpose(0, 3, 1, 2), seed=0)
    assert {position_in(image) for image in given.reset()} == {0, 3}


def test_seed(model):
    def run(env: WorldModelVecEnv) -> list[np.ndarray]:
        return [env.reset(), *(part for step in play(env, 12) for part in step[:3])]

    env = model.get_world_model_env(8, temperature=3.0, seed=5)
    first = run(env)
    env.seed(5)
    th.rand(1)  # the global stream does not matter
    again = run(env)
    other = model.get_world_model_env(8, temperature=3.0, seed=5)
    for ours, theirs, fresh in zip(first, again, run(other), strict=True):
        assert np.array_equal(ours, theirs) and np.array_equal(ours, fresh)
    goes_on = run(env)  # a seed counts for one reset
    assert any(not np.array_equal(ours, theirs) for ours, theirs in zip(first, goes_on, strict=True))
    otherwise = run(model.get_world_model_env(8, temperature=3.0, seed=6))
    assert any(not np.array_equal(ours, theirs) for ours, theirs in zip(first, otherwise, strict=True))


def test_temperature(model):
    """The hotter, the more often the game strays from the most likely one."""
    surprises = []
    for temperature in (0.0, 1.0, 5.0):
        env = model.get_world_model_env(64, temperature=temperature, start_observations=frames_of(1), seed=0)
        env.reset()
        obs, *_ = env.step(np.ones(64, dtype=int))
        surprises.append(np.mean([position_in(image) != 2 for image in obs]))
    assert surprises[0] == 0 and surprises[1] < 0.1 and surprises[2] > 0.2


def test_playing_does_not_change_the_model(model):
    before = parameters(model)
    stream = th.get_rng_state()
    env = model.get_world_model_env(4)
    env.reset()
    play(env, 5)
    assert_equal(before, parameters(model))
    assert th.equal(stream, th.get_rng_state())


@pytest.mark.parametrize("kept_frames", [1, 2, CONTEXT - 1])
@th.no_grad()
def test_restarted_games_are_as_if_alone(kept_frames):
    """Each game of a batch in which games begin anew at odd times is the one that is played alone from the same frame."""
    networks = Networks()
    B, n_steps = 5, 17
    rng = np.random.default_rng(0)

    def new_game() -> ImaginedGame:
        return ImaginedGame(networks.tokenizer.decode, networks.world_model, temperature=0, kept_frames=kept_frames)

    game, alone = new_game(), [new_game() for _ in range(B)]
    tokens = th.randint(V, (B, K))
    game.reset(tokens)
    for n in range(B):
        alone[n].reset(tokens[n : n + 1])
    n_cohorts = []
    for t in range(n_steps):
        actions = th.randint(A, (B,))
        rewards, ends, frames = game.step(actions)
        n_cohorts.append(len(game._cohorts))
        for n in range(B):
            for ours, expected in zip((rewards, ends, frames), alone[n].step(actions[n : n + 1]), strict=True):
                th.testing.assert_close(ours[n : n + 1], expected)
            assert th.equal(game.tokens[n], alone[n].tokens[0])
        rows = rng.permutation(B)[: [1, 0, 2, B, 0][t % 5]]
        if len(rows) > 0:
            first = th.randint(V, (len(rows), K))
            th.testing.assert_close(game.restart(rows, first), networks.tokenizer.decode(first))
            for row, row_tokens in zip(rows, first, strict=True):
                alone[row].reset(row_tokens[None])
    assert 1 < max(n_cohorts) <= CONTEXT - 1


@th.no_grad()
def test_sliding_window_by_full_passes():
    """With all frames kept, each step is predicted from the last CONTEXT - 1 frames, however long the game."""
    networks = Networks()
    game = ImaginedGame(networks.tokenizer.decode, networks.world_model, temperature=0, kept_frames=CONTEXT - 1)
    tokens, actions = [th.randint(V, (3, K))], []
    game.reset(tokens[0])
    for t in range(3 * CONTEXT):
        actions.append(th.randint(A, (3,)))
        rewards, ends, _ = game.step(actions[-1])
        first = max(t - CONTEXT + 2, 0)
        output = networks.world_model(th.stack(tokens[first:], dim=1), th.stack(actions[first:], dim=1))
        assert th.equal(rewards, output.reward_logits[:, -1].argmax(-1) - 1.0)
        assert th.equal(ends, output.end_logits[:, -1].argmax(-1) == 1)
        assert th.equal(game.tokens[:, 0], output.token_logits[:, -1].argmax(-1))
        tokens.append(game.tokens)


def test_rendering(model):
    env = model.get_world_model_env(4, seed=0)
    with pytest.raises(RuntimeError, match="reset"):
        env.get_images()
    obs = env.reset()
    images = env.get_images()
    assert all(np.array_equal(image, observation.transpose(1, 2, 0)) for image, observation in zip(images, obs, strict=True))
    assert env.render().shape == (2 * SIZE, 2 * SIZE, 3)
    gray = np.arange(12, dtype=np.uint8).reshape(1, 3, 4)
    assert np.array_equal(to_rgb(gray), gray[0][..., None].repeat(3, -1))
    stack = np.arange(72, dtype=np.uint8).reshape(6, 3, 4)  # two RGB frames: the newer one is shown
    assert np.array_equal(to_rgb(stack), stack[3:].transpose(1, 2, 0))
    grays = stack[:4].copy()
    assert np.array_equal(to_rgb(grays), grays[3][..., None].repeat(3, -1))
    grays[3] = 255  # RGBA
    assert np.array_equal(to_rgb(grays), grays[:3].transpose(1, 2, 0))


def test_vec_env_attributes(model):
    env = model.get_world_model_env(3)
    assert env.get_attr("max_episode_steps") == [1_000] * 3
    env.set_attr("max_episode_steps", 7)
    assert env.get_attr("max_episode_steps", [0, 2]) == [7, 7]
    assert env.env_is_wrapped(gym.Wrapper) == [False] * 3
    assert not env.has_attr("no_such_thing")
    with pytest.raises(AttributeError, match="no method 'jump'"):
        env.env_method("jump")
    with pytest.raises(ValueError, match="indices"):
        env.set_attr("max_episode_steps", 7, indices=0)
    env.close()


def ppo(env: Any) -> BaseAlgorithm:
    kwargs: dict[str, Any] = {"n_steps": 32, "batch_size": 128, "learning_rate": 3e-3, "gamma": 0.9}
    return PPO("CnnPolicy", env, policy_kwargs=SMALL_POLICY, seed=0, device="cpu", **kwargs)


def recurrent_ppo(env: Any) -> BaseAlgorithm:
    sizes = {**SMALL_POLICY, "lstm_hidden_size": 16}
    kwargs: dict[str, Any] = {"n_steps": 32, "batch_size": 128, "learning_rate": 3e-3, "gamma": 0.9}
    return RecurrentPPO("CnnLstmPolicy", env, policy_kwargs=sizes, seed=0, device="cpu", **kwargs)


def qrdqn(env: Any) -> BaseAlgorithm:
    sizes = {**SMALL_POLICY, "n_quantiles": 5}
    kwargs: dict[str, Any] = {
        "learning_starts": 200,
        "learning_rate": 3e-3,
        "gamma": 0.9,
        "buffer_size": 5_000,
        "train_freq": 2,
    }
    kwargs.update(target_update_interval=200, exploration_fraction=0.5)
    return QRDQN("CnnPolicy", env, policy_kwargs=sizes, seed=0, device="cpu", **kwargs)


@pytest.mark.parametrize("algorithm, n_steps", [(ppo, 4_096), (recurrent_ppo, 4_096), (qrdqn, 4_096)])
def test_learned_in_the_dream_played_in_the_real_game(model, algorithm, n_steps):
    """Going right is right from everywhere: a policy that has only seen the dream gets the real reward, and fast."""
    agent = algorithm(VecMonitor(model.get_world_model_env(16, max_episode_steps=20, seed=0)))
    agent.learn(n_steps)
    for wrap in (lambda env: env, lambda env: ReconstructedVecEnv(env, model)):
        real = wrap(VecTransposeImage(make_vec_env(Corridor, 4, seed=1)))
        rewards, lengths = evaluate_policy(agent, real, 30, return_episode_rewards=True)
        assert rewards == [1.0] * 30
        assert max(lengths) <= LENGTH


def test_reconstructed_real_game(model):
    real = ReconstructedVecEnv(VecTransposeImage(make_vec_env(Corridor, 2, seed=0)), model)
    assert real.observation_space == model.policy.image_space
    obs = real.reset()
    bare = VecTransposeImage(make_vec_env(Corridor, 2, seed=0))
    assert np.array_equal(obs, reconstruct(model, bare.reset()))
    for _ in range(LENGTH):
        ours, theirs = real.step(np.array([1, 0])), bare.step(np.array([1, 0]))
        assert np.array_equal(ours[0], reconstruct(model, theirs[0]))
        for n in np.flatnonzero(ours[2]):
            expected = reconstruct(model, theirs[3][n]["terminal_observation"][None])[0]
            assert np.array_equal(ours[3][n]["terminal_observation"], expected)
    with pytest.raises(ValueError, match="actions"):
        ReconstructedVecEnv(VecTransposeImage(frame_envs(1)), model)


@pytest.mark.filterwarnings("ignore::UserWarning")  # both checkers advise on what the images of a tiny model cannot have
def test_env_checkers(model):
    check_env(WorldModelEnv(model), warn=True)
    gymnasium_check_env(WorldModelEnv(model))


def test_single_env(model):
    env = WorldModelEnv(model, temperature=0, start_observations=frames_of(1), max_episode_steps=3)
    obs, info = env.reset(seed=0)
    assert position_in(obs) == 1 and info == {}
    obs, reward, terminated, truncated, _ = env.step(1)
    assert (position_in(obs), reward, terminated, truncated) == (2, 0.0, False, False)
    assert np.array_equal(env.render(), obs.transpose(1, 2, 0))
    env.step(0)
    assert env.step(1)[2:4] == (False, True)
    env.reset()
    env.step(0)
    assert env.step(0)[1:4] == (-1.0, True, False)
    assert env.get_keys_to_action() == {("a",): 0, ("d",): 1}  # the real game's
    assert WorldModelEnv(model, render_mode=None).render() is None


@pytest.mark.filterwarnings("ignore:The tokenizer is untrained", "ignore:The world model is untrained")
@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
def test_keys_of_a_game_that_names_none(vec_env_cls):
    real = make_vec_env(FrameEnv, vec_env_cls=vec_env_cls)
    try:
        model = tiny(real, **NO_TRAINING)
        env = WorldModelEnv(model, start_observations=np.zeros((1, SIZE, SIZE, 3), dtype=np.uint8))
        assert env.get_keys_to_action() == {("0",): 0, ("1",): 1, ("2",): 2}
        model.learn(4)  # asking has broken nothing
    finally:
        real.close()


def test_record_video(model, tmp_path):
    pytest.importorskip("moviepy", reason="RecordVideo of Gymnasium writes with moviepy, which is no requirement of ours")
    env = RecordVideo(WorldModelEnv(model, max_episode_steps=5), str(tmp_path), episode_trigger=lambda n: True)
    env.reset(seed=0)
    while not any(env.step(env.action_space.sample())[2:4]):
        pass
    env.close()
    assert [path.suffix for path in tmp_path.iterdir()] == [".mp4"]


@pytest.mark.parametrize("patches", [False, True])
def test_untrained_says_so_and_plays(patches):
    model = tiny(FrameEnv(), policy_kwargs={"patch_tokenizer": patches}, **NO_TRAINING).learn(8)
    with pytest.warns(UserWarning) as warned:
        env = model.get_world_model_env(2)
    assert [str(w.message).split(" is")[0] for w in warned] == ["The tokenizer", "The world model"]
    env.reset()
    assert play(env, 3)[-1][0].shape == (2, 3, SIZE, SIZE)


def test_trained_says_nothing(model, recwarn):
    model.get_world_model_env(2)
    assert not recwarn.list


def test_patches_are_trained(recwarn):
    model = tiny(FrameEnv(), policy_kwargs={"patch_tokenizer": True}).learn(8)
    recwarn.clear()
    model.get_world_model_env(2)
    assert not recwarn.list


def test_after_load(model, tmp_path):
    model.save(tmp_path / "model")
    loaded = IRIS.load(tmp_path / "model", device="cpu")
    with pytest.raises(ValueError, match=r"start_observations=None.*empty.*load_replay_buffer"):
        loaded.get_world_model_env(2)
    envs = [m.get_world_model_env(4, start_observations=frames_of(0, 1, 2, 3), seed=0) for m in (model, loaded)]
    assert np.array_equal(envs[0].reset(), envs[1].reset())
    for ours, theirs in zip(play(envs[0], 6), play(envs[1], 6), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True))
    model.save_replay_buffer(tmp_path / "buffer")
    with_env = IRIS.load(tmp_path / "model", env=make_vec_env(Corridor, 4))
    with_env.load_replay_buffer(tmp_path / "buffer")
    assert with_env.get_world_model_env(4).reset().shape == (4, 3, SIZE, SIZE)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"n_envs": 0}, "n_envs=0 must be a whole number of at least 1"),
        ({"n_envs": 1.5}, "n_envs=1.5"),
        ({"max_episode_steps": 0}, "max_episode_steps=0"),
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"render_mode": "human"}, "render_mode='human'"),
        ({"kept_frames": 0}, "kept_frames=0 must be None or a whole number from 1 to 3"),
        ({"kept_frames": 4}, "kept_frames=4"),
        (
            {"start_observations": np.zeros((1, 16, 16, 3), dtype=np.uint8)},
            r"start_observations.*shape \(1, 16, 16, 3\).*\(3, 8, 8\)",
        ),
        ({"start_observations": np.zeros((1, 8, 8, 3))}, "dtype float64"),
        ({"start_observations": np.zeros((8, 8, 3), dtype=np.uint8)}, "batch of images"),
        ({"start_observations": np.zeros((0, 8, 8, 3), dtype=np.uint8)}, "batch of images"),
    ],
)
def test_bad_arguments(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        model.get_world_model_env(**kwargs)


@pytest.mark.parametrize(
    "actions, message",
    [
        (np.zeros(3, dtype=int), r"shape \(3,\).*2 whole numbers"),
        (np.zeros((2, 1), dtype=int), r"shape \(2, 1\)"),
        (np.zeros(2), "dtype float64"),
        (np.array([0, 2]), r"actions=\[0, 2\] must lie in \[0, 2\)"),
        (np.array([-1, 0]), "must lie in"),
    ],
)
def test_bad_actions(model, actions, message):
    env = model.get_world_model_env(2)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(2, dtype=int))
    env.reset()
    with pytest.raises(ValueError, match=message):
        env.step(actions)


@pytest.mark.parametrize("action", [2, -1, 1.0, [1], np.array([1]), None])
def test_bad_action_of_a_single_env(model, action):
    env = WorldModelEnv(model)
    env.reset()
    with pytest.raises(ValueError, match=re.escape(f"action={action!r} must be a whole number in [0, 2)")):
        env.step(action)
    assert env.step(np.array(1))[0].shape == env.step(np.int64(1))[0].shape == (3, SIZE, SIZE)


def test_single_env_takes_no_n_envs(model):
    with pytest.raises(ValueError, match="n_envs=2"):
        WorldModelEnv(model, n_envs=2)
