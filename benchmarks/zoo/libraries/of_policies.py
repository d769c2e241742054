"""stable_baselines3: the networks of its policies, made as the algorithms make them, on spaces of numbers, pictures and both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.dqn.policies import CnnPolicy, MlpPolicy
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import TD3Policy
from torch import nn

from zoo.libraries.made import Entry, provider
from zoo.providers import Inputs, numbers

PLACE, SCREEN = spaces.Box(-1, 1, (6,), numpy.float32), spaces.Box(0, 255, (3, 36, 36), numpy.uint8)
BOTH = spaces.Dict({"place": PLACE, "screen": SCREEN})
FORCE, CHOICE = spaces.Box(-1, 1, (2,), numpy.float32), spaces.Discrete(3)
NARROW: dict[str, Any] = {"net_arch": [16, 16]}


def rate(progress: float) -> float:
    return 1e-3


class Part(nn.Module):
    """One of a policy's methods as a forward: a policy acts and is judged by several."""

    def __init__(self, policy: nn.Module, method: str) -> None:
        super().__init__()
        self.policy, self.method = policy, method

    def forward(self, seen: Any, done: Any = None) -> Any:
        method = getattr(self.policy, self.method)
        return method(seen) if done is None else method(seen, done)


def places() -> Inputs:
    return (numbers(4, 6),)


def screens() -> Inputs:
    return (torch.randint(0, 256, (2, 3, 36, 36), generator=torch.Generator().manual_seed(0), dtype=torch.uint8),)


def both() -> Inputs:
    return ({"place": numbers(2, 6), "screen": screens()[0]},)


def actor_critic(policy: Any, seen: Any, does: Any, method: str = "forward", **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made = policy(seen, does, rate, **NARROW, **options)
        return made if method == "forward" else Part(made, method)

    return make


def entries() -> dict[str, Entry]:
    forces: Callable[[], Inputs] = lambda: (*places(), numbers(4, 2, seed=1))  # noqa: E731
    return {
        "evaluate_actions of forces": Entry(actor_critic(ActorCriticPolicy, PLACE, FORCE, "evaluate_actions"), forces, "PPO"),
        "evaluate_actions of choices": Entry(
            actor_critic(ActorCriticPolicy, PLACE, CHOICE, "evaluate_actions"), lambda: (*places(), torch.tensor([0, 2, 1, 1])), "PPO"
        ),
        "predict_values": Entry(actor_critic(ActorCriticPolicy, PLACE, FORCE, "predict_values"), places, "PPO"),
        "predict_values of pictures": Entry(actor_critic(ActorCriticCnnPolicy, SCREEN, CHOICE, "predict_values"), screens, "PPO"),
        "predict_values of both": Entry(actor_critic(MultiInputActorCriticPolicy, BOTH, CHOICE, "predict_values"), both, "PPO"),
        "features of pictures": Entry(
            lambda: ActorCriticCnnPolicy(SCREEN, CHOICE, rate, **NARROW).features_extractor, lambda: (screens()[0] / 255,), "PPO"
        ),
        "mlp_extractor": Entry(lambda: ActorCriticPolicy(PLACE, FORCE, rate, **NARROW).mlp_extractor, places, "PPO"),
        "q_net": Entry(lambda: MlpPolicy(PLACE, CHOICE, rate, **NARROW).q_net, places, "DQN"),
        "q_net of pictures": Entry(lambda: CnnPolicy(SCREEN, CHOICE, rate, **NARROW).q_net, screens, "DQN"),
        "sac actor": Entry(lambda: SACPolicy(PLACE, FORCE, rate, **NARROW).actor, places, "SAC"),
        "sac critic": Entry(lambda: SACPolicy(PLACE, FORCE, rate, **NARROW).critic, forces, "SAC"),
        "td3 actor": Entry(lambda: TD3Policy(PLACE, FORCE, rate, **NARROW).actor, places, "TD3"),
        "td3 critic": Entry(lambda: TD3Policy(PLACE, FORCE, rate, **NARROW).critic, forces, "TD3"),
    }


PROVIDER = provider(entries)
