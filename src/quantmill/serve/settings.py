"""What a server is told when it starts. One dataclass; `quantmill serve` writes its flags into it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from quantmill.errors import BadRequest
from quantmill.runtime.engine_types import EngineConfig


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """Raises BadRequest for an address that others can reach without a key."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: a free one
    api_keys: tuple[str, ...] = ()  # may use /v1; none: whoever reaches the address may
    admin_keys: tuple[str, ...] = ()  # may load and drop models, too
    no_auth: bool = False  # an open door on a network, by decision
    device: str = "auto"
    threads: int | None = None
    engine_process: bool | None = None  # engines in processes of their own; None: on a GPU
    fast_batches: bool = False  # a GPU may let an answer depend on the others in its batch, for speed
    exact: bool = False
    context: int | None = None  # positions that a sequence may have; None: the model's
    kv_tokens: int | None = None  # positions that each model's cache holds
    tensor_parallel: int = 1  # processes that share every layer of a model
    memory_bytes: int | None = None  # all models together; None: 80 % of what the device has
    max_body_bytes: int = 4 << 20
    max_prompt_tokens: int | None = None  # None: the context
    max_concurrent: int = 256  # requests under way, all callers together
    max_concurrent_per_key: int = 128
    drain_seconds: float = 30.0  # what answers under way are given after SIGTERM
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if not (self.loopback or self.api_keys or self.admin_keys or self.no_auth):
            raise BadRequest(
                f"{self.host} can be reached by others: give --api-key KEY, or --no-auth to let everybody in"
            )
        short = [k for k in (*self.api_keys, *self.admin_keys) if len(k) < 8]
        if short:
            raise BadRequest("a key of fewer than 8 characters can be guessed: use a longer --api-key")

    @property
    def loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
