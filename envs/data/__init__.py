"""Images, targets, what an answer is judged by, and the three splits."""
