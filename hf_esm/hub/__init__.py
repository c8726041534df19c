"""A folder on its way to the Hub: its card, its hashes, its upload."""
