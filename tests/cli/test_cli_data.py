"""``fastmae data`` end to end: what it prints, stores and returns; mistakes in one line; hostile tar members."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from loading import png, smooth
from PIL import Image

from fastmae.cli import data as data_module
from fastmae.cli import main
from fastmae.cli.data import decoder_warnings
from fastmae.data import errors, open_dataset
from fastmae.data.tar import read_shard_index


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def images(tmp_path) -> Path:
    """Twelve images, of which 3 does not decode and 7 is empty."""
    root = tmp_path / "images"
    for i in range(12):
        (root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (root / "ab"[i % 2] / f"{i:02}.png").write_bytes(png(i == 3, i) if i != 7 else b"")
    return root


def run(*arguments: object) -> int:
    return main(["data", *map(str, arguments)])


def mistake(capsys, *arguments: object) -> str:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("fastmae: error: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return error[error.index("fastmae: error: ") :]


def test_help_names_the_flags_without_importing_torch():
    flags = {
        "data": "shard index verify stats",
        "data shard": "PATH OUT --short-side --shuffle-seed",
        "data index": "PATH --channels",
        "data verify": "PATH --out --max-bad-fraction",
        "data stats": "PATH --sample --json",
    }
    code = f"""import sys; from fastmae.cli import main
for command in {list(flags)}:
    try:
        main([*command.split(), "--help"])
    except SystemExit as ended:
        print("ended", ended.code, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    *pages, rest = done.stdout.split("ended 0 False\n")
    assert rest == "", done.stderr
    for page, names in zip(pages, flags.values(), strict=True):
        assert not [name for name in names.split() if name not in page]


def test_verify_then_shard_then_train_on_what_is_left(images, tmp_path, capsys):
    assert run("verify", images, "--out", tmp_path / "bad.jsonl") == 1
    out = capsys.readouterr().out
    assert f"{images}/b/03.png: does not decode" in out
    assert "11 of 11 images decoded, 1 of them bad; 1 were known to be bad. Bad together: 16.667%" in out
    listed = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [Path(bad["path"]).name for bad in listed] == ["07.png", "03.png"]
    assert run("verify", images, "--max-bad-fraction", 0.2) == 0
    assert "10 of 10 images decoded, 0 of them bad; 2 were known" in capsys.readouterr().out
    error = mistake(capsys, "shard", images, tmp_path / "out")
    assert "2 of 12 images cannot be used" in error
    assert "--max-bad-fraction" in error
    assert "--data." not in error
    assert run("shard", images, tmp_path / "out", "--max-bad-fraction", 0.2, "--images-per-shard", 4) == 0
    assert "10 images in 3 shards" in capsys.readouterr().out
    assert len((tmp_path / "out/bad_files.jsonl").read_text().splitlines()) == 2
    assert run("verify", tmp_path / "out") == 0
    assert len(open_dataset(tmp_path / "out")) == 10


def test_shard_resizes_and_resumes(images, tmp_path, capsys, monkeypatch):
    arguments = "shard", images, tmp_path / "out", "--short-side", 20, "--max-bad-fraction", 1
    assert run(*arguments) == 0
    assert "10 re-encoded, 0 with their bytes as they were" in capsys.readouterr().out
    dataset = open_dataset(tmp_path / "out")
    assert {dataset.shape(i) for i in range(10)} == {(20, 25)}
    assert run(*arguments) == 0
    assert "other options: short_side 20 there, 30 here" in mistake(capsys, *arguments, "--short-side", 30)
    monkeypatch.setattr(data_module, "write_shards", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    assert run("shard", images, tmp_path / "other", "--max-bad-fraction", 1) == 130
    assert "the same command resumes from there" in capsys.readouterr().out


def test_shard_in_parts(images, tmp_path, capsys):
    arguments = "shard", images, tmp_path / "out", "--images-per-shard", 4, "--max-bad-fraction", 1
    assert run(*arguments, "--part", "2/2") == 0
    assert "Part 2/2 is complete; 2 shards of other parts are still missing" in capsys.readouterr().out
    assert run(*arguments, "--part", "1/2") == 0
    assert "11 images in 3 shards" in capsys.readouterr().out
    for part in ("0/2", "3/2", "1", "a/b", "1/0"):
        error = mistake(capsys, *arguments, "--part", part)
        assert f"--part: expected i/n with 1 <= i <= n, such as 2/4, got {part}" in error


def test_index_beside_shards_and_of_a_folder(images, tmp_path, capsys):
    run("shard", images, tmp_path / "out", "--max-bad-fraction", 1, "--images-per-shard", 4)
    shards = sorted((tmp_path / "out").glob("*.tar"))
    for path in shards[1:]:
        path.with_name(path.name + ".index.npz").unlink()
    capsys.readouterr()
    assert run("index", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "2 indexes written beside 3 shards, 1 were there" in out
    assert all(read_shard_index(path) is not None for path in shards)
    assert f"Hash:  {open_dataset(tmp_path / 'out').hash}" in out
    assert run("index", images) == 0
    out = capsys.readouterr().out
    assert "12 images, 1 of them unusable, 2 named classes" in out
    assert f"Index: {images.parent}/.fastmae/{images.name}/" in out


def test_an_index_elsewhere_is_built_refreshed_and_marked(images, tmp_path, capsys):
    home = tmp_path / "index"
    assert run("index", images, "--index", home, "--workers", 2) == 0
    assert f"Index: {home}/index-" in capsys.readouterr().out
    assert not (images.parent / ".fastmae").exists()
    (images / "a" / "new.png").write_bytes(png(False))
    assert run("verify", images, "--index", home, "--max-bad-fraction", 1) == 0
    assert f"Remembered in {home}" in capsys.readouterr().out
    assert len(open_dataset(images, index=home, max_bad_fraction=1).bad) == 2
    assert run("index", images, "--index", home) == 0
    assert "13 images" in capsys.readouterr().out
    assert len(open_dataset(images, index=home, max_bad_fraction=1)) == 13
    (tmp_path / "file").touch()
    assert "--index" in (error := mistake(capsys, "index", images, "--index", tmp_path / "file"))
    assert "cannot be written" in error
    assert "--num-workers: expected at least 1" in mistake(capsys, "index", images, "--workers", 0)


def test_stats_for_people_and_as_json(images, capsys):
    assert run("stats", images) == 0
    printed = capsys.readouterr().out
    assert "images: 10 images" in printed
    assert "empty file" in printed
    assert run("stats", images, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["images"], values["sampled"], values["formats"]) == (10, 10, {"PNG": 11})
    assert sum(values["bad"].values()) == 2
    assert values["hash"] == open_dataset(images, max_bad_fraction=1.0).hash
    assert values["pretrain_flags"] in printed
    words = values["pretrain_flags"].split()
    assert (words[0], words[4]) == ("--model.mean", "--model.std")
    assert [float(word) for word in words[1:4]] == [round(value, 3) for value in values["mean"]]


def test_progress_in_a_log_is_lines(images, capsys, monkeypatch):
    monkeypatch.setattr(data_module, "_SECONDS_BETWEEN_LINES", 0.0)
    assert run("stats", images, "--sample", 5, "--max-pixels", 5000) == 0
    captured = capsys.readouterr()
    assert [f"Decoding a sample: {i} of 5" in captured.err for i in range(1, 6)] == [True] * 5
    assert captured.out.splitlines()[-1].endswith(" --data.max-pixels 5000")


def test_jpegs_that_decode_with_a_warning(tmp_path, capfd):
    """Cut out of the middle: header, end and every decoder are content, and half of the image is grey."""
    root = tmp_path / "images"
    root.mkdir()
    for i in range(20):
        Image.fromarray(smooth(160, 200, i)).save(root / f"{i:02}.jpg")
    whole = (root / "17.jpg").read_bytes()
    (root / "17.jpg").write_bytes(whole[: len(whole) // 2] + whole[-2:])
    assert run("verify", root, "--out", tmp_path / "bad.jsonl", "--num-workers", 2) == 0
    captured = capfd.readouterr()
    assert f"{root}/17.jpg: Corrupt JPEG data: premature end of data segment" in captured.out
    assert "Corrupt JPEG data" not in captured.err
    (damaged,) = map(json.loads, (tmp_path / "bad.jsonl").read_text().splitlines())
    assert (damaged["path"], damaged["bad"]) == (f"{root}/17.jpg", False)
    assert run("stats", root) == 0
    captured = capfd.readouterr()
    assert "Decoders warned 1 times of damage; fastmae data verify names the files" in captured.err
    assert "Corrupt JPEG data" not in captured.err
    assert open_dataset(root).bad == []
    assert run("verify", root, "--strict") == 1
    assert [Path(bad.path).name for bad in open_dataset(root, max_bad_fraction=1.0).bad] == ["17.jpg"]


def test_decoder_warnings_give_stderr_back(capfd):
    with decoder_warnings() as take:
        os.write(2, b"from a library\n")
        print("from Python", file=sys.stderr)
        assert take() == ["from a library"]
        assert take() == []
    os.write(2, b"afterwards\n")
    with suppress(KeyError), decoder_warnings():
        os.write(2, b"before the end\n")
        raise KeyError
    assert capfd.readouterr().err == "from Python\nafterwards\nbefore the end\n"


HOSTILE = ["/etc/cron.d/evil.jpg", "../../escape.jpg", "a/../../b.jpg", "new\nline.jpg"]
HOSTILE += ["\x1b]0;title\x07\x1b[31mred.jpg", ":skull:[bold].jpg", "~/home.jpg", "-rf.jpg", "con\udcffd.jpg"]
HOSTILE += ["x" * 5000 + ".jpg", "C:\\windows.jpg"]
DAMAGED = (0, 2, 4, 5)


def write_hostile(path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for i, name in enumerate(HOSTILE):
            info, data = tarfile.TarInfo(name), png(damaged=i in DAMAGED, seed=i)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
            name = f"special{kind.decode()}.jpg"
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    return path


def test_hostile_members_are_not_written_and_shown_escaped(tmp_path, capsys, monkeypatch):
    (tmp_path / "deep/er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep/er")
    tar = write_hostile(Path("hostile.tar").absolute())

    def files() -> set[Path]:
        return {path for path in tmp_path.rglob("*") if tmp_path / "home" not in [path, *path.parents]}

    before, printed = files(), {}
    commands = {"verify": ["--out", "bad.jsonl"], "stats": [], "index": []}
    commands["shard"] = ["out", "--max-bad-fraction", "1", "--reencode"]
    for command, arguments in commands.items():
        assert run(command, tar, *arguments) in (0, 1)
        printed[command] = "".join(capsys.readouterr())
    assert main(["pretrain", "--recipe", "photographs", "--data.path", str(tar), "--out", "run"]) == 2
    printed["pretrain"] = "".join(capsys.readouterr())
    assert not any(code in text for text in printed.values() for code in ("\x07", "\x1b]0", "\x1b[31m"))
    for path in files() - before:
        written = ("out", "run", "bad.jsonl", "hostile.tar.index.npz", ".fastmae")
        assert path.relative_to(tmp_path / "deep/er").parts[0] in written
        assert not any(word in path.name for word in ("evil", "escape", "red", "line"))
    assert not Path("/etc/cron.d/evil.jpg").exists()
    for name in ("/etc/cron.d/evil.jpg", "\\x1b]0;title\\x07\\x1b[31mred.jpg", ":skull:[bold].jpg"):
        assert f"{name}: does not decode" in printed["verify"]
    names = [json.loads(line)["path"].partition("::")[2] for line in Path("bad.jsonl").read_text().splitlines()]
    assert names == [HOSTILE[i] for i in DAMAGED]
    with tarfile.open("out/shard-000000.tar") as packed:
        assert all("/" not in name and name[0].isdigit() for name in packed.getnames())
        assert len(packed.getnames()) == len(HOSTILE) - len(DAMAGED)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_verification_keeps_what_it_found(images, tmp_path, capsys, monkeypatch, how):
    real = data_module.verify_images

    def interrupted(*arguments, **options):
        for verdict in real(*arguments, start=options["start"], num_threads=1):
            yield verdict
            if verdict.reason is not None:
                os.kill(os.getpid(), how)

    monkeypatch.setattr(data_module, "verify_images", interrupted)
    assert threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    assert run("verify", images, "--out", tmp_path / "bad.jsonl") == 130
    assert signal.getsignal(signal.SIGTERM) is before
    out = capsys.readouterr().out
    assert "8 of 11 images decoded, 1 of them bad" in out
    assert "Interrupted before the end; continue with --start 8" in out
    assert open_dataset(images, max_bad_fraction=1.0).bad_ids.tolist() == [7, 9]
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 2
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert run("verify", images, "--start", 8) == 1
    assert "3 of 3 images decoded, 0 of them bad; 2 were known to be bad" in capsys.readouterr().out


def test_mistakes(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(errors, "PAUSES", ())
    missing = tmp_path / "missing"
    for command in (["shard", missing, tmp_path / "out"], ["index", missing], ["verify", missing], ["stats", missing]):
        assert f"{missing}: no such folder or file" in mistake(capsys, *command)
    assert not (tmp_path / "out").exists()
    assert "OUT: expected a folder outside of" in mistake(capsys, "shard", images, images / "out")
    assert "quality: expected 1 to 100, got 0" in mistake(capsys, "shard", images, tmp_path / "out", "--quality", 0)
    assert "--sample: expected at least 0, got -1" in mistake(capsys, "stats", images, "--sample", -1)
    assert "--num-workers: expected at least 1, got 0" in mistake(capsys, "verify", images, "--num-workers", 0)
    assert "--start: expected a number from 0 to 11, got 12" in mistake(capsys, "verify", images, "--start", 12)
    assert "channels: expected at least 1, got 0" in mistake(capsys, "stats", images, "--channels", 0)
    assert "no-folder" in mistake(capsys, "verify", images, "--out", tmp_path / "no-folder" / "bad.jsonl")
    (tmp_path / "no.tar").write_bytes(b"not a tar" * 100)
    assert "no.tar: expected a whole, plain tar file" in mistake(capsys, "index", tmp_path / "no.tar")
