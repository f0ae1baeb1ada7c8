"""
Columns of interactions as arrays: ids as strings, times as integers, ratings as floats, read the same way whatever the
format of the table. A row that has no such value is told by its number and its value.
"""

import datetime
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from .files import one_line, shown


_ZONE = re.compile(r":\d\d(\.\d+)?\s*(Z|z|[+-]\d\d(:?\d\d)?)$")
# What tables write where there is no number.
_NO_NUMBER = pa.array(["", *pa_csv.ConvertOptions().null_values, "none", "None"])

# What a column of times may hold, with what errors call it.
_KINDS = {
    "integer": "an integer",
    "seconds": "a number with a fraction, of seconds",
    "local": "a date or time without a zone",
    "zoned": "a time with a zone",
}
# Seconds that fit into microseconds of 64 bits.
_MAX_SECONDS = 9.2e12
# From here on a time that is a number looks like seconds since 1970, or parts of them.
_LOOKS_LIKE_EPOCH = 1e8
_LOOKED_AT = 100_000


class Column(NamedTuple):
    """
    Values of some rows.

    Args:
        values (`pa.Array` or `np.ndarray`): One per row; anything where it cannot be read.
        bad (`dict[int, str]`): What is wrong with those that cannot be read, by their position, in ascending order.
    """

    values: Any
    bad: dict[int, str]


def array_of(values: Iterable) -> pa.Array:
    """Values of JSON as an array; as strings where they are of several types, or beyond what any holds."""
    values = list(values)
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, ValueError, TypeError):
        texts = [value if value is None or isinstance(value, str) else _text(value) for value in values]
        return pa.array([text and text.encode("utf-8", "replace").decode() for text in texts], pa.string())


def _text(value) -> str:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else shown(value)


