"""A file whose factory needs no name."""

from models_here import two_layers as factory
