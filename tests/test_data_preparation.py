"""Archives: found, downloaded, unpacked and converted, through everything that can interrupt or damage them."""

import hashlib
import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sptseg.core import UserError, write_atomically
from sptseg.data.jobs import check_images, convert_files
from sptseg.data.preparation import Archive, check_count, find_archive, provide_files, unpack, write_names

unpack = partial(unpack, progress=False)
find_archive = partial(find_archive, progress=False)
ROOT = Path(__file__).resolve().parents[1]
PACKERS = {"a.tar": "w", "a.tgz": "w:gz", "a.tar.xz": "w:xz", "a.zip": None}


def pack(path, files):
    """An archive of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path
    with tarfile.open(path, PACKERS.get(path.name, "w")) as archive:
        for name, content in files.items():
            archive.addfile(header(name, size=len(content)), io.BytesIO(content))
    return path


def header(name, **values):
    """A tar header with some fields set."""
    item = tarfile.TarInfo(name)
    for key, value in values.items():
        setattr(item, key, value)
    return item


def noise(count, length=3000, seed=0):
    """Files that do not compress."""
    rng = random.Random(seed)
    return {f"top/{number:04d}.bin": rng.randbytes(length + number) for number in range(count)}


def below(folder):
    """Content of all files that are no notes."""
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("[!.]*") if f.is_file()}


def keep(name):
    """Unpack all, as named."""
    return name


def message(function, *arguments, **keywords):
    """The line that a user reads."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", PACKERS)
def test_unpacking_gives_the_files_and_is_idempotent(tmp_path, name):
    files = noise(20)
    archive, folder = pack(tmp_path / name, files), tmp_path / "out"
    place = lambda path: path.removeprefix("top/") if path != "top/0003.bin" else None  # noqa: E731
    expected = {path.removeprefix("top/"): content for path, content in files.items() if path != "top/0003.bin"}
    assert unpack(archive, folder, place=place) == 19 and below(folder) == expected
    times = {file: file.stat().st_mtime_ns for file in folder.rglob("*.bin")}
    assert unpack(archive, folder, place=place) == 0
    assert times == {file: file.stat().st_mtime_ns for file in folder.rglob("*.bin")}
    (folder / "0007.bin").unlink()
    (folder / "0009.bin").write_bytes(b"cut off")
    assert unpack(archive, folder, place=place) == 2 and below(folder) == expected


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.5, 0.9, 0.999])
def test_truncated_archives_are_named_and_leave_complete_files(tmp_path, name, share):
    files = noise(20)
    archive, folder = pack(tmp_path / name, files), tmp_path / "out"
    content = archive.read_bytes()
    cut = min(int(share * len(content)), len(content) - 11000 if name == "a.tar" else len(content))
    archive.write_bytes(content[: max(cut, 0)])
    said = message(unpack, archive, folder, place=keep)
    assert str(archive) in said and "get it again" in said
    assert below(folder).items() <= files.items() and not list(folder.rglob("*.tmp"))
    archive.write_bytes(content)
    before = len(below(folder))
    assert unpack(archive, folder, place=keep) == 20 - before and below(folder) == files


def test_a_tar_cut_between_two_files_is_noticed(tmp_path):
    archive = pack(tmp_path / "a.tar", {"one": b"1" * 512, "two": b"2" * 512})
    content = archive.read_bytes()
    for cut in (512, 1024, 1100, 1536, 2048):
        archive.write_bytes(content[:cut])
        assert "damaged or incomplete" in message(unpack, archive, tmp_path / str(cut), place=keep)
    archive.write_bytes(content[:2560])  # with one block of zeros
    assert unpack(archive, tmp_path / "whole", place=keep) == 2