def _strings(column: pa.Array) -> pa.Array | None:
    """The column as strings if it holds such, in whichever way."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return column.cast(pa.string()) if any(is_kind(column.type) for is_kind in kinds) else None


def _positions(mask: pa.Array) -> list[int]:
    return np.flatnonzero(pc.fill_null(mask, False).to_numpy(zero_copy_only=False)).tolist()


def read_ids(column: pa.Array, name: str, where: str) -> Column:
    """
    Raw ids as strings; a column of floats without fractions holds the integers that it held before gaps made it one.

    Raises:
        ValueError: If the column holds neither integers nor strings; the sentence names `where` it was read.
    """
    remedy = "an id is an integer or a string, and not empty"
    texts = _strings(column)
    if texts is None and pa.types.is_floating(column.type):
        numbers = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        with np.errstate(invalid="ignore"):
            whole = (np.floor(numbers) == numbers) & (np.abs(numbers) < 2**53)
        integers = np.where(whole, numbers, 0).astype(np.int64)
        values = pa.array(integers).cast(pa.string())
        return Column(values, dict.fromkeys(np.flatnonzero(~whole).tolist(), remedy))
    if texts is None and (pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
        texts = column.cast(pa.string())
    if texts is None:
        raise ValueError(f"{where} column '{name}' holds {column.type}; an id is an integer or a string.")
    bad = _positions(pc.or_kleene(texts.is_null(), pc.equal(texts, "")))
    return Column(pc.fill_null(texts, ""), dict.fromkeys(bad, remedy))


def read_ratings(column: pa.Array, name: str, where: str) -> Column:
    """Ratings `(rows,)` as float32, NaN where there is none; raises `ValueError` if the column holds no numbers."""
    texts = _strings(column)
    if texts is not None:
        texts = pc.utf8_trim_whitespace(texts)
        column = pc.if_else(pc.is_in(texts, _NO_NUMBER), None, texts)
    try:
        numbers = column.cast(pa.float64())
        bad = {}
    except pa.ArrowException as error:
        if texts is None:
            raise ValueError(f"{where} column '{name}' holds {column.type}; a rating is a number.") from error
        # Without regard to those that Arrow stumbled over.
        parsed = pd.to_numeric(column.to_pandas(), errors="coerce")
        bad = dict.fromkeys(_positions(pc.and_(pa.array(parsed.isna()), column.is_valid())), "a rating is a number")
        numbers = pa.array(parsed, pa.float64())
    with np.errstate(over="ignore"):
        values = pc.fill_null(numbers, math.nan).to_numpy(zero_copy_only=False).astype(np.float32)
    infinite = np.flatnonzero(np.isinf(values)).tolist()
    return Column(values, dict(sorted((bad | dict.fromkeys(infinite, "a rating is a finite number")).items())))


class TimeReader:
    """
    Times as integers: those that are integers as they are, and microseconds where they are floats (of seconds), dates,
    or text in ISO 8601 or in a format of one's own. All of a table must be of the same kind, so that their order is
    the order in time.

    Args:
        time_format (`str`, *optional*): How times that are text are written, in the codes of `datetime.strptime`.
    """

    def __init__(self, time_format: str | None = None):
        self.time_format = time_format
        # Of all rows, set by the first: a key of `_KINDS`.
        self.kind: str | None = None
        if time_format is not None:
            try:
                datetime.datetime.strptime(datetime.datetime(2020, 9, 15).strftime(time_format), time_format)
            except ValueError as error:
                raise ValueError(
                    f"time_format is {time_format!r} ({one_line(error)}); write it in the codes of strptime, such as "
                    "'%d/%m/%Y %H:%M'."
                ) from error

    @property
    def per_second(self) -> float:
        """How many units of the times that were read are a second, or may be."""
        return 1.0 if self.kind == "integer" else 1e6

    def shown(self, time: float) -> str:
        """A time as errors tell it: a date where it is one."""
        if self.kind == "integer":
            return str(int(time))
        return str(np.datetime64(int(time), "us"))

    def read(self, column: pa.Array, name: str, where: str) -> Column:
        """
        Times `(rows,)` as int64.

        Raises:
            ValueError: If the column holds something else; the sentence names `where` it was read.
        """
        texts = _strings(column)
        if texts is None and self.time_format is not None and pa.types.is_integer(column.type):
            texts = column.cast(pa.string())
        if texts is not None:
            return self._of_texts(texts)
        bad = dict.fromkeys(_positions(column.is_null()), "fill in the time, or remove the row")
        if pa.types.is_null(column.type):
            return Column(np.zeros(len(column), np.int64), bad)
        try:
            if pa.types.is_floating(column.type) or pa.types.is_decimal(column.type):
                return self._of_floats(column.cast(pa.float64()), bad)
            if pa.types.is_integer(column.type):
                if self.kind == "seconds":
                    return self._of_floats(column.cast(pa.float64()), bad)
                return self._of_kind("integer", column.cast(pa.int64()), bad)
            zone = column.type.tz if pa.types.is_timestamp(column.type) else None
            if not pa.types.is_duration(column.type):
                # What is finer than a microsecond is cut off.
                options = pc.CastOptions(pa.timestamp("us", zone), allow_time_truncate=True)
                column = pc.cast(column, options=options)
            return self._of_kind("zoned" if zone else "local", column.cast(pa.int64()), bad)
        except pa.ArrowException as error:
            raise ValueError(
                f"{where} column '{name}' holds {column.type} that is no time ({one_line(error)}); a time is a "
                "number, a timestamp or text in ISO 8601."
            ) from error

    def _of_kind(self, kind: str, times: pa.Array, bad: dict[int, str]) -> Column:
        """Times of a column of one type; all are bad if those before were of another."""
        values = pc.fill_null(times, 0).to_numpy(zero_copy_only=False)
        if len(bad) < len(values):
            self.kind = self.kind or kind
            if kind != self.kind:
                bad = dict.fromkeys(range(len(values)), self._other_kind(kind)) | bad
        return Column(values, bad)

    def _of_floats(self, column: pa.Array, bad: dict[int, str]) -> Column:
        seconds = pc.fill_null(column, 0.0).to_numpy(zero_copy_only=False)
        no_time = np.flatnonzero(~(np.abs(seconds) < _MAX_SECONDS)).tolist()
        bad = bad | dict.fromkeys(no_time, "a time with a fraction is a finite number of seconds")
        microseconds = np.round(np.where(np.abs(seconds) < _MAX_SECONDS, seconds, 0) * 1e6).astype(np.int64)
        return self._of_kind("seconds", pa.array(microseconds), dict(sorted(bad.items())))

    def _other_kind(self, kind: str) -> str:
        assert self.kind is not None
        return f"that is {_KINDS[kind]} where other rows have {_KINDS[self.kind]}; write all times alike"

    def _of_texts(self, texts: pa.Array) -> Column:
        if self.time_format is not None:
            return self._of_format(texts, self.time_format)
        column = self._of_equal_texts(texts)
        return self._one_by_one(texts) if column is None else column

    def _of_equal_texts(self, texts: pa.Array) -> Column | None:
        """Times that Arrow can read, if they are all of one kind, and of that of the rows before."""
        if texts.null_count or len(texts) == 0:
            return None
        if self.kind in (None, "integer"):
            try:
                return self._of_kind("integer", texts.cast(pa.int64()), {})
            except pa.ArrowInvalid:
                pass
        if self.kind in (None, "seconds"):
            try:
                column = self._of_floats(texts.cast(pa.float64()), {})
                return None if column.bad else column
            except pa.ArrowInvalid:
                pass
        if self.kind in (None, "local", "zoned"):
            # Arrow reads strings with a time zone and strings without one as two types.
            kind = "zoned" if _ZONE.search(texts[0].as_py()) else "local"
            try:
                times = texts.cast(pa.timestamp("us", "UTC" if kind == "zoned" else None))
            except pa.ArrowInvalid:
                return None
            return self._of_kind(kind, times.cast(pa.int64()), {}) if self.kind in (None, kind) else None
        return None

    def _one_by_one(self, texts: pa.Array) -> Column:
        """Times of which some are bad, or of another kind than most."""
        parsed = [_parse_time(text) for text in texts.to_pylist()]
        kinds = Counter(kind for kind, _ in parsed if kind is not None)
        if kinds.keys() == {"integer", "seconds"} and self.kind in (None, "seconds"):
            parsed = [("seconds", time) if kind == "integer" else (kind, time) for kind, time in parsed]
            self.kind = "seconds"
        elif self.kind is None and kinds:
            self.kind = kinds.most_common(1)[0][0]
        values, bad = np.zeros(len(parsed), np.int64), {}
        for position, (kind, time) in enumerate(parsed):
            if kind == "integer" and self.kind == "seconds":
                kind, time = "seconds", float(time)
            if kind is None:
                bad[position] = "a time is a number or in ISO 8601; say in time_format how yours are written"
            elif kind != self.kind:
                bad[position] = self._other_kind(kind)
            elif not abs(time) < (_MAX_SECONDS if kind == "seconds" else 2**63):
                bad[position] = "a time fits into 64 bits"
            else:
                values[position] = round(time * 1e6) if kind == "seconds" else time
        return Column(values, bad)

    def _of_format(self, texts: pa.Array, time_format: str) -> Column:
        # Half of the zones of a column may be there: times with and without one are not comparable.
        kind = "zoned" if "%z" in time_format or "%Z" in time_format else "local"
        times = pd.to_datetime(texts.to_pandas(), format=time_format, errors="coerce", utc=kind == "zoned")
        bad = dict.fromkeys(np.flatnonzero(times.isna()).tolist(), f"it is not written as time_format {time_format!r}")
        values = pd.DatetimeIndex(times).tz_localize(None).as_unit("us").astype(np.int64)
        return self._of_kind(kind, pa.array(np.where(times.isna(), 0, values)), bad)


def _parse_time(text: str | None) -> tuple[str | None, float]:
    """The kind of a time and its value: an integer, seconds, or microseconds; `None` if it is no time."""
    text = (text or "").strip()
    # Neither underscores nor digits of other scripts, which Python reads and Arrow does not.
    if text.isascii() and "_" not in text and len(text) < 100:
        for kind, parse in (("integer", int), ("seconds", float)):
            try:
                value = parse(text)
            except ValueError:
                continue
            return (kind, value) if math.isfinite(value) else (None, 0)
        try:
            moment = datetime.datetime.fromisoformat(text)
        except ValueError:
            return None, 0
        kind = "local" if moment.tzinfo is None else "zoned"
        since = moment - datetime.datetime(1970, 1, 1, tzinfo=None if kind == "local" else datetime.UTC)
        return kind, since // datetime.timedelta(microseconds=1)
    return None, 0


def implausible_times(times: np.ndarray, per_second: float) -> np.ndarray:
    """
    Positions, ascending, of times that lie apart from all others by more than they can: 1970 beside 2020 where a time
    is missing, seconds beside milliseconds. `times` are `(interactions,)` integers of which `per_second` are a second;
    none is told apart among small numbers, which may count anything.
    """
    if len(times) == 0:
        return np.zeros(0, np.int64)
    typical = abs(float(np.median(times[:: max(len(times) // _LOOKED_AT, 1)])))
    if typical < _LOOKS_LIKE_EPOCH * per_second:
        return np.zeros(0, np.int64)
    # In integers, for a float would make a copy of all times.
    lowest, low_end, high_end, highest = (int(typical * factor) for factor in (0.1, 0.5, 2, 10))
    low, high = times < lowest, times > highest
    # Where something lies between, times are spread that wide.
    if low.any() and ((times >= lowest) & (times < low_end)).any():
        low[:] = False
    if high.any() and ((times <= highest) & (times > high_end)).any():
        high[:] = False
    return np.flatnonzero(low | high)
