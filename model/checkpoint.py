"""A directory of safetensors files, memory-mapped, and the check that it is the model of its config.json."""

import json
from collections import Counter
from collections.abc import Iterator, KeysView
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.checkpoint_keys import INTEGER_CLASS, Expected, expected_keys
from model.config import ModelConfig
from model.errors import CheckpointError
from model.weight_formats import WeightFormats, detect_formats, has_mtp

INDEX_NAME = "model.safetensors.index.json"
LISTED_PROBLEMS = 8


class Checkpoint:
    """The tensors of a directory: those that model.safetensors.index.json names, else those of all *.safetensors files.

    Opening reads the headers only. `tensor` returns memory-mapped tensors: bytes are read when they are used.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"{directory} is not a directory; expected one with config.json and *.safetensors")
        index = _read_index(self.directory / INDEX_NAME)
        self._files = {name: _open(self.directory / name) for name in _shard_names(self.directory, index)}
        self._place: dict[str, str] = {}  # key -> file name
        self._headers: dict[str, tuple[str, tuple[int, ...]]] = {}  # key -> (dtype, shape)
        for name, file in self._files.items():
            for key in file.keys():
                if key in self._place:
                    raise CheckpointError(
                        f"{self.directory}: {key} is in both {self._place[key]} and {name}; remove one of the files"
                    )
                entry = file.get_slice(key)
                self._place[key] = name
                self._headers[key] = (entry.get_dtype(), tuple(entry.get_shape()))
        for key, name in (index or {}).items():
            if self._place.get(key) != name:
                raise CheckpointError(f"{self.directory / name} lacks {key}, which {INDEX_NAME} says is there")

    def keys(self) -> KeysView[str]:
        return self._place.keys()

    def __contains__(self, key: str | None) -> bool:
        return key in self._place

    def __len__(self) -> int:
        return len(self._place)

    def dtype(self, key: str) -> str:
        """Storage type by safetensors' name: BF16, F32, F8_E4M3, F8_E8M0, I8, U8, I32, I64."""
        return self._headers[self._require(key)][0]

    def shape(self, key: str) -> tuple[int, ...]:
        return self._headers[self._require(key)][1]

    def file(self, key: str) -> Path:
        return self.directory / self._place[self._require(key)]

    def tensor(self, key: str) -> Tensor:
        """The tensor as stored, memory-mapped; UE8M0 scales and packed E2M1 pairs (I8) come as uint8."""
        try:
            value = self._files[self._place[self._require(key)]].get_tensor(key)
        except SafetensorError as error:
            raise CheckpointError(f"{self.file(key)}: {key} cannot be read: {error}") from None
        return value.view(torch.uint8) if value.dtype in (torch.int8, torch.float8_e8m0fnu) else value

    def _require(self, key: str) -> str:
        if key not in self._place:
            raise CheckpointError(f"{self.directory}: {key} is missing")
        return key


def validate(checkpoint: Checkpoint, config: ModelConfig) -> WeightFormats:
    """Compare all tensors with what the config asks for; return the formats, or raise one error that lists them.

    MTP blocks are all or nothing: a checkpoint without any mtp.* tensor fits too (`config.without_mtp()` describes it).
    """
    formats = detect_formats(checkpoint, config)
    if not has_mtp(checkpoint):
        config = config.without_mtp()
    expected = expected_keys(config, formats)
    problems = list(_differences(checkpoint, expected, ignore_mtp=config.has_dspark_drafter))
    if not problems:
        problems = list(_bad_tables(checkpoint, expected, config.n_routed_experts))
    if problems:
        listed = "; ".join(problems[:LISTED_PROBLEMS])
        more = f"; and {len(problems) - LISTED_PROBLEMS} more" if len(problems) > LISTED_PROBLEMS else ""
        count = f"{len(problems)} tensor" + ("s differ" if len(problems) > 1 else " differs")
        raise CheckpointError(f"{checkpoint.directory}: {count} from what config.json asks for: {listed}{more}")
    return formats


def _differences(checkpoint: Checkpoint, expected: dict[str, Expected], ignore_mtp: bool) -> Iterator[str]:
    yield from (f"{key} is missing" for key in expected if key not in checkpoint)
    for key in checkpoint.keys():
        if key not in expected:
            if not (ignore_mtp and key.startswith("mtp.")):
                yield f"{key} is not used"
            continue
        shape, dtype = checkpoint.shape(key), checkpoint.dtype(key)
        same_shape = shape == expected[key].shape or (expected[key].shape == () and shape == (1,))
        if not same_shape or dtype not in expected[key].dtypes:
            wanted = f"{_text(expected[key].shape)} {' or '.join(expected[key].dtypes)}"
            yield f"{key} must be {wanted}, is {_text(shape)} {dtype}"


def _bad_tables(checkpoint: Checkpoint, expected: dict[str, Expected], experts: int) -> Iterator[str]:
    """Hash tables that name experts which do not exist."""
    for key in (key for key, tensor in expected.items() if tensor.dtypes == INTEGER_CLASS):
        low, high = (int(bound) for bound in checkpoint.tensor(key).aminmax())
        if low < 0 or high >= experts:
            yield f"{key} must hold expert ids 0..{experts - 1}, holds {low}..{high}"


def _text(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"


def _read_index(path: Path) -> dict[str, str] | None:
    """key -> file name, or None without an index file."""
    if not path.exists():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map")
    for key, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{path}: {key} must be in a file of the same directory, got {name!r}")
    return weight_map


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} appears twice")
    return dict(pairs)


def _shard_names(directory: Path, index: dict[str, str] | None) -> list[str]:
    if index is None:
        names = sorted(path.name for path in directory.glob("*.safetensors"))
        if not names:
            raise CheckpointError(f"{directory} holds no *.safetensors file")
        return names
    names = sorted(set(index.values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{directory / missing[0]}{more} missing; {INDEX_NAME} names {len(names)} files")
    return names


def _open(path: Path):
    """Open one file and check that it is whole: safetensors compares the header with the file size."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
        if start == b"version ":
            raise CheckpointError(f"{path} is a git-lfs pointer; fetch the file itself (git lfs pull)")
        if size < 8 or int.from_bytes(start, "little") > size - 8:
            raise CheckpointError(f"{path} is truncated or no safetensors file ({size} bytes); copy it again")
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({error}); copy it again") from None
