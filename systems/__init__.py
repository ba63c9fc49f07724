"""One file per paper; importing the package registers them all in SYSTEMS."""

from systems import gsva, lasagna, lisa, pixellm, sesame, unified  # noqa: F401  (they register themselves)
