"""Stores of images as tests need them; a module of its own, so that worker processes can load them."""

import os

import numpy as np


class Folder:
    """Files of a folder, by name."""

    def __init__(self, folder):
        self.folder = str(folder)
        self.names = sorted(os.listdir(folder))

    def __len__(self):
        return len(self.names)

    def name(self, i):
        return os.path.join(self.folder, self.names[i])

    def read(self, i):
        with open(self.name(i), "rb") as stream:
            return stream.read()

    def stamp(self, i):
        facts = os.stat(self.name(i))
        return [self.name(i), facts.st_size, facts.st_mtime_ns]


class Arrays:
    """Pixels in memory."""

    def __init__(self, pixels):
        self.pixels = np.asarray(pixels)

    def __len__(self):
        return len(self.pixels)

    def name(self, i):
        return f"row {i}"

    def read(self, i):
        return self.pixels[i]

    def stamp(self, i):
        return []


class Forbidden(Folder):
    """Files that must not be read."""

    def read(self, i):
        raise AssertionError(f"{self.name(i)} was read")
