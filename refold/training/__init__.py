"""What is done with checkpoints and while training."""
