"""A file system in memory: what the commands of ShellBox-v0 work on."""

import hashlib
import json
from posixpath import basename, dirname, join, normpath, relpath

MAX_ENTRIES = 200


class Tree:
    """Files and folders by absolute path. What a command cannot do raises OSError with a short text."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.folders = {"/"}
        self.cwd = "/"

    def digest(self) -> str:
        text = json.dumps([sorted(self.files.items()), sorted(self.folders)])
        return hashlib.sha256(text.encode()).hexdigest()

    def path(self, text: str) -> str:
        return "/" + normpath(join(self.cwd, text)).lstrip("/")

    def file(self, text: str) -> str:
        path = self.path(text)
        if path not in self.files:
            raise OSError("is a folder" if path in self.folders else "no such file")
        return path

    def folder(self, text: str) -> str:
        path = self.path(text)
        if path not in self.folders:
            raise OSError("not a folder" if path in self.files else "no such folder")
        return path

    def free(self, text: str, name: str = "") -> str:
        """Where a new entry goes; a folder is taken as the place for `name`, as mv and cp do."""
        path = self.path(text)
        if name and path in self.folders:
            path = join(path, name)
        if path in self.files or path in self.folders:
            raise OSError("already there")
        self.folder(dirname(path))
        if len(self.files) + len(self.folders) >= MAX_ENTRIES:
            raise OSError("disk full")
        return path

    def ls(self, path: str) -> list[str]:
        folder = self.folder(path)
        marked = {**dict.fromkeys(self.files, ""), **dict.fromkeys(self.folders - {"/"}, "/")}
        return [basename(path) + mark for path, mark in sorted(marked.items()) if dirname(path) == folder]

    def cat(self, path: str) -> str:
        return self.files[self.file(path)]

    def grep(self, word: str, path: str) -> list[str]:
        folder = self.folder(path).rstrip("/") + "/"
        found = sorted(path for path, text in self.files.items() if path.startswith(folder) and word in text)
        return [relpath(path, self.cwd) for path in found]

    def mv(self, old: str, new: str) -> None:
        source = self.file(old)
        target = self.free(new, basename(source))  # before the pop: a refused move must change nothing
        self.files[target] = self.files.pop(source)

    def cp(self, old: str, new: str) -> None:
        source = self.file(old)
        self.files[self.free(new, basename(source))] = self.files[source]

    def rm(self, path: str) -> None:
        if (found := self.path(path)) in self.folders and found != self.cwd and found != "/" and not self.ls(path):
            self.folders.remove(found)
        else:
            del self.files[self.file(path)]

    def mkdir(self, path: str) -> None:
        self.folders.add(self.free(path))

    def write(self, path: str, text: str) -> None:
        found = self.path(path)
        self.files[found if found in self.files else self.free(path)] = text
