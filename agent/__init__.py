"""The decider: policies, REINFORCE, saved agents and criteria. It sees only what a Gymnasium environment shows."""
