"""PPO of Stable-Baselines3 on keepdrop's environment: `pip install 'keepdrop[sb3]'`.

One step is one episode: the observation is the layer, the action one bit per filter. PPO's policy is tied to this layer
and this filter order, unlike keepdrop's own; it shows that the environment is any Gymnasium environment.
"""

import gymnasium
import numpy as np
import torch
from keepdrop import TryAndLearn
from keepdrop.envs.data.sources import digits
from keepdrop.envs.data.splits import split
from quickstart import trained
from stable_baselines3 import PPO

ENV = "keepdrop.envs.registration:keepdrop/FilterPruning-v0"


class AtLeastOne(gymnasium.ActionWrapper):
    """The environment refuses an action that keeps nothing; a policy that samples bits needs a rule for it."""

    def action(self, action):
        """Keep the first filter where none was kept."""
        bits = np.asarray(action).astype(np.int8)
        bits[0] |= not bits.any()
        return bits


def main(steps=2048, epochs=10, n_steps=64):
    """Train PPO on conv2 and return its greedy mask and what it does."""
    data = digits()
    splits = split(data, reward_from="test", reward_size=300, seed=0)
    env = AtLeastOne(
        gymnasium.make(ENV, model=trained(data, epochs), splits=splits, reward=TryAndLearn(0.02), group="conv2")
    )
    agent = PPO("MultiInputPolicy", env, n_steps=n_steps, batch_size=n_steps, seed=0, device="cpu")
    agent.learn(steps)
    observation, _ = env.reset()
    action, _ = agent.predict(observation, deterministic=True)
    _, reward, terminated, _, info = env.step(action)
    print(f"kept {int(action.sum())} of {action.size}, reward {reward:+.3f}, accuracy {info['accuracy']:.4f}")
    return action, reward, terminated, info


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
