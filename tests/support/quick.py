"""Settings that make a call from Python a matter of seconds."""

from keepdrop import AgentSettings, EvaluationSettings, Settings
from keepdrop.agent.learning.natural_evolution import NetworkAgentSettings
from keepdrop.experiments.pruning.network_search import NetworkSearchSettings

QUICK = Settings(
    reward_size=200,
    masks=4,
    images=60,
    agent=AgentSettings(updates=2),
    evaluation=EvaluationSettings(compensation_images=100, statistics_images=100),
    network=NetworkSearchSettings(masks=4, images=60, repair_images=40, agent=NetworkAgentSettings(updates=2)),
)
CALL = {"drop_bound": 0.2, "layers": ["conv1", "conv2"], "finetune": None, "settings": QUICK}
