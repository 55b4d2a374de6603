"""The valuation: what a pruning outcome is worth. Standard library only."""

from ..errors import UserError
from .budget import Budget
from .outcome import Outcome, Reward, RewardFunction
from .priced import Priced
from .try_and_learn import TryAndLearn

__all__ = ["Budget", "Outcome", "Priced", "Reward", "RewardFunction", "TryAndLearn", "UserError"]
