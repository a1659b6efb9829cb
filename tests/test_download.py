"""Downloads from a server on this machine that breaks off, lies, or cannot resume; archives that want to leave the
folder."""

import base64
import hashlib
import io
import shutil
import stat
import threading
import zipfile
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer

import numpy as np
import pytest
from cases import each

import rcic_fastai.kaggle.download
from rcic_fastai.kaggle.download import download_competition, download_rxrx1, extract_archive, fetch_file
from rcic_fastai.cli.kaggle import rcic_download

DATA = np.random.default_rng(0).bytes(300_000)


class Server(BaseHTTPRequestHandler):
    "Sends `server.files`; `server.behaviour` says how it misbehaves"

    def do_GET(self):
        s, data = self.server, self.server.files.get(self.path)
        asked = self.headers.get("Range")
        s.asked.append((self.path, asked, self.headers.get("If-Range")))
        if s.failures:
            return self._send(s.failures.pop(0), b"", {"Content-Length": 0})
        if data is None: return self._send(404, b"", {"Content-Length": 0})
        tag = f'"{hashlib.sha1(data).hexdigest()}"'
        start = int(asked[6:-1]) if asked and s.ranges and self.headers.get("If-Range") in (None, tag) else 0
        if asked and s.ranges and start >= len(data):
            return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}", "Content-Length": 0})
        headers = {"ETag": tag,
                   "x-goog-hash": "crc32c=AAAAAA==, md5=" + base64.b64encode(
                       hashlib.md5(s.promised or data).digest()).decode()}
        headers["Content-Length"] = len(data) - start + s.lie
        if start: headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if s.no_length: del headers["Content-Length"]
        self._send(206 if start else 200, data[start : start + s.hangs_up_after] if s.hangs_up_after else data[start:],
                   headers)

    def _send(self, status, data, headers):
        self.send_response(status)
        for k, v in headers.items(): self.send_header(k, str(v))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args): pass


@pytest.fixture
def server():
    ThreadingTCPServer.daemon_threads = True
    s = ThreadingTCPServer(("127.0.0.1", 0), Server)
    s.files, s.asked, s.failures, s.ranges, s.hangs_up_after, s.promised, s.lie, s.no_length = {
        "/data.bin": DATA}, [], [], True, 0, b"", 0, False
    s.url = f"http://127.0.0.1:{s.server_address[1]}"
    threading.Thread(target=s.serve_forever, args=(0.05,), daemon=True).start()
    yield s
    s.shutdown()
    s.server_close()


def quick(server, path, **kwargs):
    "`fetch_file` without waiting; returns what it said"
    said = []
    fetch_file(f"{server.url}/data.bin", path, wait=0.001, progress=False, say=said.append, **kwargs)
    assert path.read_bytes() == DATA and [p.name for p in path.parent.iterdir()] == [path.name]
    return said


def test_connections_that_break(server, tmp_path):
    "Each goes on near the end of the one before, under the condition that the file is the same"
    server.hangs_up_after, server.failures = 100_000, [503]
    said = quick(server, tmp_path / "a.bin")
    starts = [int(r[6:-1]) if r else 0 for _, r, _ in server.asked]
    assert starts[:2] == [0, 0] and starts[2:] == sorted(starts[2:]) and len(starts) == 5
    assert all(83_000 < b - a <= 100_000 for a, b in zip(starts[1:], starts[2:]))
    assert all(tag == f'"{hashlib.sha1(DATA).hexdigest()}"' for _, r, tag in server.asked if r)
    assert "503" in said[0] and len(said) == 4
    server.asked.clear()
    quick(server, tmp_path / "a.bin")
    assert not server.asked  # it is there


