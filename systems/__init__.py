"""One file per paper; importing the package registers them all in SYSTEMS."""

from systems import gsva, lasagna, lisa, pixellm, sa2va, sesame, unified, unipixel  # noqa: F401  (they register themselves)
