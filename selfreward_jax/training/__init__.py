"""Losses on log-probs, the step, the trainer and its checkpoints."""
