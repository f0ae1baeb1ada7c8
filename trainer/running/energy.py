"""The energy that the processors drew, where the kernel counts it."""

import os
import threading
from pathlib import Path


POWERCAP = "/sys/class/powercap"
# A large processor's counter starts again from zero after a quarter of an hour.
SECONDS_BETWEEN_READINGS = 60.0


class EnergyMeter:
    """
    Energy of the processor packages since the meter was made, by the kernel's RAPL counters (Linux on Intel and AMD;
    on many machines root alone may read them). All that ran on the processors is in it, memory and accelerators are
    not.

    Args:
        root (`str` or `os.PathLike`, *optional*, defaults to `"/sys/class/powercap"`): Where the kernel has them.
        interval (`float`, *optional*, defaults to 60): Seconds between readings.
    """

    def __init__(self, root: str | os.PathLike = POWERCAP, interval: float = SECONDS_BETWEEN_READINGS):
        packages = [zone for zone in sorted(Path(root).glob("intel-rapl:*")) if _is_package(zone)]
        self._counters = [zone / "energy_uj" for zone in packages if os.access(zone / "energy_uj", os.R_OK)]
        self._ranges = [int((path.parent / "max_energy_range_uj").read_text()) for path in self._counters]
        self._last = [int(path.read_text()) for path in self._counters]
        self._microjoules = 0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        if self._counters:
            threading.Thread(target=self._keep_reading, args=(interval,), daemon=True).start()

    @property
    def kwh(self) -> float | None:
        """Kilowatt-hours so far; `None` where nothing counts them."""
        if not self._counters:
            return None
        self._read()
        return self._microjoules / 3.6e12

    def stop(self) -> None:
        """Takes no more readings but those that are asked for."""
        self._stopped.set()

    def _keep_reading(self, interval: float) -> None:
        while not self._stopped.wait(interval):
            self._read()

    def _read(self) -> None:
        with self._lock:
            now = [int(path.read_text()) for path in self._counters]
            self._microjoules += sum(
                (new - old) % top for new, old, top in zip(now, self._last, self._ranges, strict=True)
            )
            self._last = now


def _is_package(zone: Path) -> bool:
    """Whether it is a whole processor: others are its parts, or the platform around it."""
    return (zone / "name").read_text().startswith("package")
