"""Training, evaluation, checkpoints, prediction and drawing: all that happens to a model between data and command line."""
