"""MovieLens as GroupLens packs it: two layouts, Latin-1, and titles with every separator but their own."""

import pytest

from mmesid.trainer.data.sources.movielens import read_movielens


FILES = {
    "1M": {
        "ratings.dat": "1::1193::5::978300760\n1::3::3::978302109\n2::1193::4::978298413\n",
        "movies.dat": "3::City of Lost Children, The (Cité des enfants perdus, La) (1995)::Adventure|Sci-Fi\n"
        "8::Nobody's: film | (1990)::Drama\n1193::One Flew Over the Cuckoo's Nest (1975)::Drama\n",
    },
    "100K": {
        "u.data": "1\t1193\t5\t978300760\n1\t3\t3\t978302109\n2\t1193\t4\t978298413\n",
        "u.item": "3|City of Lost Children, The (Cité des enfants perdus, La) (1995)|01-Jan-1995||http://x/"
        "|0|0|1|0|0|0|0|0|0|0|0|0|0|0|0|1|0|0|0\n"
        "8|Nobody's film|01-Jan-1990|||1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
        "1193|One Flew Over the Cuckoo's Nest (1975)|01-Jan-1975||http://y/"
        "|0|0|0|0|0|0|0|0|1|0|0|0|0|0|0|0|0|0|0\n",
    },
}


@pytest.fixture(params=FILES)
def folder(request, tmp_path):
    for name, content in FILES[request.param].items():
        (tmp_path / name).write_bytes(content.encode("latin-1"))
    return tmp_path, request.param


def test_both_releases_are_read(folder):
    path, release = folder
    source = read_movielens(path)
    assert source.name == f"MovieLens {release}"
    assert source.catalogue.item_ids == ["3", "8", "1193"], "films that nobody rated are part of the catalogue"
    titles = source.catalogue.titles()
    assert titles[0] == "City of Lost Children, The (Cité des enfants perdus, La) (1995)"
    assert source.catalogue.texts()[0] == f"{titles[0]}. Adventure, Sci-Fi"
    assert source.catalogue.fields["categories"].to_pylist()[2] == ["Drama"]
    interactions = source.interactions
    assert [interactions.user_ids[user] for user in interactions.users] == ["1", "1", "2"]
    assert [source.catalogue.item_ids[item] for item in interactions.items] == ["1193", "3", "1193"]
    assert interactions.times.tolist() == [978300760, 978302109, 978298413]
    assert interactions.ratings.tolist() == [5, 3, 4]


def test_bad_lines_and_wrong_folders_are_named(folder, tmp_path):
    path, release = folder
    ratings, films = FILES[release]
    for name, line in ((ratings, "1:1193:5"), (ratings, "1::1193::five::9"), (films, "77|no genres")):
        (path / name).write_bytes((FILES[release][name] + line + "\n").encode("latin-1"))
        with pytest.raises(ValueError, match=rf"{name}', line 4 is '"):
            read_movielens(path)
        (path / name).write_bytes(FILES[release][name].encode("latin-1"))
    (path / films).unlink()
    with pytest.raises(FileNotFoundError, match="holds neither ratings.dat and movies.dat"):
        read_movielens(path)
