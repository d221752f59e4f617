import itertools

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_iris.atari_wrappers import make_atari_env

NOOP, FIRE, RIGHT, LEFT = range(4)  # in Breakout


def overlaps(length: int, new_length: int) -> np.ndarray:
    """How much of each new pixel the old pixels cover, (new_length, length), rows sum to 1."""
    edges = np.arange(new_length + 1) * length / new_length
    old = np.arange(length)
    covered = np.minimum(edges[1:, None], old + 1) - np.maximum(edges[:-1, None], old)
    return covered.clip(0) * new_length / length


def area_resize(frame: np.ndarray, size: int = 64) -> np.ndarray:
    """Area interpolation by hand, unlike ``cv2.INTER_AREA`` not rounded."""
    rows, columns = overlaps(frame.shape[0], size), overlaps(frame.shape[1], size)
    # einsum in two steps: a matrix product would start threads, slow for so little on a busy machine
    return np.einsum("iwc,jw->ijc", np.einsum("ih,hwc->iwc", rows, frame), columns)


class CyclicPolicy:
    """Press the same buttons over and over; the default ones score in Breakout."""

    def __init__(self, actions: tuple[int, ...] = (FIRE, RIGHT, RIGHT, LEFT)) -> None:
        self.actions = itertools.cycle(actions)

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return np.array([next(self.actions)]), state


def play_until(
    env: VecEnv, policy: CyclicPolicy, key: str = "episode", max_steps: int = 2_000
) -> tuple[list[float], list[dict]]:
    """Play up to a ``done`` whose info has ``key``; return all rewards and the infos of the ``dones``."""
    rewards, infos = [], []
    for _ in range(max_steps):
        _, reward, done, info = env.step(policy.predict(None)[0])
        rewards.append(float(reward[0]))
        if done[0]:
            infos.append(info[0])
            if key in info[0]:
                return rewards, infos
    raise AssertionError(f"no end of episode within {max_steps} steps")


@pytest.mark.parametrize("env_id, n_actions", [("ALE/Pong-v5", 6), ("Pong", 6), ("Breakout", 4)])
def test_spaces(env_id, n_actions):
    env = make_atari_env(env_id, n_envs=2, image_size=32)
    assert env.action_space.n == n_actions
    assert env.observation_space == gym.spaces.Box(0, 255, (32, 32, 3), np.uint8)
    assert env.reset().shape == (2, 32, 32, 3)


@pytest.mark.parametrize("evaluation", [False, True])
def test_observations_and_rewards_by_hand(evaluation):
    """Play the bare emulator beside the env: observations are resized, then maximised, and rewards are plain sums."""
    env = make_atari_env("MsPacman", seed=3, evaluation=evaluation)
    raw = gym.make("ALE/MsPacman-v5", frameskip=1, repeat_action_probability=0.0).unwrapped
    obs = env.reset()[0]
    raw.reset(seed=3)
    for _ in range(1 if evaluation else raw.np_random.integers(1, 31)):
        frame = raw.step(NOOP)[0]
    assert np.abs(obs - area_resize(frame)).max() <= 0.5 + 1e-6

    action_rng, all_rewards, worst_other_order = np.random.default_rng(0), [], 0.0
    for action in action_rng.integers(env.action_space.n, size=130):
        obs, reward, _, _ = env.step([action])
        frames, rewards = zip(*[raw.step(action)[:2] for _ in range(4)], strict=True)
        expected = np.maximum(area_resize(frames[2]), area_resize(frames[3]))
        assert np.abs(obs[0] - expected).max() <= 0.5 + 1e-6
        assert reward[0] == sum(rewards)
        all_rewards.append(reward[0])
        other_order = area_resize(np.maximum(frames[2], frames[3]))
        worst_other_order = max(worst_other_order, np.abs(obs[0] - other_order).max())
    # the two conditions under which the comparison above means something
    assert worst_other_order > 5
    assert max(all_rewards) >= 10


def test_number_of_noops():
    train_env, eval_env = make_atari_env("Pong", seed=0), make_atari_env("Pong", seed=0, evaluation=True)
    noops = []
    for _ in range(150):
        train_env.reset()
        noops.append(train_env.reset_infos[0]["episode_frame_number"])
    assert (min(noops), max(noops)) == (1, 30)
    for _ in range(3):
        eval_env.reset()
        assert eval_env.reset_infos[0]["episode_frame_number"] == 1


def test_lost_life_ends_episode_but_not_game():
    env = make_atari_env("Breakout", seed=1)
    env.reset()
    n_noops = env.reset_infos[0]["episode_frame_number"]
    rewards, infos = play_until(env, CyclicPolicy())
    assert [info["lives"] for info in infos] == [4, 3, 2, 1, 0]
    assert ["episode" in info for info in infos] == [False, False, False, False, True]
    assert not any(info["TimeLimit.truncated"] for info in infos)
    # the score of the whole game, its length in raw frames: the no-ops at its start, four per step (the last may be cut
    # short), and four for the no-op step after each of the four lost lives
    game = infos[-1]["episode"]
    assert game["r"] == sum(rewards) > 0
    assert game["l"] == infos[-1]["episode_frame_number"]
    assert 0 <= n_noops + 4 * (len(rewards) + 4) - game["l"] < 4


def test_evaluation_plays_whole_games():
    env = make_atari_env("Breakout", seed=1, evaluation=True)
    env.reset()
    rewards, infos = play_until(env, CyclicPolicy(), key="TimeLimit.truncated")
    assert infos[0]["lives"] == 0
    assert infos[0]["episode"]["r"] == sum(rewards) > 0


