"""A synthetic fine-grained bird set: species drawn from a seed, in the folder format of CUB-200-2011."""

from birds.dataset import VERSION, catalogue, contact_sheet, differing_parts, read_places, read_species, write_birds
from birds.draw import Species

__all__ = [
    "VERSION", "Species", "catalogue", "contact_sheet", "differing_parts", "read_places", "read_species", "write_birds",
]  # fmt: skip
