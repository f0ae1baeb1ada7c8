"""
Reader of MovieLens as GroupLens publishes it:

    ml-1m     ratings.dat `user::film::rating::time`        movies.dat `film::title::genre|genre`
    ml-100k   u.data `user film rating time`, tabs        u.item `film|title|released|on video|URL|19 flags of genres`

Later releases are CSV files: [`~mmesid.trainer.data.sources.tabular.read_tabular`] reads them.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from ..files import BadRows, read_lines, shown
from ..source import CatalogueBuilder, InteractionCollector, Source, join


# Both releases are older than UTF-8's spread.
_ENCODING = "latin-1"
# The order of u.item's flags; the first says that no genre is known.
_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip


def read_movielens(
    source_dir: str | os.PathLike,
    *,
    text_fields: list[str] | None = None,
    on_bad_row: str = "error",
    pictures: dict[str, Path] | None = None,
    source_name: str | None = None,
    licence: str = "unknown",
) -> Source:
    """Reads the folder of an unpacked archive; the other arguments are those of
    [`~mmesid.trainer.data.sources.tabular.read_tabular`]."""
    directory = Path(source_dir)
    there = [release for release in _RELEASES if all((directory / name).is_file() for name in release[1:3])]
    if not there:
        raise FileNotFoundError(
            f"'{directory}' holds neither ratings.dat and movies.dat (MovieLens 1M) nor u.data and u.item "
            "(MovieLens 100K); name the folder of an unpacked archive."
        )
    release, ratings, films, separator, parse_film = there[0]
    bad_rows = BadRows(on_bad_row)
    collector = InteractionCollector()
    collector.extend_rows(_ratings(directory / ratings, separator, bad_rows))
    collector.finish()
    builder = CatalogueBuilder(text_fields, pictures, directory)
    for where, line in read_lines(directory / films, _ENCODING):
        try:
            film, title, genres = parse_film(line, where)
            builder.append(film, {"title": title, "categories": genres}, None, where)
        except ValueError as error:
            bad_rows.refuse("items", error)
    return join(source_name or release, licence, collector, builder, str(directory / films), bad_rows)


def _ratings(path: Path, separator: str, bad_rows: BadRows) -> Iterator[tuple[str, str, int, float]]:
    for where, line in read_lines(path, _ENCODING):
        try:
            interaction = _rating(line, separator, where)
        except ValueError as error:
            bad_rows.refuse("interactions", error)
        else:
            yield interaction


def _rating(line: str, separator: str, where: str) -> tuple[str, str, int, float]:
    try:
        user, film, rating, time = line.split(separator)
        interaction = user, film, int(time), float(rating)
    except ValueError as error:
        raise ValueError(
            f"{where} is {shown(line)}, not user, film, rating and time separated by {separator!r}; "
            "unpack the archive again."
        ) from error
    if not (user and film and abs(interaction[2]) < 2**63 and math.isfinite(interaction[3])):
        raise ValueError(f"{where} is {shown(line)}, with an empty id or a number that is none; correct it.")
    return interaction


def _film_1m(line: str, where: str) -> tuple[str, str, list[str]]:
    fields = line.split("::")
    if len(fields) != 3:
        raise ValueError(f"{where} is {shown(line)}, not film::title::genres; unpack the archive again.")
    film, title, genres = fields
    return film, title, genres.split("|")


def _film_100k(line: str, where: str) -> tuple[str, str, list[str]]:
    film, *fields = line.split("|")
    flags = fields[-len(_GENRES) :]
    if len(fields) != 4 + len(_GENRES) or not set(flags) <= {"0", "1"}:
        raise ValueError(
            f"{where} is {shown(line)}, not film|title|released|on video|URL and {len(_GENRES)} flags; unpack the "
            "archive again."
        )
    genres = [genre for genre, flag in zip(_GENRES, flags) if flag == "1" and genre != "unknown"]
    return film, fields[0], genres


# Name, files of ratings and of films, what separates the fields of a rating, and what reads a line of films.
_RELEASES = (
    ("MovieLens 1M", "ratings.dat", "movies.dat", "::", _film_1m),
    ("MovieLens 100K", "u.data", "u.item", "\t", _film_100k),
)
