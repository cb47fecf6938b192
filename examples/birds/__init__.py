"""A synthetic fine-grained bird set: species drawn from a seed, in the folder format of CUB-200-2011."""
