"""Every failure a caller can see: its wire code, its HTTP status, whether to try again and when.

A class knows its own answer; one middleware makes the response. Raise the class, say in the message
what happened and where, and put the cure in `hint`.
"""

from collections.abc import Sequence
from typing import ClassVar

import msgspec


class LlorchError(Exception):
    """A refusal with a wire code. `retry_after_ms` is milliseconds from now."""

    code: ClassVar[str] = "INTERNAL"
    status: ClassVar[int] = 500
    retriable: ClassVar[bool | None] = None

    def __init__(
        self,
        message: str,
        *,
        engine: str | None = None,
        hint: str | None = None,
        retry_after_ms: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.engine = engine
        self.hint = hint
        self.retry_after_ms = retry_after_ms
        self.headers = headers or {}


class InternalError(LlorchError):
    """A bug of ours; the message says nothing of the inside, the log has the rest."""

    retriable = False


class InvalidParams(LlorchError):
    """The request says something it may not; the message begins with the field's path."""

    code, status, retriable = "INVALID_PARAMS", 400, False


class ContextOverflow(LlorchError):
    """Prompt and answer together do not fit the model's context; the message has the three numbers."""

    code, status, retriable = "CONTEXT_OVERFLOW", 400, False


class MissingToken(LlorchError):
    """No usable Authorization header where one is needed."""

    code, status = "MISSING_TOKEN", 401


class BadToken(LlorchError):
    """An Authorization header, or a stream ticket, that does not match."""

    code, status = "BAD_TOKEN", 401


class ForbiddenHost(LlorchError):
    """The Host header names something this server is not: the mark of DNS rebinding."""

    code, status = "FORBIDDEN_HOST", 403


class ForbiddenOrigin(LlorchError):
    """A browser page of another site is asking."""

    code, status = "FORBIDDEN_ORIGIN", 403


class NotFound(LlorchError):
    """No such route."""

    code, status = "NOT_FOUND", 404


class UnknownPool(LlorchError):
    """No pool of that name."""

    code, status = "UNKNOWN_POOL", 404


class TaskNotFound(LlorchError):
    """No such task, or it ended too long ago to be kept."""

    code, status = "TASK_NOT_FOUND", 404


class MethodNotAllowed(LlorchError):
    """The route exists, with other methods; `Allow` names them."""

    code, status = "METHOD_NOT_ALLOWED", 405


class BodyTimeout(LlorchError):
    """The body took longer than `http.body_timeout_s`."""

    code, status, retriable = "BODY_TIMEOUT", 408, True


class DeterminismUnavailable(LlorchError):
    """A strict task for a pool that failed its determinism probe."""

    code, status, retriable = "DETERMINISM_UNAVAILABLE", 409, False


class BodyTooLarge(LlorchError):
    """More bytes than `http.max_body_bytes`, or a prompt that could never be queued."""

    code, status, retriable = "BODY_TOO_LARGE", 413, False


class UnsupportedMediaType(LlorchError):
    """A body that is not plain `application/json`."""

    code, status, retriable = "UNSUPPORTED_MEDIA_TYPE", 415, False


class ReloadStep(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One step of a reload, how long it took in ms, and, if it failed, why."""

    name: str
    ok: bool
    ms: int
    replica_id: str | None = None
    fault: str | None = None


class ReloadFailed(LlorchError):
    """A reload that changed nothing; `steps` are those that were taken, the last is the one that failed."""

    code, status, retriable = "RELOAD_FAILED", 409, True

    def __init__(self, message: str, *, engine: str | None = None, steps: Sequence[ReloadStep] = ()) -> None:
        super().__init__(message, engine=engine)
        self.steps = steps


class QueueFull(LlorchError):
    """The queue is full, in tasks or in bytes [MVP-031]."""

    code, status, retriable = "ADMISSION_REJECT", 429, True
    policy_label: ClassVar[str] = "reject"


class PoolUnready(LlorchError):
    """The model is loading, or was never seen yet."""

    code, status, retriable = "POOL_UNREADY", 503, True


class PoolUnavailable(LlorchError):
    """The engine is gone, misconfigured, or llorch is stopping."""

    code, status, retriable = "POOL_UNAVAILABLE", 503, True


class TooManyStreams(LlorchError):
    """`stream.max_readers` readers are connected already."""

    code, status, retriable = "TOO_MANY_STREAMS", 503, True
