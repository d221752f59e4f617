"""The same seed on the same machine gives the same run, bit for bit."""

import numpy as np
import pytest
import torch as th

from tests.presets import FrameEnv, assert_equal, differing, frame_envs, parameters, steps_in_buffer, tiny


@pytest.mark.parametrize("n_envs, policy_kwargs", [(1, {}), (3, {}), (1, {"robust_tokenizer": True})])
def test_same_seed(n_envs, policy_kwargs):
    runs = []
    for draws in (0, 5):
        th.rand(draws)  # what was drawn before does not matter
        runs.append(tiny(frame_envs(n_envs), seed=3, policy_kwargs=policy_kwargs).learn(16))
    assert_equal(parameters(runs[0]), parameters(runs[1]))
    assert_equal(steps_in_buffer(runs[0]), steps_in_buffer(runs[1]))


def test_other_seed():
    runs = [tiny(FrameEnv(), seed=seed).learn(16) for seed in (3, 4)]
    networks = {"tokenizer", "world_model", "actor_critic"}
    assert differing(parameters(runs[0]), parameters(runs[1])) >= networks
    # other actions, and other random numbers of the environment
    assert differing(steps_in_buffer(runs[0]), steps_in_buffer(runs[1])) >= {"actions", "observations"}


def test_no_seed():
    runs = [tiny(FrameEnv(), seed=None).learn(16) for _ in range(2)]
    assert "actions" in differing(steps_in_buffer(runs[0]), steps_in_buffer(runs[1]))


def test_predict_without_a_seed():
    """Each model samples in its own way, and anew where it is asked to."""
    models = [tiny(FrameEnv(), seed=None) for _ in range(2)]
    models[1].set_parameters(models[0].get_parameters())
    frames = np.stack([FrameEnv().reset(seed=0)[0]] * 100)
    first, second = (model.predict(frames)[0].tolist() for model in models)
    state, of_torch = models[0].policy._generator.get_state(), th.get_rng_state()
    models[0].set_random_seed(None)
    assert first != second and not th.equal(models[0].policy._generator.get_state(), state)
    assert th.equal(th.get_rng_state(), of_torch)  # which is not the model's own


@pytest.mark.parametrize("what", ["exploration_rate", "temperature"])
def test_seed_of_each_source(what):
    """With only random exploration, and with only the policy's own sampling: both follow the seed."""
    kwargs = {"exploration_rate": 1.0} if what == "exploration_rate" else {"exploration_rate": 0.0, "temperature": 2.0}
    runs = [steps_in_buffer(tiny(FrameEnv(), seed=seed, **kwargs).learn(16)) for seed in (1, 1, 2)]
    assert_equal(runs[0], runs[1])
    assert "actions" in differing(runs[0], runs[2])


def test_set_random_seed():
    """Seeded again, a model draws, plays and predicts the same once more."""
    model = tiny(FrameEnv(), **{f"{name}_gradient_steps": 0 for name in ("tokenizer", "world_model", "actor_critic")})
    frame = FrameEnv().reset(seed=0)[0]
    plays = []
    for _ in range(2):
        model.set_random_seed(11)
        model.learn(20)
        predicted = [int(model.predict(frame)[0]) for _ in range(20)]
        plays.append((model.replay_buffer.actions[:40, 0][-20:].tolist(), predicted))
        model.replay_buffer.reset()
    assert plays[0] == plays[1]
    assert len(set(plays[0][1])) > 1


def test_final_state_does_not_depend_on_logging(tmp_path):
    """Progress bars, logs and their interval leave the run as it is."""
    plain = tiny(FrameEnv()).learn(12)
    logged = tiny(FrameEnv(), tensorboard_log=str(tmp_path)).learn(12, progress_bar=True, log_interval=2)
    assert_equal(parameters(plain), parameters(logged))