def test_going_on_in_another_process(server, tmp_path):
    """What is kept is kept when the tries are over; a server without ranges, or with a new version, sends all of it,
    and the mixture is never taken"""
    path, part = tmp_path / "a.bin", tmp_path / "a.bin.part"
    def break_off():
        server.hangs_up_after = 100_000
        with pytest.raises(ConnectionError, match="0.10 MB are kept, the same command resumes"):
            fetch_file(f"{server.url}/data.bin", path, tries=1, progress=False)
        server.hangs_up_after = 0
        assert 83_000 < part.stat().st_size < 100_001 and not path.exists()
        server.asked.clear()

    break_off()
    assert quick(server, path) == [] and len(server.asked) == 1
    path.unlink()
    break_off()
    server.ranges = False
    assert "from the beginning" in quick(server, path)[0]
    path.unlink()
    server.ranges, server.files["/data.bin"] = True, DATA[::-1]
    break_off()
    server.files["/data.bin"] = DATA
    assert "from the beginning" in quick(server, path)[0]
    path.unlink()
    break_off()
    part.write_bytes(DATA)  # complete, but the process was killed before it had its name
    quick(server, path)
    path.unlink()
    break_off()
    part.write_bytes(DATA + b"more")
    assert "0.30 MB" not in quick(server, path)[-1]
    path.unlink()
    server.no_length = True
    quick(server, path)


def test_what_is_not_taken(server, tmp_path, monkeypatch):
    url, path = f"{server.url}/data.bin", tmp_path / "a.bin"
    with pytest.raises(FileNotFoundError, match="none.bin: the server answers 404"):
        fetch_file(f"{server.url}/none.bin", path)
    with pytest.raises(ValueError, match="has 300,000 bytes, expected 7"): fetch_file(url, path, size=7)
    server.promised = b"other"
    with pytest.raises(ValueError, match="its MD5 is .* the server says .* removed"):
        fetch_file(url, path, progress=False)
    assert not path.exists() and not (tmp_path / "a.bin.part").exists()
    server.promised, server.lie = b"", 5
    with pytest.raises(ConnectionError, match="a.bin|data.bin"):
        fetch_file(url, path, tries=2, wait=0.001, progress=False, say=lambda *a: None)
    server.lie = 0
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(OSError, match=r"what is left of data.bin needs .* has 0.00 MB left"):
        fetch_file(url, tmp_path / "b.bin")
    assert not (tmp_path / "b.bin").exists()


