"""Everything that can be set about one deployment on this machine, with its default and its bounds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from polyphase.config.router import parse_names, parse_pairs, parse_weights, parts_of
from polyphase.config.units import parse_duration_s, parse_size_bytes
from polyphase.core.errors import ConfigurationError
from polyphase.router import PolicySettings, policy_of
from polyphase.router.tenants import parse_tenant_weights

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,19}")
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,39}")
MIN_KV_BYTES = 1024**2


def _check_name(name: str) -> str:
    # Part of a folder's name, and of socket paths, whose length is limited.
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a deployment; use up to 20 lower-case letters, digits, - and _, for example demo-2")
    return name


def _check_group(group: str | None) -> str | None:
    if group is not None and not _GROUP.fullmatch(group):
        raise ValueError(f"{group!r} cannot name a group; use up to 40 letters, digits and . - _ :, for example canary")
    return group


def _check_engine(engine: str) -> str:
    if engine not in ("torch", "vllm", "sglang", "trtllm", "openai", "mock") and ":" not in engine:
        raise ValueError(
            f"there is no engine {engine!r}; write torch, vllm, sglang, trtllm, openai, mock, or module:function of an engine of your own"
        )
    return engine


def _check_kv_bytes(kv_bytes: int) -> int:
    if kv_bytes < MIN_KV_BYTES:
        raise ValueError("is too small for a KV cache; write at least 1MiB, usually some GiB, for example 2GiB")
    return kv_bytes


def _check_model(model: str) -> str:
    if not model.strip():
        raise ValueError("is empty; name a folder, a model on the Hugging Face hub such as Qwen/Qwen3-0.6B, or demo")
    return model


def _parse_labels(given: object) -> dict[str, str]:
    pairs = parse_pairs(given, "labels", "zone=eu-1,rack=7") if isinstance(given, str) else given
    if not isinstance(pairs, Mapping | list):
        raise ValueError(f"{given!r} are no labels; write for example zone=eu-1,rack=7")
    labels = {str(name): str(value) for name, value in dict(pairs).items()}
    if any("=" in name or "," in name or "," in value for name, value in labels.items()):
        raise ValueError(f"{given!r} are no labels; names hold no = and nothing a comma, for example zone=eu-1,rack=7")
    return labels


def _parse_adapters(given: object) -> dict[str, str]:
    pairs = parse_pairs(given, "adapters", "sql=/models/sql-lora") if isinstance(given, str) else given
    if not isinstance(pairs, Mapping | list):
        raise ValueError(f"{given!r} are no adapters; write for example sql=/models/sql-lora")
    adapters = {str(name): str(folder) for name, folder in dict(pairs).items()}
    if any(not name or not folder or set(name + folder) & {"=", ","} for name, folder in adapters.items()):
        raise ValueError(f"{given!r} are no adapters; names and folders hold neither = nor a comma, for example sql=/models/sql-lora")
    return adapters


Size = Annotated[int, BeforeValidator(parse_size_bytes), AfterValidator(_check_kv_bytes)]
Duration = Annotated[float, BeforeValidator(parse_duration_s)]
Weights = Annotated[dict[str, float], BeforeValidator(parse_tenant_weights)]


# In a file, [router] groups these; each may also stand outside by its own name.
SECTIONS: Mapping[str, Mapping[str, str]] = {
    "router": {
        "policy": "policy",
        "weights": "router_weights",
        "filters": "router_filters",
        "picker": "router_picker",
        "temperature": "router_temperature",
        "session_idle": "session_idle",
        "split_threshold": "split_threshold",
        "split_fraction": "split_fraction",
        "kv_flow": "kv_flow",
        "kv_pull": "kv_pull",
    }
}


class DeploymentSettings(BaseModel):
    """What holds for a deployment as a whole."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, AfterValidator(_check_name)] = "default"  # of the deployment

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    frontends: int = Field(1, ge=1, le=64)  # at port and the ones that follow it
    policy: str = "kv"
    router_weights: Annotated[dict[str, float], BeforeValidator(parse_weights)] = {}  # of parts, in place of the policy's own
    router_filters: Annotated[tuple[str, ...], BeforeValidator(parse_names)] = ()  # besides those of every policy
    router_picker: str = "best"
    router_temperature: float = Field(0.0, ge=0, le=100)
    session_idle: Duration = 600.0  # seconds; the router remembers for so long where a session was
    split_threshold: int | None = Field(None, ge=0)  # tokens to compute from which prefill and decode are split; None: where it pays
    split_fraction: float = Field(0.3, ge=0, le=1)  # of the prompt; where less is to compute, it is not split
    kv_flow: bool = True  # a split prompt's KV goes to the decode worker while the rest of it is computed
    kv_pull: bool = True  # what another worker has cached of a prompt is pulled from there, where that is faster than computing it

    # What the router remembers of the blocks that workers hold.
    kv_events: bool = True  # False: not what workers tell, but what was sent there, for predicted_lifetime
    predicted_lifetime: Duration = Field(120.0, gt=0)  # seconds
    index_capacity: int | None = Field(None, ge=1)  # blocks; None: 4 million

    # What waits at the frontend while every worker is saturated.
    max_queued_requests: int = Field(4096, ge=0)  # 0: nothing waits there
    max_queued_per_tenant: int | None = Field(None, ge=1)
    max_queue_wait: Duration = Field(60.0, gt=0)  # seconds
    tenant_weights: Weights = Field(default_factory=dict)  # tenants that are not named weigh 1

    start_timeout: Duration = 600.0  # seconds; a first download from the hub counts
    drain_timeout: Duration = 30.0  # seconds; running requests get this long to finish

    @property
    def router_policy(self) -> PolicySettings:
        return PolicySettings(self.policy, self.router_weights, self.router_temperature, self.router_filters, self.router_picker)

    @model_validator(mode="after")
    def _check_ports(self) -> Self:
        if self.port + self.frontends - 1 > 65535:
            raise ValueError(f"{self.frontends} frontends need the ports from {self.port} on, of which there are only {65536 - self.port}")
        return self

    @model_validator(mode="after")
    def _check_policy(self) -> Self:
        try:
            policy_of(self.router_policy, parts_of(self.router_policy))
        except ConfigurationError as error:
            raise ValueError(error.message) from None
        return self


