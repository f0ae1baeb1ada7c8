"""
Reader of MovieLens as GroupLens publishes it:

    ml-1m     ratings.dat `user::film::rating::time`        movies.dat `film::title::genre|genre`
    ml-100k   u.data `user film rating time`, tabs        u.item `film|title|released|on video|URL|19 flags of genres`

Later releases are CSV files: [`~mmesid.trainer.data.sources.tabular.read_tabular`] reads them.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..files import line_of, read_lines
from ..source import CatalogueBuilder, InteractionCollector, Source, join


# Both releases are older than UTF-8's spread.
_ENCODING = "latin-1"
# The order of u.item's flags; the first says that no genre is known.
_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip


@dataclass(frozen=True)
class _Release:
    name: str
    ratings: str
    separator: str
    films: str
    parse_film: Callable[[str, str], tuple[str, str, list[str]]]

    def is_in(self, directory: Path) -> bool:
        return (directory / self.ratings).is_file() and (directory / self.films).is_file()


def read_movielens(
    source_dir: str | os.PathLike,
    *,
    text_fields: list[str] | None = None,
    pictures: dict[str, Path] | None = None,
    source_name: str | None = None,
    licence: str = "unknown",
) -> Source:
    """
    Args:
        source_dir (`str` or `os.PathLike`): The folder of an unpacked archive.
        text_fields (`list[str]`, *optional*, defaults to title and categories): What a film's text is made of.
        pictures (`dict[str, Path]`, *optional*): See [`CatalogueBuilder`].
        source_name (`str`, *optional*, defaults to the name of the release): What the data are called.
        licence (`str`, *optional*, defaults to `"unknown"`): Their terms of use.

    Raises:
        FileNotFoundError: If the folder holds neither release.
        ValueError: If a line cannot be read; the sentence names file and line.
    """
    directory = Path(source_dir)
    release = next((release for release in _RELEASES if release.is_in(directory)), None)
    if release is None:
        raise FileNotFoundError(
            f"'{directory}' holds neither ratings.dat and movies.dat (MovieLens 1M) nor u.data and u.item "
            "(MovieLens 100K); name the folder of an unpacked archive."
        )
    films = directory / release.films
    collector = InteractionCollector()
    collector.extend_rows(_ratings(directory / release.ratings, release.separator))
    collector.finish()
    builder = CatalogueBuilder(text_fields, pictures)
    for number, line in read_lines(films, _ENCODING):
        where = line_of(films, number)
        film, title, genres = release.parse_film(line, where)
        builder.append(film, {"title": title, "categories": genres}, None, where)
    return join(source_name or release.name, licence, collector, builder, str(films))


def _ratings(path: Path, separator: str) -> Iterator[tuple[str, str, int, float]]:
    for number, line in read_lines(path, _ENCODING):
        try:
            user, film, rating, time = line.split(separator)
            yield user, film, int(time), float(rating)
        except ValueError as error:
            raise ValueError(
                f"{line_of(path, number)} is {line!r}, not user, film, rating and time separated by {separator!r}; "
                "unpack the archive again."
            ) from error


def _film_1m(line: str, where: str) -> tuple[str, str, list[str]]:
    fields = line.split("::")
    if len(fields) != 3:
        raise ValueError(f"{where} is {line!r}, not film::title::genres; unpack the archive again.")
    film, title, genres = fields
    return film, title, genres.split("|")


def _film_100k(line: str, where: str) -> tuple[str, str, list[str]]:
    film, *fields = line.split("|")
    flags = fields[-len(_GENRES) :]
    if len(fields) != 4 + len(_GENRES) or not set(flags) <= {"0", "1"}:
        raise ValueError(
            f"{where} is {line!r}, not film|title|released|on video|URL and {len(_GENRES)} flags; unpack the archive "
            "again."
        )
    genres = [genre for genre, flag in zip(_GENRES, flags) if flag == "1" and genre != "unknown"]
    return film, fields[0], genres


_RELEASES = (
    _Release("MovieLens 1M", "ratings.dat", "::", "movies.dat", _film_1m),
    _Release("MovieLens 100K", "u.data", "\t", "u.item", _film_100k),
)
