"""What is minimised: the losses, their traits and references. Knows nothing of files, models and the config class."""