def test_damage_anywhere_is_noticed_or_harmless_but_never_another_error(tmp_path):
    files = noise(6, 400)
    for name in ("a.tgz", "a.zip", "a.tar"):
        content = pack(tmp_path / name, files).read_bytes()
        rng = random.Random(1)
        for trial in range(60):
            damaged = bytearray(content)
            for _ in range(3):
                damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            (tmp_path / name).write_bytes(damaged)
            folder = tmp_path / f"{name}-{trial}"
            try:
                unpack(tmp_path / name, folder, place=keep)
            except UserError:
                continue
            if name != "a.tar":  # a plain tar has no checksum of its contents
                assert set(below(folder).values()) <= set(files.values())


OUTSIDE = ["../x", "a/../../x", "/../x"]
INSIDE = ["/tmp/x", "C:/x", "C:x", "a\\..\\..\\x", "\\\\host\\x", "a/../x"]  # on systems without drives


@pytest.mark.parametrize("name", ["a.tar", "a.zip"])
@pytest.mark.parametrize("unsafe", OUTSIDE + INSIDE)
def test_no_name_leads_out(tmp_path, unsafe, name):
    archive, folder = pack(tmp_path / "in" / name, {"fine": b"1", unsafe: b"2"}), tmp_path / "deep/er/out"
    placed = pack(tmp_path / "placed" / name, {"fine": b"1"})
    if unsafe in OUTSIDE:
        assert str(archive) in (said := message(unpack, archive, folder, place=keep)) and "do not use" in said
        assert "do not use" in message(unpack, placed, folder, place=lambda _: unsafe)
    elif os.name == "posix":
        assert unpack(archive, folder, place=keep) == 2 and unpack(placed, folder, place=lambda _: unsafe) <= 1
    files = {file for file in tmp_path.rglob("*") if file.is_file()} - {archive, placed}
    assert all(folder in file.parents for file in files) and not Path("/tmp/x").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w") as tar:
        tar.addfile(header("door", type=kind, linkname=str(tmp_path / "outside")))
        tar.addfile(header("door/x", size=1), io.BytesIO(b"1"))
    assert "'door'" in message(unpack, archive, tmp_path / "out", place=keep)
    assert not list((tmp_path / "out").rglob("*")) and not (tmp_path / "outside").exists()
    assert unpack(archive, tmp_path / "out", place=lambda name: name.replace("/", "-") if "x" in name else None) == 1


def test_links_in_zips_and_in_the_folder_are_refused(tmp_path):
    link = zipfile.ZipInfo("door")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, str(tmp_path / "outside"))
    assert "link" in message(unpack, tmp_path / "a.zip", tmp_path / "out", place=keep)
    (tmp_path / "outside").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/door").symlink_to(tmp_path / "outside")
    archive = pack(tmp_path / "a.tar", {"door/new/x": b"1"})
    assert "door" in message(unpack, archive, tmp_path / "out", place=keep)
    assert not list((tmp_path / "outside").iterdir())


