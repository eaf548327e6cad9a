"""From a checkpoint into a model."""
