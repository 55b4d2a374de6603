"""Configuration files (data, not code): one root a command, one group a role."""