def test_encrypted_zip_wrong_kind_and_wrong_content(tmp_path):
    archive = pack(tmp_path / "a.zip", {"x": b"1" * 99})
    content = bytearray(archive.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\1\2") + 8] |= 1
    archive.write_bytes(content)
    assert "encrypted" in message(unpack, archive, tmp_path / "out", place=keep)
    (tmp_path / "page.tgz").write_text("<html>Moved</html>")
    assert "page.tgz" in message(unpack, tmp_path / "page.tgz", tmp_path / "out", place=keep)
    assert "right archive" in message(unpack, pack(tmp_path / "a.tar", {"x": b""}), tmp_path, place=lambda _: None)


def test_a_full_disk_is_not_called_damage(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sptseg.data.preparation.copyfileobj", full)
    said = message(unpack, pack(tmp_path / "a.tgz", noise(2)), tmp_path / "out", place=keep)
    assert "No space left" in said and "damaged" not in said and not list((tmp_path / "out").rglob("*.bin"))


def start(tmp_path, program):
    """Run a script that may start processes."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(program))
    return subprocess.Popen(
        [sys.executable, script, tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores Ctrl-C
    )


def wait_for(condition, seconds=60):
    """Poll until something is true."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return result


@pytest.mark.parametrize("name", ["a.tar", "a.tgz", "a.zip"])
def test_unpacking_continues_after_sigkill(tmp_path, name):
    files, folder = noise(300, 20000), tmp_path / "out"
    archive = pack(tmp_path / name, files)
    program = f"""
        import sys, time
        from pathlib import Path
        from sptseg.data.preparation import unpack

        def place(name):
            time.sleep(0.005)
            return name

        unpack(Path(sys.argv[1], {name!r}), Path(sys.argv[1], "out"), place=place, progress=False)
    """
    process = start(tmp_path, program)
    wait_for(lambda: len(list(folder.rglob("*.bin"))) > 40)
    process.kill()
    process.communicate()
    before = below(folder)
    assert 40 < len(before) < 300 and before.items() <= files.items() and not list(folder.glob(".*.json"))
    assert unpack(archive, folder, place=keep) == 300 - len(before) and below(folder) == files


CONVERT = """
    import os, signal, sys, time
    from pathlib import Path
    from sptseg.core import UserError, write_atomically
    from sptseg.data.jobs import convert_files

    def convert(source, target):
        (source.parents[1] / "pids" / str(os.getpid())).touch()
        time.sleep(0.02)
        write_atomically(target, lambda path: path.write_bytes(source.read_bytes()[::-1]), flush=False)

    if __name__ == "__main__":
        root = Path(sys.argv[1])
        jobs = [(source, root / "out" / source.name) for source in sorted((root / "in").iterdir())]
        convert_files(jobs, convert, workers=2, description="turn", progress=False)
"""


def running(pid):
    """Whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")
@pytest.mark.parametrize(
    "send", [(signal.SIGKILL, os.kill), (signal.SIGTERM, os.kill), (signal.SIGINT, os.kill), (signal.SIGINT, os.killpg)]
)
def test_interrupted_conversion_leaves_whole_files_and_no_process(tmp_path, send):
    for folder in ("in", "out", "pids"):
        (tmp_path / folder).mkdir()
    sources = {f"{number:03d}": bytes([number % 256, 7]) * 5000 for number in range(400)}
    for name, content in sources.items():
        (tmp_path / "in" / name).write_bytes(content)
    process = start(tmp_path, CONVERT)
    wait_for(lambda: len(list((tmp_path / "out").glob("[!.]*"))) > 20)
    send[1](process.pid, send[0])  # Ctrl-C in a terminal reaches the whole group
    _, said = process.communicate(timeout=30)
    assert "SpawnProcess" not in said, "workers end quietly"
    pids = [file.name for file in (tmp_path / "pids").iterdir()]
    assert len(pids) == 2 and str(process.pid) not in pids
    wait_for(lambda: not any(map(running, pids)), seconds=20)
    done = {file.name: file.read_bytes() for file in (tmp_path / "out").glob("[!.]*")}
    assert 20 < len(done) < 400 and all(content == sources[name][::-1] for name, content in done.items())
    jobs = [(tmp_path / "in" / name, tmp_path / "out" / name) for name in sources]
    assert convert_files(jobs, reverse, workers=0, description="", progress=False) == 400 - len(done)


def reverse(source, target):
    """A conversion that refuses one file, and stumbles over another."""
    content = source.read_bytes()
    if content == b"refuse":
        raise UserError(f"{source}: is no good; get a better one")
    write_atomically(target, lambda path: path.write_bytes((content if content != b"stumble" else None)[::-1]))


def die(source, target):
    """A worker that the system kills."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", [b"refuse", b"stumble"])
def test_errors_of_a_conversion_name_the_file(tmp_path, workers, content):
    jobs = [(tmp_path / f"{number:02d}", tmp_path / "out" / f"{number:02d}") for number in range(40)]
    for source, _ in jobs:
        source.write_bytes(b"fine")
    jobs[17][0].write_bytes(content)
    convert = partial(convert_files, jobs, reverse, workers=workers, description="", progress=False)
    assert message(convert).startswith(f"{jobs[17][0]}: {'is no good' if content == b'refuse' else 'TypeError'}")
    done = len(list((tmp_path / "out").iterdir()))
    jobs[17][0].write_bytes(b"fine")
    assert convert() == 40 - done and convert() == 0 and jobs[17][1].read_bytes() == b"enif"


def test_a_killed_worker_is_reported(tmp_path):
    jobs = [(tmp_path / str(number), tmp_path / "out" / str(number)) for number in range(20)]
    said = message(convert_files, jobs, die, workers=2, description="", progress=False)
    assert "fewer workers" in said


@pytest.mark.parametrize("workers", [0, 2])
def test_incomplete_images_are_named(tmp_path, workers):
    rng = np.random.default_rng(0)
    paths = []
    for number in range(24):
        paths.append(tmp_path / f"{number:02d}.{['jpg', 'png'][number % 2]}")
        mode = ["RGB", "L"][number % 3 == 0]
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).convert(mode).save(paths[-1])
    check_images(paths, workers=workers, progress=False)
    for path, share in zip(paths[4:7], (0.95, 0.95, 0), strict=True):
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    paths[8].unlink()
    said = message(check_images, paths, workers=workers, progress=False)
    assert str(paths[4]) in said and "3 more" in said and all(path.name in said for path in (*paths[5:7], paths[8]))


