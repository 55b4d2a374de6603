"""Images, targets, what an answer is scored by, and the three splits."""