@pytest.mark.parametrize("evaluation", [False, True])
def test_evaluate_policy_gives_scores_of_whole_games(evaluation):
    env = make_atari_env("Breakout", seed=1, evaluation=evaluation)
    env.reset()
    rewards, infos = play_until(env, CyclicPolicy())
    env = make_atari_env("Breakout", seed=1, evaluation=evaluation)
    scores, lengths = evaluate_policy(CyclicPolicy(), env, n_eval_episodes=1, return_episode_rewards=True)
    assert scores == [sum(rewards)]
    assert lengths == [infos[-1]["episode_frame_number"]]


def check_cut(evaluation, max_frames):
    """Without "fire", a game of Breakout never ends; play it to its cut, the middle on the bare emulator, for speed."""
    env = make_atari_env("Breakout", seed=0, evaluation=evaluation)
    env.reset()
    ale = env.envs[0].unwrapped.ale
    while ale.getEpisodeFrameNumber() < max_frames - 10:
        ale.act(NOOP)
    _, infos = play_until(env, CyclicPolicy((NOOP,)), max_steps=3)
    assert infos[0]["episode_frame_number"] == max_frames
    assert infos[0]["TimeLimit.truncated"]  # SB3 sets it only if the game did not terminate
    assert infos[0]["lives"] == 5
    assert "episode" in infos[0]
    assert ale.getEpisodeFrameNumber() <= 30  # a new game has begun


def test_cut_in_training():
    check_cut(evaluation=False, max_frames=20_000)


@pytest.mark.slow
def test_cut_in_evaluation():
    check_cut(evaluation=True, max_frames=108_000)


def test_settings_of_the_emulator():
    for evaluation, max_frames in ((False, 20_000), (True, 108_000)):
        ale = make_atari_env("Pong", evaluation=evaluation).envs[0].unwrapped.ale
        assert ale.getFloat("repeat_action_probability") == 0.0
        assert ale.getInt("max_num_frames_per_episode") == max_frames


def test_no_sticky_actions():
    """The emulator uses its seed for sticky actions only: without them, other seeds give the same frames."""
    envs = [make_atari_env("Pong", seed=seed, evaluation=True) for seed in (0, 1)]
    action_rng = np.random.default_rng(0)
    observations = [env.reset() for env in envs]
    for action in action_rng.integers(6, size=60):
        np.testing.assert_array_equal(observations[0], observations[1])
        observations = [env.step([action])[0] for env in envs]


def test_seeds():
    """Training games of one env differ (in their no-ops), and the same seed repeats them all."""
    envs = [make_atari_env("Pong", n_envs=2, seed=seed) for seed in (0, 0, 5)]
    for env in envs:
        env.reset()
    noops = [[info["episode_frame_number"] for info in env.reset_infos] for env in envs]
    assert noops[0] == noops[1] != noops[2]
    assert noops[0][0] != noops[0][1]


def test_subproc_vec_env():
    """Workers of a fresh interpreter know the games, and play the same ones."""
    subproc_env = make_atari_env("Pong", 2, seed=0, vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "spawn"})
    dummy_env = make_atari_env("Pong", 2, seed=0)
    try:
        np.testing.assert_array_equal(subproc_env.reset(), dummy_env.reset())
        for _ in range(5):
            np.testing.assert_array_equal(subproc_env.step([2, 3])[0], dummy_env.step([2, 3])[0])
    finally:
        subproc_env.close()


def test_monitor_files(tmp_path):
    env = make_atari_env("Breakout", seed=1, monitor_dir=str(tmp_path))
    env.reset()
    _, infos = play_until(env, CyclicPolicy())
    env.close()
    results = load_results(str(tmp_path))
    assert results["r"].tolist() == [infos[-1]["episode"]["r"]]
    assert results["l"].tolist() == [infos[-1]["episode"]["l"]]


@pytest.mark.parametrize(
    "env_id, match",
    [
        ("PONG", "ALE/Pong-v5"),
        ("ALE/Pong", "ALE/Pong-v5"),
        ("PongNoFrameskip-v4", "ALE/Pong-v5"),
        ("ALE/Pong-v4", "ALE/Pong-v5"),
        ("MS_PACMAN", "ALE/MsPacman-v5"),
        ("Brekaout", "ALE/Breakout-v5"),
    ],
)
def test_unknown_game(env_id, match):
    with pytest.raises(ValueError, match=rf"env_id='{env_id}' .* close matches: \[.*'{match}'.*\]"):
        make_atari_env(env_id)


def test_game_of_another_package():
    with pytest.raises(ValueError, match="env_id='CartPole-v1' is not an Atari game"):
        make_atari_env("CartPole-v1")


@pytest.mark.parametrize("name", ["n_envs", "image_size"])
def test_wrong_numbers(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        make_atari_env("Pong", **{name: 0})


def test_the_26_games_of_atari_100k():
    games = """
        Alien Amidar Assault Asterix BankHeist BattleZone Boxing Breakout ChopperCommand CrazyClimber DemonAttack Freeway
        Frostbite Gopher Hero Jamesbond Kangaroo Krull KungFuMaster MsPacman Pong PrivateEye Qbert RoadRunner Seaquest UpNDown
    """.split()
    assert len(games) == 26
    for game in games:
        assert make_atari_env(game, evaluation=True).reset().shape == (1, 64, 64, 3)
