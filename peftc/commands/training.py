"""`peftc train`."""


def train() -> None:
    """Train."""
