"""Fast evaluation of many masks: what no mask changes is computed once, the rest runs for every mask."""
