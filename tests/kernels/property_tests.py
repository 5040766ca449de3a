"""hypothesis, or where it is not installed (a GPU machine with torch and Triton alone) names that skip its tests."""

import pytest

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
except ImportError:

    class _Anything:
        """Takes any call, so that strategies can be written down."""

        def __getattr__(self, name):
            return self

        def __call__(self, *arguments, **named):
            return self

    HealthCheck = st = _Anything()

    def given(*arguments, **named):
        return lambda test: pytest.mark.skip(reason="hypothesis is not installed")(_without_arguments(test))

    def settings(*arguments, **named):
        return lambda test: test

    def _without_arguments(test):
        def skipped():
            """Never runs: pytest must not look for fixtures with the names of what hypothesis draws."""

        skipped.__name__ = test.__name__
        return skipped


__all__ = ["HealthCheck", "given", "settings", "st"]
