"""SB3's callbacks inside a run, and its evaluation."""

import numpy as np
import pytest
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecTransposeImage

from sb3_iris import IRIS
from tests.presets import (
    NO_TRAINING,
    EventLog,
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


def run(callback: BaseCallback | None = None, n_envs: int = 1, seed: int = 0) -> IRIS:
    model = tiny(VecTransposeImage(frame_envs(n_envs)), seed=seed)
    return model.learn(12, callback=callback)


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("deterministic", [True, False])
def test_evaluation_does_not_change_the_run(n_envs, deterministic, tmp_path):
    plain = run(n_envs=n_envs)
    eval_env = VecTransposeImage(frame_envs(2))
    callback = EvalCallback(
        eval_env,
        n_eval_episodes=3,
        eval_freq=3,
        deterministic=deterministic,
        verbose=0,
        log_path=str(tmp_path),
        best_model_save_path=str(tmp_path),
    )
    evaluated = run(callback, n_envs=n_envs)
    assert len(callback.evaluations_results) == 12 // n_envs // 3
    assert np.shape(callback.evaluations_results)[1] == 3
    assert frame_env(eval_env).n_steps > 0
    assert_equal(parameters(plain), parameters(evaluated))
    assert_equal(steps_in_buffer(plain), steps_in_buffer(evaluated))
    assert IRIS.load(tmp_path / "best_model").num_timesteps > 0


def test_other_seed_changes_the_run():
    """The comparison of the test above can tell two runs apart."""
    assert differing(parameters(run()), parameters(run(seed=1))) >= {"tokenizer", "world_model", "actor_critic"}


def test_checkpoints(tmp_path):
    model = tiny(FrameEnv())
    seen = {}

    class Snapshot(BaseCallback):
        def _on_step(self) -> bool:
            assert isinstance(self.model, IRIS)
            seen[self.num_timesteps] = (parameters(self.model), steps_in_buffer(self.model))
            return True

    checkpoint = CheckpointCallback(save_freq=5, save_path=tmp_path, name_prefix="run", save_replay_buffer=True)
    model.learn(12, callback=[checkpoint, Snapshot()])
    assert {path.name for path in tmp_path.iterdir()} == {
        "run_5_steps.zip",
        "run_10_steps.zip",
        "run_replay_buffer_5_steps.pkl",
        "run_replay_buffer_10_steps.pkl",
    }
    for n in (5, 10):
        loaded = IRIS.load(tmp_path / f"run_{n}_steps", env=FrameEnv())
        loaded.load_replay_buffer(tmp_path / f"run_replay_buffer_{n}_steps")
        assert loaded.num_timesteps == n
        assert_equal(parameters(loaded), seen[n][0])
        assert_equal(steps_in_buffer(loaded), seen[n][1])


def test_every_n_timesteps():
    log = EventLog()
    tiny(frame_envs(2), **NO_TRAINING).learn(20, callback=EveryNTimesteps(n_steps=6, callback=log))
    assert log.timesteps == [6, 12, 18]


@pytest.mark.parametrize("n_envs", [1, 2])
def test_stop_at_number_of_episodes(n_envs):
    """SB3 counts ``max_episodes`` for each environment; an episode has 5 steps."""
    model = tiny(frame_envs(n_envs), train_freq=4 * n_envs)
    steps = GradientSteps(model)
    model.learn(1000, callback=StopTrainingOnMaxEpisodes(max_episodes=2, verbose=0))
    assert model.num_timesteps == 10 * n_envs
    assert steps.timesteps == [4 * n_envs] * 3 + [8 * n_envs] * 3
    assert model._episode_num == 2 * n_envs


def test_stop_at_reward():
    """The reward of an episode of 5 steps is at least 5 * (3 - 2)."""
    env = frame_envs(bonus=3.0)
    for threshold, expected in ((4.9, 6), (17.6, 12)):
        model = tiny(env)
        stop = StopTrainingOnRewardThreshold(reward_threshold=threshold, verbose=0)
        eval_env = VecTransposeImage(frame_envs(bonus=3.0))
        model.learn(12, callback=EvalCallback(eval_env, callback_on_new_best=stop, eval_freq=6, verbose=0))
        assert model.num_timesteps == expected


def test_stop_without_improvement():
    stop = StopTrainingOnNoModelImprovement(max_no_improvement_evals=1, min_evals=1, verbose=0)
    eval_env = VecTransposeImage(frame_envs(length=1))
    model = tiny(FrameEnv(), eval_temperature=0, **NO_TRAINING)
    eval_callback = EvalCallback(eval_env, callback_after_eval=stop, eval_freq=2, n_eval_episodes=1, verbose=0)
    model.learn(100, callback=CallbackList([eval_callback]))
    assert model.num_timesteps < 100


@pytest.mark.parametrize("n_envs", [0, 1, 3])
def test_evaluate_policy(n_envs):
    env = frame_envs(n_envs, bonus=2.0) if n_envs else Monitor(FrameEnv(bonus=2.0))
    model = tiny(FrameEnv(bonus=2.0))
    played = []
    returns, lengths = evaluate_policy(
        model,
        env,
        n_eval_episodes=7,
        deterministic=False,
        return_episode_rewards=True,
        callback=lambda local, _: played.append((local["i"], local["reward"])),
    )
    assert lengths == [5] * 7
    assert sum(returns) == pytest.approx(sum(reward for _, reward in played))
    assert len(played) == 35
    if n_envs == 3:
        assert [sum(i == index for i, _ in played) for index in range(3)] == [10, 10, 15]


def test_evaluation_resets_the_lstm():
    """Episodes of equal frames are played alike whatever came before, so a deterministic policy gets equal returns."""

    class SameFrames(FrameEnv):
        def _frame(self) -> np.ndarray:
            return np.full((8, 8, 3), 40 * self.t, dtype=np.uint8)

    model = decided(tiny(FrameEnv()))  # actions that depend on the state
    played = []
    env = Monitor(SameFrames())
    evaluate_policy(model, env, 3, deterministic=True, callback=lambda local, _: played.append(local["states"][0].copy()))
    states = np.array(played)[:, 0, 0].reshape(3, 5, -1)
    np.testing.assert_array_equal(states[0], states[1])
    np.testing.assert_array_equal(states[0], states[2])
    assert len(np.unique(states[0], axis=0)) == 5


def test_locals_of_a_step():
    """What callbacks of users look for among the locals of SB3's off-policy algorithms."""
    found = []

    class Look(BaseCallback):
        def _on_step(self) -> bool:
            names = ("env", "replay_buffer", "new_obs", "rewards", "dones", "infos", "actions")
            found.append([self.locals[name] for name in names])
            return True

    model = tiny(frame_envs(2)).learn(4, Look())
    assert len(found) == 2
    for env, replay_buffer, new_obs, *others in found:
        assert env is model.get_env() and replay_buffer is model.replay_buffer
        assert new_obs.shape == (2, 3, 8, 8) and [len(other) for other in others] == [2] * 4
