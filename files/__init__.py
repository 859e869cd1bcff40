"""What is not the paper's: the disk, weights, images, options, logs, other processes."""