def test_counts():
    check_count("images", 10, 10, partial=False, remedy="")
    check_count("images", 9, 10, partial=True, remedy="")
    for found, partial_accepted in [(9, False), (0, True), (11, True), (11, False)]:
        said = message(check_count, "images", found, 1000 if found < 10 else 10, partial=partial_accepted, remedy="go")
        assert said.startswith(f"images: found {found}, expected 1") and said.endswith("; go")


def test_names_come_back(tmp_path):
    assert write_names(tmp_path / "a/b.txt", ["x", "y"]).read_bytes() == b"x\ny\n"


def test_missing_archives_and_wrong_checksums(tmp_path):
    good = Archive("a.tar", "https://example.org/a.tar", "md5:" + hashlib.md5(b"content").hexdigest(), "a test")
    said = message(find_archive, good, tmp_path, download=False)
    assert all(part in said for part in ("a.tar", "a test", good.url, str(tmp_path), "--download"))
    for place in ("archives/a.tar", "a.tar"):
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"content")
        assert find_archive(good, tmp_path, download=False) == path
        path.write_bytes(b"contend")
        os.utime(path, ns=(1, 1))
        assert str(path) in message(find_archive, good, tmp_path, download=True) and path.read_bytes() == b"contend"
    path.write_bytes(b"anything")
    assert find_archive(Archive("a.tar", "", None, ""), tmp_path, download=False) == path


def test_a_checksum_is_computed_once(tmp_path, monkeypatch):
    good = Archive("a.tar", "", "sha256:" + hashlib.sha256(b"content").hexdigest(), "")
    (tmp_path / "a.tar").write_bytes(b"content")
    find_archive(good, tmp_path, download=False)
    monkeypatch.setattr("pooch.file_hash", None)
    assert find_archive(good, tmp_path, download=False)
    os.utime(tmp_path / "a.tar", ns=(1, 1))
    with pytest.raises(TypeError):  # the file may have changed
        find_archive(good, tmp_path, download=False)


def test_files_are_provided_from_the_archive_or_missed(tmp_path):
    archive = Archive("a.tar", "https://example.org/a.tar", None, "a test")
    wanted = [tmp_path / "out/top" / f"{number:04d}.bin" for number in range(3)]
    provide = partial(provide_files, root=tmp_path, folder=tmp_path / "out", place=keep, download=False, progress=False)
    said = message(provide, wanted, archive)
    assert str(wanted[0]) in said and "3 of 3" in said and archive.url in said
    pack(tmp_path / "a.tar", noise(3))
    assert provide(wanted, archive) == 3
    (tmp_path / "a.tar").unlink()
    assert provide(wanted, archive) == 0
    pack(tmp_path / "a.tar", noise(3))
    assert "1 of 4" in message(provide, [*wanted, wanted[0].with_name("none")], archive)