class GroupSettings(BaseModel):
    """Workers that are alike: of one model and one engine. None means: the engine, or the launcher, chooses what is sensible here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[str, AfterValidator(_check_model)]  # a folder, a name on the hub, or `demo`
    served_model_name: str | None = Field(None, min_length=1)  # what clients call it
    aliases: Annotated[tuple[str, ...], BeforeValidator(parse_names)] = ()  # further names for the model
    lora: Annotated[dict[str, str], BeforeValidator(_parse_adapters)] = {}  # adapters that are served beside it: folder by name
    group: Annotated[str | None, AfterValidator(_check_group)] = None  # those of one name share a weight; None: the engine
    weight: float | None = Field(None, ge=0, le=1e6)  # for the group's share of the model's requests; 0: the reserve

    workers: int | None = Field(None, ge=1, le=256)  # each for prefill and decode
    prefill: int | None = Field(None, ge=0, le=256)
    decode: int | None = Field(None, ge=0, le=256)

    labels: Annotated[dict[str, str], BeforeValidator(_parse_labels)] = {}  # of this machine's workers, for example zone → eu-1

    engine: Annotated[str, AfterValidator(_check_engine)] = "torch"
    device: str = "auto"
    accelerators: int = Field(1, ge=1, le=64)  # per worker; more than 1 for engines that compute in parallel, told so in engine_args
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kv_memory: Size | None = None  # bytes, per worker
    block_size: int | None = Field(None, ge=1, le=1024)  # tokens
    context_length: int | None = Field(None, ge=1)
    max_batch_tokens: int | None = Field(None, ge=1)
    max_running: int | None = Field(None, ge=1)
    threads: int | None = Field(None, ge=1)  # per worker

    # Of engines that are servers of their own.
    attach: Annotated[tuple[str, ...], BeforeValidator(parse_names)] = ()  # URLs of running ones, a worker for each
    engine_python: str | None = None  # interpreter of their environment
    engine_command: str | None = None  # in place of the stock command, for example `vllm serve`
    engine_args: str | None = None  # further flags of theirs, as in a shell
    engine_api_key_env: str | None = None  # name of the environment variable with the key of attached ones

    mock_model: str | None = None  # what the mock engine imagines; None: its defaults
    mock_accelerator: str | None = None
    mock_speedup: float | None = Field(None, gt=0)

    @property
    def has_phases(self) -> bool:
        """Whether its workers only prefill or only decode."""
        return bool(self.prefill or self.decode)

    @property
    def group_name(self) -> str:
        return self.group or self.engine

    @model_validator(mode="after")
    def _check_served_engine(self) -> Self:
        is_served = self.engine not in ("torch", "mock")
        if not is_served and (self.attach or self.engine_python or self.engine_command or self.engine_args):
            raise ValueError(
                f"attach, engine_python, engine_command and engine_args are for engines that are servers of their own, "
                f"and {self.engine} is none; write for example --engine vllm"
            )
        if self.engine == "openai" and not self.attach:
            raise ValueError("an openai engine is a server that runs already; name its address, for example --attach http://127.0.0.1:8080")
        if self.engine_api_key_env is not None and self.engine != "openai":
            raise ValueError(
                "engine_api_key_env is for --engine openai; the key of a vllm is in the variable POLYPHASE_ENGINE_API_KEY, if it wants one"
            )
        if self.engine == "openai" and self.prefill:
            raise ValueError(
                "openai workers cannot hand over from prefill to decode; write --attach with all addresses, without --prefill and --decode"
            )
        if self.attach and (self.engine_python or self.engine_command or self.engine_args):
            raise ValueError("a server that is attached to runs already: engine_python, engine_command and engine_args start one")
        if self.engine == "trtllm" and self.lora:
            raise ValueError("trtllm serves no LoRA adapters here; leave lora away, or take torch, vllm or sglang")
        if self.attach and self.lora:
            raise ValueError("a server that is attached to has loaded its adapters itself, and they are found there; leave lora away")
        if self.attach and (self.workers or (self.has_phases and (self.prefill or 0) + (self.decode or 0) != len(self.attach))):
            raise ValueError(
                "attach makes a worker for each address: leave --workers away, and let --prefill and --decode together be as many"
            )
        return self

    @model_validator(mode="after")
    def _check_accelerators(self) -> Self:
        if self.accelerators > 1 and self.engine in ("torch", "mock"):
            raise ValueError(
                f"a worker of {self.engine} computes on one accelerator; several are for --engine vllm, sglang and trtllm, "
                "told of them in --engine-args, or for --mock-accelerator 4xh100"
            )
        return self

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        wrong = next((alias for alias in self.aliases if not alias.strip() or "," in alias or len(alias) > 200), None)
        if wrong is not None:
            raise ValueError(f"the alias {wrong!r} cannot be one; aliases have 1 to 200 characters and no comma")
        return self

    @model_validator(mode="after")
    def _check_roles(self) -> Self:
        if self.workers is not None and (self.prefill is not None or self.decode is not None):
            raise ValueError("workers cannot be combined with prefill and decode; write either --workers 2, or --prefill 1 --decode 2")
        # Prefill workers alone are a group's part: who decodes may stand in another table, or run already (launch.plan sees them all).
        if not self.prefill and (self.decode == 0 or (self.prefill == 0 and self.decode is None)):
            raise ValueError("no worker is left that decodes; write for example --workers 1, or --prefill 1 --decode 2")
        return self


class ServeSettings(GroupSettings, DeploymentSettings):
    """`polyphase serve`: a deployment, and its workers, which are one group unless `groups` has several.

    With `groups`, what this says of workers itself is of no account.
    """

    groups: tuple[GroupSettings, ...] = ()

    @property
    def worker_groups(self) -> tuple[GroupSettings, ...]:
        return self.groups or (self,)
