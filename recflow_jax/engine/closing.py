"""What is closed at the end of a `with`."""

from typing import Self


class Closing:
    """As a context it is itself, and closed at the end, whatever happened."""

    def close(self) -> None:
        """May be called again."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