def archive(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for m, data in members.items(): z.writestr(m, data)
    return path


def link(name):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info


@each("name,why", [("../out", "leaves the folder"), ("a/../../out", "leaves the folder"), ("/out", "absolute"),
                   ("C:/out", "absolute"),
                                      ("c:out", "absolute"), ("\\\\host\\out", "absolute"),
                   ("a\\..\\..\\out", "leaves the folder"), (link("out"), "a link")])
def test_members_that_would_leave(tmp_path, name, why):
    "Nothing is written, not even what came before"
    bad = archive(tmp_path / "bad.zip", {"fine.txt": "fine", name: "/etc/passwd"})
    with pytest.raises(ValueError, match=f"is .*{why}.*nothing was unpacked"):
        extract_archive(bad, tmp_path / "in" / "side", progress=False)
    assert [p.name for p in tmp_path.rglob("*")] == ["bad.zip", "in", "side"] or not list(
        (tmp_path / "in" / "side").iterdir())
    assert not list(tmp_path.rglob("out"))


def test_unpacking_goes_on(tmp_path, monkeypatch):
    "What is there whole is left alone; what is half is written again, unless this archive was never unpacked here"
    good = archive(tmp_path / "good.zip", {"a/": "", **{f"a/{i}.bin": DATA[i : i + 5000] for i in range(4)}})
    out = tmp_path / "out"
    assert extract_archive(good, out, progress=False) == 4
    kept = (out / "a" / "0.bin").stat().st_mtime_ns
    (out / "a" / "1.bin").write_bytes(DATA[1:100])
    (out / "a" / "2.bin").write_bytes(b"x" * 5000)
    (out / "a" / "3.bin").unlink()
    with pytest.raises(FileExistsError, match="1.bin exists and is not the file of the archive"):
        extract_archive(good, out, progress=False)
    assert (out / "a" / "2.bin").read_bytes() == b"x" * 5000 and not (out / "a" / "3.bin").exists()
    (out / ".good.zip.unpacking").touch()  # an attempt that was killed
    extract_archive(good, out, progress=False)
    assert all((out / "a" / f"{i}.bin").read_bytes() == DATA[i : i + 5000] for i in range(4))
    assert (out / "a" / "0.bin").stat().st_mtime_ns == kept
    whole = good.read_bytes()
    for cut in (whole[:-30], whole[:100] + b"!!!!" + whole[104:]):
        (tmp_path / "cut.zip").write_bytes(cut)
        with pytest.raises(ValueError, match="no ZIP archive, or damaged"):
            extract_archive(tmp_path / "cut.zip", tmp_path / "other", progress=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(OSError, match=r"good.zip, unpacked, needs 0.02 MB"):
        extract_archive(good, tmp_path / "full", progress=False)


def test_the_release(server, tmp_path, capsys, monkeypatch):
    "By the command: loaded in pieces, unpacked, the archive removed; a second time nothing is asked of the server"
    monkeypatch.setattr(rcic_fastai.kaggle.download.time, "sleep", lambda seconds: None)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        z.writestr("rxrx1/embeddings.csv", "site_id,feature_0\n" + "HUVEC-01_1_B02_1,0\n" * 9000)
    server.files["/rxrx1/rxrx1-dl-embeddings.zip"], server.hangs_up_after = buffer.getvalue(), 70_000
    for _ in range(2): rcic_download("rxrx1", tmp_path / "a", parts="embeddings", url=f"{server.url}/rxrx1/")
    said = capsys.readouterr().out
    assert "rxrx1-dl-embeddings.zip: 1 file" in said and "is there, unpacked" in said and len(server.asked) == 3
    assert [p.relative_to(tmp_path / "a").as_posix() for p in (tmp_path / "a").rglob("*") if p.is_file()
            and not p.name.startswith(".")] == ["rxrx1/embeddings.csv"]
    server.hangs_up_after = 0
    download_rxrx1(tmp_path / "b", ["embeddings"], f"{server.url}/rxrx1", keep_archive=True, progress=False)
    download_rxrx1(tmp_path / "c", ["embeddings"], f"{server.url}/rxrx1", extract=False, progress=False)
    assert (tmp_path / "b" / "rxrx1-dl-embeddings.zip").exists() and (tmp_path / "b" / "rxrx1").exists()
    assert (tmp_path / "c" / "rxrx1-dl-embeddings.zip").read_bytes() == buffer.getvalue()
    assert not (tmp_path / "c" / "rxrx1").exists()


def test_the_competition(tmp_path, monkeypatch):
    "The archive that the client leaves is unpacked once; single files come as they are or packed"
    asked = []
    def client(*args, say=None):
        asked.append(args)
        out, single = Path(args[4]), args[6] if "-f" in args else None
        if single == "train.csv": (out / single).write_text("id_code\n")
        else:
            archive(out / (f"{single}.zip" if single else f"{args[2]}.zip"),
                    {single or "train/RPE-01/Plate1/B02_s1_w1.png": "pixels"})

    monkeypatch.setattr(rcic_fastai.kaggle.download, "run_client", client)
    for _ in range(2): download_competition(tmp_path / "all", progress=False, say=lambda *a: None)
    assert asked == [("competitions", "download", "recursion-cellular-image-classification", "-p",
                      str(tmp_path / "all"))]
    assert (tmp_path / "all" / "train" / "RPE-01" / "Plate1" / "B02_s1_w1.png").exists()
    assert not list((tmp_path / "all").glob("*.zip"))
    download_competition(tmp_path / "some", file_names=["train.csv", "pixel_stats.csv"], progress=False,
                         say=lambda *a: None)
    assert sorted(p.name for p in (tmp_path / "some").iterdir() if not p.name.startswith(".")) == [
        "pixel_stats.csv", "train.csv"]
