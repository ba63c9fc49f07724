"""One file a paper; importing the package registers them all in SYSTEMS."""

from systems import lasagna, lisa  # noqa: F401  (they register themselves)
