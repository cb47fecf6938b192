"""x"""
import numpy as np
from draw_bird import *
FAMILIES = """
# name       build      back   wing   belly  breast head   bill   legs   varies
Tern         tern       silver slate  white  white  white  orange orange bar   crown
Sparrow      songbird   brown  umber  buff   cream  buff   slate  pink   crown belly
Warbler      warbler    olive  slate  yellow yellow yellow black  slate  eye   bar
Gull         gull       grey   grey   white  white  white  yellow yellow tail  beak
Heron        heron      slate  slate  grey   white  silver yellow olive  crown beak
Kingfisher   kingfisher teal   blue   orange white  teal   black  red    belly bar
Jay          crested    blue   navy   silver white  blue   black  slate  tail  eye
Woodpecker   woodpecker black  black  white  white  cream  slate  grey   crown bar
Hawk         hawk       brown  brown  cream  white  brown  slate  yellow tail  belly
Plover       plover     buff   brown  white  white  buff   black  orange beak bar
Duck duck green umber grey rufous green yellow orange eye bar
Parrot parrot green green yellow green red buff grey tail bar
"""
def mark(family, part, level):
    light = lambda n: sum(COLOURS[n]) > 400
    return {}
