"""Errors a user can catch by name; all of them are also the built-in kind they refine."""

from __future__ import annotations


class FlexcoreError(Exception):
    """Base of every error that flexcore raises on purpose."""


class UnsupportedModelError(FlexcoreError, ValueError):
    """`wrap` can't work on this model; the message says why and what to do. The model is unchanged."""


class WrapStateError(FlexcoreError, RuntimeError, ValueError):
    """A model was wrapped twice, unwrapped while plain, or either of them while a request is running."""


class StreamError(FlexcoreError, ValueError):
    """The media handed to a model don't fit its inputs (count, positions, width)."""


class WeightsMismatchError(FlexcoreError, ValueError):
    """Saved fine weights don't fit the model they are loaded into; the message names what differs."""


class SourceError(FlexcoreError, RuntimeError):
    """A fine source couldn't make a region's features; the message says which medium, where, and why."""
