"""Every error that Polyphase raises on purpose.

    PolyphaseError
    ├── RequestError                 the caller's fault; nothing was started (4xx)
    │   ├── InvalidRequest             400  a field is missing, of the wrong type or out of range
    │   ├── ContextLengthExceeded      400  the prompt does not fit the model
    │   ├── KindNotServed              400  no engine of the model takes this kind of request
    │   ├── ModelNotFound              404
    │   ├── RouteNotFound              404
    │   ├── MethodNotAllowed           405
    │   ├── BodyTooLarge               413
    │   └── UnsupportedMediaType       415
    ├── Refused                      correct, but not now: rejected before anything was started (429, 503)
    │   ├── NoWorkers                  503  nothing serves this model
    │   ├── Overloaded                 429  no worker can take it in time, and it had better not wait
    │   │   └── Busier                 429  the worker has more to do than it was chosen for; with its true load, choose again
    │   ├── Draining                   503  this process is going away
    │   ├── RoleChanged                503  the worker has another role than the sender knew; between processes only
    │   └── PartFailed                 500  a router part of somebody else's broke its contract
    ├── Lost                         accepted, and then broken off (429, 500, 503, 504)
    │   ├── Evicted                    429  while it waited in the queue; Retry-After
    │   ├── WorkerLost                 503  the worker died or went silent
    │   │   └── ConnectionLost         503  it may be well, but what was said meanwhile is lost
    │   ├── EngineFailed               500  the engine raised while it computed
    │   └── DeadlineExceeded           504
    ├── TransferError                KV blocks could not be moved, or may not be used
    │   ├── TransferRefused            the two sides cannot work together: no common backend, token, version or layout
    │   │   └── BackendUnusable          a backend that both have failed at the first try to reach the peer's memory
    │   ├── PeerLost                   the other agent died, went away or cannot be reached
    │   ├── TransferTimeout            not done by its deadline
    │   ├── StaleDescriptor            what it describes is gone: an earlier life of the peer, or blocks given to other content
    │   └── TransferMisuse             a bug of the caller
    │       ├── HandleReleased           used after its release, or released twice
    │       └── ForeignDescriptor        a descriptor that belongs to another agent, session or region, or names no block of it
    ├── KvError                      the block pool was used against its rules: a bug
    ├── ConfigurationError           a flag, file or folder is wrong; the command ends with exit code 1
    │   └── ModelLoadError
    └── WireError                    a message between processes does not have the agreed form

An error says what was wrong, where, and what would be right. `code` is stable and machine-readable; `stage` names the plane in
which it arose; `is_retryable` says whether the same request may succeed elsewhere or later. `http_status` is used at the frontend only.
"""

from __future__ import annotations

from typing import ClassVar


class PolyphaseError(Exception):
    """Root of the tree. `message` is one sentence for a person."""

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    is_retryable: ClassVar[bool] = False
    error_type: ClassVar[str] = "server_error"
    stage: ClassVar[str] = "internal"

    def __init__(self, message: str, *, request_id: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id


class RequestError(PolyphaseError):
    """The caller's fault. `param` names the offending field in the request's own words, for example `messages[0].role`."""

    code = "invalid_request"
    http_status = 400
    error_type = "invalid_request_error"
    stage = "validation"

    def __init__(self, message: str, *, param: str | None = None, request_id: str | None = None) -> None:
        super().__init__(message, request_id=request_id)
        self.param = param


class InvalidRequest(RequestError):
    code = "invalid_value"


class ContextLengthExceeded(RequestError):
    code = "context_length_exceeded"


class KindNotServed(RequestError):
    code = "kind_not_served"


class ModelNotFound(RequestError):
    code = "model_not_found"
    http_status = 404


class RouteNotFound(RequestError):
    code = "not_found"
    http_status = 404


class MethodNotAllowed(RequestError):
    code = "method_not_allowed"
    http_status = 405


class BodyTooLarge(RequestError):
    code = "body_too_large"
    http_status = 413


class UnsupportedMediaType(RequestError):
    code = "unsupported_media_type"
    http_status = 415


class Refused(PolyphaseError):
    """Rejected before anything was started. `retry_after_s` becomes the Retry-After header."""

    code = "unavailable"
    http_status = 503
    is_retryable = True
    error_type = "service_unavailable_error"
    stage = "admission"

    def __init__(self, message: str, *, retry_after_s: int = 1, request_id: str | None = None) -> None:
        super().__init__(message, request_id=request_id)
        self.retry_after_s = retry_after_s


class NoWorkers(Refused):
    code = "no_workers"


class Overloaded(Refused):
    code = "overloaded"
    http_status = 429
    error_type = "rate_limit_error"


class Busier(Overloaded):
    code = "busier"


class Draining(Refused):
    code = "draining"


class RoleChanged(Refused):
    code = "role_changed"


class PartFailed(Refused):
    code = "router_part_failed"
    http_status = 500
    is_retryable = False
    error_type = "server_error"
    stage = "routing"


class Lost(PolyphaseError):
    """Broken off after it had been accepted."""

    code = "lost"
    http_status = 500
    is_retryable = True
    stage = "serving"


class Evicted(Lost):
    """Turned out of the queue after it had been let in. `retry_after_s` becomes the Retry-After header."""

    code = "evicted"
    http_status = 429
    error_type = "rate_limit_error"
    stage = "admission"

    def __init__(self, message: str, *, retry_after_s: int = 1, request_id: str | None = None) -> None:
        super().__init__(message, request_id=request_id)
        self.retry_after_s = retry_after_s


class WorkerLost(Lost):
    code = "worker_lost"
    http_status = 503


class ConnectionLost(WorkerLost):
    code = "connection_lost"


class EngineFailed(Lost):
    code = "engine_failed"


class DeadlineExceeded(Lost):
    code = "deadline_exceeded"
    http_status = 504
    is_retryable = False


class TransferError(PolyphaseError):
    code = "transfer_failed"
    is_retryable = True
    stage = "transfer"


class TransferRefused(TransferError):
    code = "transfer_refused"
    is_retryable = False


class BackendUnusable(TransferRefused):
    code = "backend_unusable"


class PeerLost(TransferError):
    code = "peer_lost"


class TransferTimeout(TransferError):
    code = "transfer_timeout"


class StaleDescriptor(TransferError):
    code = "stale_descriptor"


class TransferMisuse(TransferError):
    code = "transfer_misuse"
    is_retryable = False


class HandleReleased(TransferMisuse):
    code = "handle_released"


class ForeignDescriptor(TransferMisuse):
    code = "foreign_descriptor"


class KvError(PolyphaseError):
    code = "kv_error"
    stage = "kv"


class ConfigurationError(PolyphaseError):
    code = "configuration_error"
    stage = "configuration"


class ModelLoadError(ConfigurationError):
    code = "model_load_failed"


class WireError(PolyphaseError):
    code = "wire_error"
    stage = "wire"
