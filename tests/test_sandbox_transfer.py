from __future__ import annotations

import io
import tarfile

import pytest

from sandbox.transfer import read_files, write_tar

FILES = {"a": b"1", "d/b": bytes(3000), "d/e/c": b""}


def test_an_archive_holds_what_was_put_in_and_depends_on_nothing_else() -> None:
    archive = write_tar(FILES)
    assert archive == write_tar(dict(reversed(FILES.items())))
    found = read_files(archive, max_entries=10, max_bytes=10_000)
    assert {file.path: file.data for file in found} == FILES


def test_directories_and_dots_are_plain_and_executables_are_kept() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        folder = tarfile.TarInfo("./bin/")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o2755
        archive.addfile(folder)
        program = tarfile.TarInfo("./bin/./run")
        program.mode = 0o755
        archive.addfile(program, io.BytesIO(b""))
    (file,) = read_files(buffer.getvalue(), max_entries=2, max_bytes=0)
    assert (file.path, file.executable) == ("bin/run", True)


def test_a_sparse_member_is_refused_however_small_its_archive() -> None:
    member = tarfile.TarInfo("sparse")
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(100 << 30)}
    member.size = 512
    data = member.tobuf(tarfile.PAX_FORMAT) + b"0\n".ljust(512, b"\0") + bytes(1024)
    with pytest.raises(ValueError, match="sparse"):
        read_files(data, max_entries=10, max_bytes=1 << 40)


@pytest.mark.parametrize(("max_entries", "max_bytes"), [(2, 10_000), (10, 3000)])
@pytest.mark.parametrize("archive", [False, True])
def test_caps_hold_for_mappings_and_archives(max_entries: int, max_bytes: int, archive: bool) -> None:
    with pytest.raises(ValueError, match="max_entries" if max_entries == 2 else "max_bytes"):
        read_files(write_tar(FILES) if archive else FILES, max_entries=max_entries, max_bytes=max_bytes)
