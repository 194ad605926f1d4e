"""An object store in memory, as fsspec sees one: what is uploaded is there when its upload is closed."""

from types import SimpleNamespace

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem


class Upload(AbstractBufferedFile):
    """An object that exists when its upload is closed, as on a real store."""

    def _initiate_upload(self):
        self.parts = []

    def _upload_chunk(self, final=False):
        self.fs.state.fault("upload", self.path)
        self.parts.append(bytes(self.buffer.getbuffer()))
        if final:
            self.fs.state.objects[self.path] = b"".join(self.parts)
            self.fs.state.published.append(self.path)

    def discard(self):
        self.fs.state.cancelled.append(self.path)


class Bucket(AbstractFileSystem):
    """An object store in memory: names with slashes, ranges, uploads; folders are only what names begin with."""

    protocol = ("gcs", "gs")
    cachable = False
    state: SimpleNamespace

    def ls(self, path, detail=True, **options):
        path = self._strip_protocol(path)
        self.state.fault("list", path)
        with self.state.lock:
            objects = dict(self.state.objects)
        found = {}
        for name, data in objects.items():
            if name == path or name.startswith(path + "/"):
                below = name[len(path) + 1 :].split("/")
                child = f"{path}/{below[0]}" if name != path else path
                folder = len(below) > 1
                found[child] = {"name": child, "size": 0 if folder else len(data)}
                found[child]["type"] = "directory" if folder else "file"
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def cat_file(self, path, start=None, end=None, **options):
        path = self._strip_protocol(path)
        self.state.fault("read", path)
        with self.state.lock:
            self.state.asked.append((path, start, end))
        if path not in self.state.objects:
            raise FileNotFoundError(path)
        return self.state.objects[path][start:end]

    def _open(self, path, mode="rb", **options):
        assert mode == "wb"
        return Upload(self, path, mode, block_size=options["block_size"])

    def pipe_file(self, path, value, mode="overwrite", **options):
        """A whole object; mode "create" as gcsfs has it: the store takes it only where there is none."""
        assert mode == "create"
        path = self._strip_protocol(path)
        self.state.fault("upload", path)
        with self.state.lock:
            if self.state.conditional and path in self.state.objects:
                raise FileExistsError(path)
            self.state.objects[path] = bytes(value)
            self.state.published.append(path)

    def rm(self, path, **options):
        path = self._strip_protocol(path)
        if self.state.objects.pop(path, None) is None:
            raise FileNotFoundError(path)
        self.state.removed.append(path)
