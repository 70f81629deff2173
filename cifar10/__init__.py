"""What the data module stands on: the archive as checked arrays, and batches cut from them."""
