"""Faults of stores and data, injected for real: none loses or repeats a record."""

import io
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import pytest
from PIL import Image

from bench.support.proxy import Plan, faulty_proxy
from cluster.object_server import ObjectServer
from core.errors import CorruptError, InputError, TapirError
from core.storage.s3 import S3Store
from core.storage.store import FolderStore
from data_pipeline.config import OrderConfig, PackConfig
from data_pipeline.formats.raw import RawSource
from data_pipeline.formats.tokens import TokenSource
from data_pipeline.images.decode import decode_rgb
from data_pipeline.packing.pack import pack
from data_pipeline.streaming.stream import Stream
from data_pipeline.text.captions import LONGEST, clean_caption
from tests.faults.conftest import Record
from tests.harness import ENVIRONMENT, tapir

pytestmark = pytest.mark.seconds

BODY = bytes(range(256)) * 4096
"""1 MB."""


def _read_through(s3: ObjectServer, monkeypatch: pytest.MonkeyPatch, plan: Plan) -> bytes:
    with faulty_proxy(s3.endpoint, plan) as address:
        for name, value in {**s3.environment, "AWS_ENDPOINT_URL": address}.items():
            monkeypatch.setenv(name, value)
        store = S3Store("tapir-tests", "faults")
        store.put("object", BODY)
        return store.get("object") + store.get("object", 1000, 5000)


@pytest.mark.world
@pytest.mark.parametrize("what", ["500", "503", "wait 2"])
def test_a_store_that_fails_now_and_then(
    s3: ObjectServer, monkeypatch: pytest.MonkeyPatch, fault: Record, what: str
) -> None:
    fault(17, f"S3 answers {what} to every second request")
    body = _read_through(s3, monkeypatch, lambda n, *_: what if n % 2 else "")
    assert body == BODY + BODY[1000:6000]
    fault.outcome("retried, finished")


@pytest.mark.world
def test_a_truncated_body_is_continued_where_it_ended(
    s3: ObjectServer, monkeypatch: pytest.MonkeyPatch, fault: Record
) -> None:
    fault(18, "S3 closes in the middle of a body, three times")
    asked: list[int] = []

    def plan(number: int, method: str, path: str) -> str:
        asked.append(number)
        return "cut" if method == "GET" and number <= 4 else ""

    body = _read_through(s3, monkeypatch, plan)
    assert body == BODY + BODY[1000:6000] and len(asked) >= 5
    fault.outcome("resumed by range, bytes equal")


@pytest.mark.world
def test_a_wrong_key_fails_at_once(s3: ObjectServer, fault: Record) -> None:
    fault(19, "a wrong secret key")
    wrong = {**s3.environment, "AWS_SECRET_ACCESS_KEY": "wrongsecretvalue"}
    text = tapir("train", "bpe", "tiny", "--data=s3://tapir-tests/raw", code=2, **wrong)
    assert "check AWS_ACCESS_KEY_ID" in text and "wrongsecretvalue" not in text
    fault.outcome("exit 2 with a hint, the secret in no log")


@pytest.mark.world
def test_tokens_that_may_not_be_read_are_not_made_anew(
    s3: ObjectServer, raw: Path, bpe: Path, dvae: Path, tokens: Path, fault: Record
) -> None:
    fault(30, "one 403 to `tokenize --again`")
    with s3.credentials():
        store, kept = S3Store("tapir-tests", "refused"), FolderStore(tokens)
        for name in kept.names():
            store.put(name, kept.get(name))
    shard = next(name for name in kept.names("train/") if name.endswith(".tar"))
    job = ["tokenize", str(raw), store.url, f"--bpe={bpe}", f"--dvae={dvae}", "--block=8"]
    changed: list[str] = []

    def plan(number: int, method: str, path: str) -> str:
        if method in ("PUT", "DELETE") and not path.endswith("request.json"):
            changed.append(path)
        return "403" if method == "GET" and path.endswith(shard) else ""

    with faulty_proxy(s3.endpoint, plan) as address:
        here = {**s3.environment, "AWS_ENDPOINT_URL": address}
        assert "access denied" in tapir(*job, "--again", code=2, **here)
    assert not changed
    fault.outcome("exit 2, nothing deleted")


def _copy(raw: Path, out: Path) -> FolderStore:
    store = FolderStore(out)
    for name in FolderStore(raw).names():
        store.put(name, FolderStore(raw).get(name))
    return store


def test_a_shard_cut_at_a_member_boundary(raw: Path, tmp_path: Path, fault: Record) -> None:
    fault(20, "a shard cut between two members")
    store = _copy(raw, tmp_path)
    source = RawSource(store, "train")
    name = f"train/{source.manifest.shards[-1].name}"
    with tarfile.open(fileobj=io.BytesIO(store.get(name))) as tar:
        boundary = tar.getmembers()[-6].offset
    store.put(name, store.get(name)[:boundary])
    with pytest.raises(CorruptError, match=source.manifest.shards[-1].name):
        [source.read(block) for block in range(len(source.sizes))]
    assert source.manifest.shards[-1].name in tapir("verify", str(tmp_path), code=1)
    store.delete("train/manifest.json")
    assert "train has shards and no manifest.json" in tapir("verify", str(tmp_path))
    fault.outcome("named, never a short epoch")


def _png(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 40, 40)).save(buffer, "PNG")
    return buffer.getvalue()


