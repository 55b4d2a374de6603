"""The pruning itself, without a configuration: deciders, searches, schedules, recovery."""
