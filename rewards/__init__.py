"""The valuation: what a pruning outcome is worth. Standard library only."""

from .errors import UserError
from .outcome import Outcome, Reward, RewardFunction

__all__ = ["Outcome", "Reward", "RewardFunction", "UserError"]
