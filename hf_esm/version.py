"""The version, in one place for `setup.py`, recipes and cards."""

__version__ = "0.1.0"
