"""Typed errors: each message names the value, the limit and the remedy."""


class DreamenvError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigError(DreamenvError, ValueError):
    """A configuration value or key is not usable."""


class DatasetError(DreamenvError, ValueError):
    """A dataset folder is incomplete, altered or of another format."""


class BundleError(DreamenvError, ValueError):
    """A bundle folder is incomplete, altered or of another format."""


class CheckpointError(DreamenvError, ValueError):
    """A training checkpoint is incomplete, altered or of another model."""


class PolicyError(DreamenvError, ValueError):
    """A policy specification or a saved agent is not usable."""


class StorageError(DreamenvError, OSError):
    """Something cannot be written: the disk is full, or the folder is read-only; what was there before is intact."""


class BusyError(DreamenvError, RuntimeError):
    """Another process is writing the same folder."""


class InvalidActionError(DreamenvError, ValueError):
    """An action is outside the action space; the environment state is unchanged."""


class ResetError(DreamenvError, ValueError):
    """A seed or a reset option is not usable; the environment state is unchanged."""


class ClosedError(DreamenvError, RuntimeError):
    """An environment was used after `close()`."""


class SnapshotError(DreamenvError, ValueError):
    """Snapshot bytes are damaged, of another version, or of another world."""
