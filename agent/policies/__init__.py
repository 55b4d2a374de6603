"""Policies: from what is seen of the filters to a distribution over keep masks."""
