"""What the data module builds on: verified arrays, and batches cut from them."""
