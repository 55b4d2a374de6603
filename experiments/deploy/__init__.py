"""A network outside keepdrop: exports, runtimes, measured latency."""
