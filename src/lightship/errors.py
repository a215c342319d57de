"""What a user can cause, as exceptions: each message names the file, tensor or key, the limit, and what to do next.

The command line prints the message of a `LightshipError` without a traceback and exits with 2.
"""


class LightshipError(ValueError):
    """Base of every error that a user's input or environment can cause."""


class CheckpointError(LightshipError):
    """A checkpoint directory that cannot be used: missing or truncated shards, wrong tensors, wrong configuration."""


class RecipeError(LightshipError):
    """A recipe that cannot be read: unknown key, wrong type, impossible value."""


class ServingError(LightshipError):
    """A server that cannot be started or does not answer: port in use, indivisible tensor-parallel degree, crash."""


class EvaluationError(LightshipError):
    """An evaluation that cannot be run or trusted: missing questions, an endpoint that fails."""


class PromotionError(LightshipError):
    """A promotion that is refused: no passing verdict, or the artifact is not the one that was evaluated."""