class Host(ThreadingHTTPServer):
    """A web server for one file, with the habits of real ones."""

    daemon_threads = True

    def __init__(self, content, *, breaks=(), ranges=True, length=True):
        self.content, self.breaks, self.ranges, self.length = content, list(breaks), ranges, length
        self.asked = []
        super().__init__(("127.0.0.1", 0), Answer)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/a.tar"

    def handle_error(self, *_):
        pass


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        host, asked = self.server, self.headers.get("Range")
        host.asked.append(asked)
        begin = int(asked[6:-1]) if asked and host.ranges else 0
        if self.path != "/a.tar":
            return self.send_error(404)
        if begin and begin >= len(host.content):
            return self.send_error(416)
        self.send_response(206 if begin else 200)
        if host.length:
            self.send_header("Content-Length", str(len(host.content) - begin))
        self.end_headers()
        self.wfile.write(host.content[begin : host.breaks.pop(0) if host.breaks else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    """Start servers, and stop them."""
    hosts = []

    def begin(*arguments, **keywords):
        hosts.append(Host(*arguments, **keywords))
        return hosts[-1]

    yield begin
    for host in hosts:
        host.shutdown()
        host.server_close()


CONTENT = random.Random(5).randbytes(700_000)
STOPS = [5 << 16, 8 << 16]  # multiples of what is read at once: the rest of a broken read is lost
DIGEST = "md5:" + hashlib.md5(CONTENT).hexdigest()


@pytest.mark.parametrize("digest", [DIGEST, None])
@pytest.mark.parametrize("habits", [{}, {"length": False}])
def test_download(tmp_path, serve, habits, digest):
    host = serve(CONTENT, **habits)
    archive = Archive("a.tar", host.url, digest, "a test")
    path = find_archive(archive, tmp_path, download=True)
    assert path == tmp_path / "archives/a.tar" and path.read_bytes() == CONTENT
    assert find_archive(archive, tmp_path, download=True) == path and len(host.asked) == 1


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("digest", [DIGEST, None])
def test_a_download_that_stopped_is_continued(tmp_path, serve, ranges, digest):
    host = serve(CONTENT, breaks=[STOPS[0], STOPS[1]], ranges=ranges)
    archive = Archive("a.tar", host.url, digest, "a test")
    for stop in STOPS:
        said = message(find_archive, archive, tmp_path, download=True)
        assert host.url in said and f"{stop:,}" in said and "run again" in said
        assert not (tmp_path / "archives/a.tar").exists()
    assert find_archive(archive, tmp_path, download=True).read_bytes() == CONTENT
    assert host.asked == [None, *(f"bytes={stop}-" for stop in STOPS)]
    assert {file.name for file in (tmp_path / "archives").iterdir() if file.suffix != ".json"} == {"a.tar"}


def test_what_cannot_be_downloaded(tmp_path, serve):
    host = serve(CONTENT)
    wrong = Archive("a.tar", host.url, "md5:" + "0" * 32, "a test")
    assert "md5:000" in message(find_archive, wrong, tmp_path, download=True)
    absent = Archive("a.tar", host.url + "x", DIGEST, "a test")
    assert "404" in message(find_archive, absent, tmp_path, download=True)
    nobody = Archive("a.tar", "http://127.0.0.1:9/a.tar", DIGEST, "a test")
    assert nobody.url in message(find_archive, nobody, tmp_path, download=True)
    assert not list((tmp_path / "archives").iterdir())
    (tmp_path / "archives/a.tar.part").write_bytes(bytes(len(CONTENT)))  # of some other file
    assert find_archive(Archive("a.tar", host.url, DIGEST, ""), tmp_path, download=True).read_bytes() == CONTENT
