import functools
import time

import pytest

from mmesid.trainer.running import records
from mmesid.trainer.running.arguments import StageArguments
from mmesid.trainer.running.energy import EnergyMeter
from mmesid.trainer.running.records import StageRecord, StageRun


RANGE = 1_000_000


@pytest.fixture
def counters(tmp_path):
    """A machine of two processors; sets what their counters, one core's and the platform's say."""

    def write(*microjoules):
        zones = ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0", "intel-rapl:2")
        for zone, name, value in zip(zones, ("package-0", "package-1", "core", "psys"), (*microjoules, 7, 7)):
            (tmp_path / zone).mkdir(exist_ok=True)
            # At once, as the kernel does.
            (tmp_path / "new").write_text(f"{value}\n")
            (tmp_path / "new").rename(tmp_path / zone / "energy_uj")
            (tmp_path / zone / "name").write_text(f"{name}\n")
            (tmp_path / zone / "max_energy_range_uj").write_text(f"{RANGE}\n")

    write(900_000, 100_000)
    return write


def test_processors_are_summed_and_a_counter_may_start_again(counters, tmp_path):
    meter = EnergyMeter(tmp_path)
    counters(50_000, 300_000)
    assert meter.kwh == pytest.approx((150_000 + 200_000) * 1e-6 / 3_600_000)
    counters(60_000, 300_000)
    assert meter.kwh == pytest.approx(360_000 * 1e-6 / 3_600_000)
    meter.stop()


def test_no_turn_of_a_counter_is_missed(counters, tmp_path):
    meter = EnergyMeter(tmp_path, interval=0.01)
    for turn in range(1, 4):
        counters((900_000 + turn * 600_000) % RANGE, 100_000)
        time.sleep(0.3)
    meter.stop()
    assert meter.kwh == pytest.approx(3 * 600_000 * 1e-6 / 3_600_000)


def test_without_counters_nothing_was_measured(tmp_path):
    assert EnergyMeter(tmp_path).kwh is None


def test_the_record_of_a_stage_holds_what_was_measured(counters, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "EnergyMeter", functools.partial(EnergyMeter, tmp_path))
    arguments = StageArguments(output_dir=str(tmp_path / "out"))
    with StageRun("sasrec", arguments, inputs={}):
        counters(960_000, 100_000)
    assert StageRecord.load(tmp_path / "out").details["energy_kwh"] == pytest.approx(60_000 * 1e-6 / 3_600_000)
    monkeypatch.setattr(records, "EnergyMeter", functools.partial(EnergyMeter, tmp_path / "none"))
    with StageRun("sasrec", arguments, inputs={}):
        pass
    assert "energy_kwh" not in StageRecord.load(tmp_path / "out").details
