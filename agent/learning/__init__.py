"""Acting and learning: rollouts, REINFORCE, natural evolution strategies, and the loop around them."""
