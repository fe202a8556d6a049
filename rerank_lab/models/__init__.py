"""Models: bi-encoders and cross-encoders, their checkpoints, and how they are run."""
