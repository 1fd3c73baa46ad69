"""Every error that Singlestream raises on purpose.

::

    SinglestreamError
    ├── ConfigError             a setting is wrong; names the file and the key
    ├── ContractError           a message does not keep its contract; it goes to the dead-letter stream
    │   ├── UnknownMessage      kind or schema version this build does not know
    │   └── InvalidMessage      known kind, bad body
    ├── DeadlineExceeded        a wait ended; names what was waited for and for how long
    ├── Fenced                  another writer has taken over; this process must stop writing and exit
    ├── UnknownOutcome          a write's reply was lost; memory must be rebuilt from Redis before the next write
    ├── ServiceError            an HTTP request to a service failed; names service, request, status and body
    ├── SandboxError            the sandbox itself failed (see singlestream.clients.sandbox); never a reward
    ├── WeightsError            a weight manifest or its bytes are unusable
    └── CheckpointError         a checkpoint is truncated, foreign or missing

An error's text says which boundary was crossed and what to do next.
"""

from __future__ import annotations


class SinglestreamError(Exception):
    """Base of every deliberate error."""


class ConfigError(SinglestreamError):
    """A setting is wrong, missing or unknown."""


class ContractError(SinglestreamError):
    """A message does not keep its contract."""


class UnknownMessage(ContractError):
    """The envelope names a kind or a schema version that this build does not know."""


class InvalidMessage(ContractError):
    """The envelope is damaged, or its body does not validate."""


class DeadlineExceeded(SinglestreamError):
    """A wait reached its deadline.

    Args:
        waited_for: the named cause, for example ``"a policy version in stream ss:demo:policy_versions"``.
        seconds: how long was waited.
    """

    def __init__(self, waited_for: str, seconds: float) -> None:
        super().__init__(f"waited {seconds:.0f} s for {waited_for}")
        self.waited_for = waited_for
        self.seconds = seconds


class Fenced(SinglestreamError):
    """Another process holds the fence: this one is a zombie and must not write again (docs/design.md, I12)."""


class UnknownOutcome(SinglestreamError):
    """A write was sent and its reply was lost: it may or may not have happened."""


class ServiceError(SinglestreamError):
    """A request to a service failed.

    Args:
        service: name of the service, for example ``"value_store"``.
        request: method and URL.
        detail: status and body, or the transport's error.
    """

    def __init__(self, service: str, request: str, detail: str, status: int | None = None) -> None:
        super().__init__(f"{service}: {request}: {detail}")
        self.service = service
        self.request = request
        self.status = status


class SandboxError(SinglestreamError):
    """The sandbox itself failed: an infrastructure fault, never evidence about the policy."""


class WeightsError(SinglestreamError):
    """A weight manifest does not fit the model, or its bytes fail their checksums."""


class CheckpointError(SinglestreamError):
    """A checkpoint is truncated, from another run, or missing."""
