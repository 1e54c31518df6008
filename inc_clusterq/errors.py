"""What a caller may catch: one family of errors, split by whose mistake it was.

The command line turns `exit_status` into that of the process: 2 for what the user can correct, 1 for our failures.
"""

from __future__ import annotations

from typing import ClassVar


class ClusterQError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_status: ClassVar[int] = 1


class UserError(ClusterQError):
    """The request cannot be carried out as given; the message says what to change."""

    exit_status: ClassVar[int] = 2


class ConfigError(UserError):
    """The YAML file, one of its keys, or one of its values."""


class ModelError(UserError):
    """The model cannot be imported or exported, its checkpoint does not fit, or it is not a BatchNorm classifier."""


class DatasetError(UserError):
    """A synthetic or labelled set that is damaged, made for something else, or of the wrong shape."""


class OutputError(UserError):
    """The output folder cannot be written to, or already holds a result."""


class ResultError(UserError):
    """A saved result that is missing, damaged, or written by another version."""


class MissingDependencyError(UserError):
    """An optional package is not installed; the message names the extra that brings it."""


class DeploymentError(ClusterQError):
    """The deployed model does not compute what was evaluated."""
