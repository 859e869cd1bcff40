"""Files that other people made or will read: a disk, weights, images. Nothing here is the paper's."""
