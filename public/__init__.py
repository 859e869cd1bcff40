"""The public world: checkpoints, captions and images that other people made."""