def test_invalid_pictures_are_rejected(tmp_path: Path, fault: Record) -> None:
    fault(21, "HTML as JPEG, half a JPEG, CMYK, 0 bytes")
    source = tmp_path / "in"
    source.mkdir()
    jpeg, cmyk = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (40, 40)).save(jpeg, "JPEG")
    Image.new("CMYK", (40, 40), (0, 255, 0, 0)).save(cmyk, "JPEG")
    files = {f"good{i}": jpeg.getvalue() for i in range(40)}
    files |= {"html": b"<html></html>", "half": jpeg.getvalue()[:300], "empty": b""}
    files["cmyk"] = cmyk.getvalue()
    for i, (name, data) in enumerate(files.items()):
        (source / f"{name}.jpg").write_bytes(data)
        (source / f"{name}.txt").write_text(f"picture number {i}")
    manifests = pack(str(source), FolderStore(tmp_path / "a"), PackConfig(max_rejects=0.1))
    assert sum(m.samples for m in manifests.values()) == 41
    assert manifests["train"].rejects == {"image": 3}
    assert decode_rgb(cmyk.getvalue(), "cmyk").shape == (40, 40, 3)
    with pytest.raises(InputError):
        pack(str(source), FolderStore(tmp_path / "b"), PackConfig(max_rejects=0.01))
    fault.outcome("counted and left out, CMYK converted; aborts above the limit")


@pytest.mark.world
def test_a_decompression_bomb_is_refused_before_it_is_decoded(
    tmp_path: Path, fault: Record
) -> None:
    fault(22, "a PNG of 9000 x 9000 in 250 kB")
    (tmp_path / "bomb.png").write_bytes(_png((9000, 9000)))
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from data_pipeline.images.decode import decode_rgb\n"
        "from core.errors import InputError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        "    decode_rgb(Path(sys.argv[1]).read_bytes(), 'bomb')\n"
        "except InputError as error:\n"
        "    print(error, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "bomb.png")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert "bomb" in done.stdout and int(done.stdout.split()[-1]) < 50, done.stdout
    fault.outcome(f"refused, {done.stdout.split()[-1]} MB more memory")


@pytest.mark.parametrize("kind", ["../x.png", "/x.png", "symlink", "x.pyd"])
def test_archives_with_members_outside_the_folder(tmp_path: Path, fault: Record, kind: str) -> None:
    fault(23, f"{kind} in a tar")
    marker = tmp_path / "x.png"
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        member = tarfile.TarInfo("a.png" if kind == "symlink" else kind)
        data = _png((30, 30))
        member.size = len(data)
        if kind == "symlink":
            member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/passwd", 0
        tar.addfile(member, io.BytesIO(data) if member.size else None)
        text = tarfile.TarInfo(member.name.rpartition(".")[0] + ".txt")
        text.size = 3
        tar.addfile(text, io.BytesIO(b"cat"))
    with pytest.raises(TapirError):
        pack(str(tmp_path / "bad.tar"), FolderStore(tmp_path / "out"), PackConfig())
    assert not marker.exists()
    fault.outcome("refused, nothing written outside")


def test_a_pipe_is_no_store(tmp_path: Path, fault: Record) -> None:
    fault(23, "a `pipe:` URL")
    marker = tmp_path / "marker"
    text = tapir("pack", f"pipe:touch {marker}", str(tmp_path / "out"), code=2)
    assert not marker.exists() and text
    fault.outcome("refused, marker absent")


def test_invalid_captions_are_rejected(fault: Record) -> None:
    fault(24, "captions: empty, 10 MB, invalid UTF-8, NUL")
    for wrong in (b"", b" \n\t", b"\xff\xfe"):
        with pytest.raises(InputError):
            clean_caption(wrong, "x")
    assert clean_caption(b"a\x00cat", "x") == "a cat"
    assert len(clean_caption(b"a" * 10_000_000, "x")) == LONGEST
    fault.outcome("refused and counted by pack; cut to 4,096 characters; NUL cleaned")


def test_an_epoch_goes_on_with_other_ranks(tokens: Path, fault: Record) -> None:
    fault(25, "an epoch goes on with another number of ranks")
    source = TokenSource(FolderStore(tokens), "train")
    order = OrderConfig(lanes=8)

    def ids(ranks: int, state: object, steps: int) -> tuple[list[int], object]:
        trained: list[list[int]] = []
        streams = []
        for rank in range(ranks):
            stream = Stream(source, seed=1, batch=16, order=order, rank=rank, ranks=ranks)
            if state is not None:
                stream.resume(state)  # type: ignore[arg-type]
            streams.append(iter(stream))
        for _ in range(steps):
            step: list[int] = []
            for one in streams:
                records, last = next(one)
                step += [record.id for record in records]
            trained.append(step)
        for one in streams:
            one.close()  # type: ignore[attr-defined]
        return [name for step in trained for name in step], last

    whole, _ = ids(1, None, 20)
    first, state = ids(4, None, 7)
    second, _ = ids(2, state, 13)
    assert first + second == whole and len(set(whole)) == len(whole)
    fault.outcome("the same records, none lost, none repeated")


@pytest.mark.world
def test_tokens_of_another_codebook(
    raw: Path, bpe: Path, tokens: Path, tmp_path: Path, fault: Record
) -> None:
    fault(26, "token shards of another dVAE in the same place")
    other = tmp_path / "dvae"
    short = ["--loop.steps=2", "--loop.global-batch-size=32", "--mesh.data=1"]
    tapir("train", "dvae", "tiny", f"--data={raw}", f"--out={other}", "--loop.seed=9", *short)
    flags = [f"--bpe={bpe}", f"--dvae={other}", "--block=8"]
    before = zlib.crc32(b"".join(path.read_bytes() for path in sorted(tokens.rglob("*.tar"))))
    tapir("tokenize", str(raw), str(tokens), *flags, code=2)
    after = zlib.crc32(b"".join(path.read_bytes() for path in sorted(tokens.rglob("*.tar"))))
    assert before == after
    fault.outcome("refused by its hash, exit 2, nothing changed")
