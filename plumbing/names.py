"""Names: of files, folders, classes and labels, which come from any system.

One name may be written in several ways. An é is one letter, or an e and an accent (macOS).
A zip may part folders with / or \\, begin with ./ or at the root, and wrap everything in
folders that mean nothing. Here each name gets one form, and names are compared in it.

    normal_name("é")                  the same text for both ways to write it (NFC)
    split_name("./a\\\\b/../0.png")     ["a", "b", "0.png"]
    common_folders(names)             "photos/2024/": the folders that wrap all the others
    is_split(names)                   whether all lie below train/ and val/, some in each
    sort_classes(["10", "9"])         ["9", "10"]: numbers are ordered as numbers
"""
import re
import unicodedata
from collections import Counter

# Folders of pictures that nobody made: macOS's in a zip, thumbnails of Synology.
SHADOWS = ("__macosx", "@eadir")
# Files that may lie beside pictures and are not meant to be any.
NOTES = (".txt", ".md", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".html", ".ini",
         ".db", ".npy", ".npz", ".pt", ".py", ".mat", ".zip")


def normal_name(name):
    """The one form of a name in which it is compared and shown: NFC."""
    return unicodedata.normalize("NFC", name)


def split_name(name):
    """The folders of a file's name and the name itself, without '.', '..' and the root."""
    return [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..")]


def is_hidden(name):
    """Whether a part of a name starts with a dot, or is a folder of SHADOWS."""
    return any(part.startswith(".") or part.lower() in SHADOWS for part in name.split("/"))


def common_folders(names):
    """The folders that all of some names lie in and that are no class: deeper ones follow.

    names: with '/' between their parts.  -> "a/b/", or "" """
    top = ""
    while names:
        firsts = {name.partition("/")[0] for name in names}
        if len(firsts) > 1 or not any(name.count("/") > 1 for name in names):
            break
        top += f"{min(firsts)}/"
        names = [name.partition("/")[2] for name in names]
    return top


def is_split(names):
    """Whether some names lie below the folders train and val and nowhere else.

    names: with '/' between their parts, without the folders that wrap all others."""
    firsts = {name.partition("/")[0] for name in names if "/" in name}
    return firsts == {"train", "val"} and all("/" in name for name in names)


def sort_classes(names):
    """Names of classes, each once, in order: of numbers where all are whole numbers."""
    names = set(names)
    if all(re.fullmatch("[0-9]+", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def count_endings(names):
    """How often each ending occurs among names of files that may be meant as pictures.

    -> "3 files with another ending are not used (.heic 2, no ending 1)", or "" """
    endings = Counter()
    for name in names:
        stem, dot, ending = name.rpartition("/")[2].rpartition(".")
        ending = f".{ending.lower()}" if dot and stem else "no ending"
        endings[ending] += ending not in NOTES
    endings = +endings
    if not endings:
        return ""
    most = ", ".join(f"{ending} {count}" for ending, count in endings.most_common(5))
    more = ", ..." if len(endings) > 5 else ""
    count = endings.total()
    plural = "files with another ending are" if count > 1 else "file with another ending is"
    return f"{count} {plural} not used ({most}{more})"
