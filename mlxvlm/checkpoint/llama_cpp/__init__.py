"""Models in llama.cpp's files: what its converters write, read back as a hub checkpoint. Knows no bytes."""
