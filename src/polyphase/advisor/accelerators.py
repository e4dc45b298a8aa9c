"""An accelerator's datasheet, and a fleet of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from polyphase.advisor.precision import Peak
from polyphase.core.errors import ConfigurationError

# Key in the file -> unit there per unit here. Everything else in a file is refused, so that a typing error is seen.
_REQUIRED = ("memory_gb", "memory_tb_s", "bf16_tflops", "link_gb_s", "domain_gpus")
_OPTIONAL = ("fp8_tflops", "fp4_tflops", "network_gb_s", "host_gb_s", "board_w", "all_in_kw", "dollars_per_hour")
_MAY_BE_ZERO = ("fp8_tflops", "fp4_tflops", "dollars_per_hour")  # none; no price
_TEXTS = ("name", "generation", "vendor", "source", "aliases")


@dataclass(frozen=True, slots=True)
class Accelerator:
    """Peaks are dense; bandwidths per accelerator and direction."""

    name: str
    generation: str  # of the architecture: what efficiencies are shared over
    vendor: str
    memory_bytes: float
    memory_bytes_per_s: float
    flops_per_s: Mapping[Peak, float] = field(hash=False)
    link_bytes_per_s: float  # within the domain: NVLink, Infinity Fabric, PCIe
    domain_size: int  # accelerators that reach each other at that rate
    network_bytes_per_s: float  # beyond it
    host_bytes_per_s: float
    board_w: float
    all_in_kw: float  # its share of host, network, cooling
    dollars_per_hour: float
    source: str = ""
    aliases: tuple[str, ...] = field(default=())

    def peak(self, peak: Peak) -> float:
        """Where a format has no units of its own, its products run at the next wider one's rate."""
        return self.flops_per_s[peak]


def accelerator_from_table(table: Mapping[str, object], where: str) -> Accelerator:
    """From the keys of a datasheet file (docs/advisor.md lists them). `where` names the file in errors.

    Raises: ConfigurationError: a key that is missing, unknown, or no positive number.
    """
    known = {*_REQUIRED, *_OPTIONAL, *_TEXTS}
    if strange := sorted(table.keys() - known):
        raise ConfigurationError(f"{where} has the unknown key {strange[0]!r}; known are {', '.join(sorted(known))}")
    if missing := [key for key in ("name", *_REQUIRED) if key not in table]:
        raise ConfigurationError(f"{where} lacks {', '.join(missing)}; see the datasheets that come with Polyphase for an example")
    figures = {key: _figure(table[key], key, where) for key in (*_REQUIRED, *_OPTIONAL) if key in table}
    bf16 = figures["bf16_tflops"] * 1e12
    fp8 = figures.get("fp8_tflops", 0) * 1e12 or bf16
    fp4 = figures.get("fp4_tflops", 0) * 1e12 or fp8
    aliases = table.get("aliases", [])
    if not isinstance(aliases, list):
        raise ConfigurationError(f'{where}: aliases must be a list of names, for example ["h100_sxm"]')
    return Accelerator(
        name=str(table["name"]).lower(),
        generation=str(table.get("generation", "other")).lower(),
        vendor=str(table.get("vendor", "")),
        memory_bytes=figures["memory_gb"] * 1e9,
        memory_bytes_per_s=figures["memory_tb_s"] * 1e12,
        flops_per_s={Peak.BF16: bf16, Peak.FP8: fp8, Peak.FP4: fp4},
        link_bytes_per_s=figures["link_gb_s"] * 1e9,
        domain_size=int(figures["domain_gpus"]),
        network_bytes_per_s=figures.get("network_gb_s", 50.0) * 1e9,
        host_bytes_per_s=figures.get("host_gb_s", 50.0) * 1e9,
        board_w=figures.get("board_w", 700.0),
        all_in_kw=figures.get("all_in_kw", 2.5 * figures.get("board_w", 700.0) / 1e3),
        dollars_per_hour=figures.get("dollars_per_hour", 0.0),
        source=str(table.get("source", "")),
        aliases=tuple(str(alias).lower() for alias in aliases),
    )


def _figure(value: object, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ConfigurationError(f"{where}: {key} must be a number, not {value!r}")
    if value == 0 and key not in _MAY_BE_ZERO:
        raise ConfigurationError(f"{where}: {key} must be more than 0")
    if key == "domain_gpus" and value != int(value):
        raise ConfigurationError(f"{where}: {key} must be a whole number, not {value!r}")
    return float(value)
