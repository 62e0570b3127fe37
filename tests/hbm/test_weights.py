"""Loading and mapping weights: safetensors and torch are the oracle, the loader helper dies, files are short."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.hbm.harness import WAIT_S, BackgroundLoad, Child, helper_pid, readable, wait_for_exit, wait_for_helper

from flexpert.hbm import (
    GRANULE_BYTES,
    BudgetError,
    BusyError,
    Copy,
    HbmClient,
    LoadError,
    LoadPlan,
    ManagerHandle,
    NotFoundError,
)
from flexpert.hbm.loading import BlockScale

Connect = Callable[..., HbmClient]
TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float8_e8m0fnu: "F8_E8M0"}
NUMEL = 2 * 1024 * 1024 + 170_017  # of float32: more than one chunk of the helper


def tensor_copies(file: Path, segment: str, dtypes: dict[str, str] | None = None) -> LoadPlan:
    """All tensors of a safetensors file into one segment, in the file's order, at multiples of 64 bytes."""
    copies, offset = [], 0
    entries = header_of(file)
    for name, entry in entries.items():
        numel = 1
        for extent in entry["shape"]:
            numel *= extent
        target = (dtypes or {}).get(name, entry["dtype"])
        copies.append(Copy(str(file), entry["begin"], numel, entry["dtype"], segment, offset, target))
        offset = -(-(offset + copies[-1].segment_bytes) // 64) * 64
    return LoadPlan({segment: offset}, copies, json.dumps(list(entries)).encode())


def header_of(file: Path) -> dict[str, Any]:
    """What a safetensors file says of each tensor, and the byte at which it begins."""
    raw = file.read_bytes()
    (header_bytes,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + header_bytes])
    return {
        name: {**entry, "begin": 8 + header_bytes + entry["data_offsets"][0]}
        for name, entry in header.items()
        if name != "__metadata__"
    }


def loaded(
    client: HbmClient, plan: LoadPlan, shapes: Mapping[str, Sequence[int]], key: str = "w"
) -> dict[str, torch.Tensor]:
    client.load_weights(key, plan)
    weights = client.map_weights(key)
    views = {}
    for name, copy in zip(json.loads(weights.manifest), plan.copies, strict=True):
        memory = weights.segments[copy.segment].memory()[copy.segment_offset : copy.segment_offset + copy.segment_bytes]
        dtype = TORCH.get(copy.dtype, torch.int64)
        views[name] = torch.frombuffer(bytearray(memory), dtype=dtype).reshape(shapes[name])
    return views


def special_values(dtype: torch.dtype, numel: int) -> torch.Tensor:
    """Random numbers over many magnitudes, and what rounds, overflows, or is no number."""
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(numel, generator=generator) * torch.exp2(torch.randint(-30, 30, (numel,), generator=generator))
    special = [
        0.0,
        -0.0,
        1.0,
        65504.0,
        65520.0,
        1e38,
        3.4e38,
        -1e-40,
        6e-8,
        2.9e-8,
        float("inf"),
        float("-inf"),
        float("nan"),
    ]
    ties = [1.00390625, 1.01171875, 1.0 + 2**-11, 1.0 + 3 * 2**-11]
    values[: len(special) + len(ties)] = torch.tensor(special + ties)
    return values.to(dtype)


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bit for bit, any NaN being equal to any other."""
    assert found.dtype == expected.dtype
    as_int = {8: torch.int64, 4: torch.int32, 2: torch.int16}[found.element_size()]
    return bool(((found.view(as_int) == expected.view(as_int)) | (found.isnan() & expected.isnan())).all())


@pytest.mark.parametrize("target", ["F32", "F16", "BF16"])
def test_every_float_is_converted_as_torch_does(connect: Connect, tmp_path: Path, target: str) -> None:
    file = tmp_path / "model.safetensors"
    numels = {"F64": 70_001, "F32": NUMEL, "F16": 65_535, "BF16": 70_001}
    save_file({source: special_values(dtype, numels[source]) for source, dtype in TORCH.items()}, file)
    expected = load_file(file)
    plan = tensor_copies(file, "dense", dict.fromkeys(TORCH, target))
    found = loaded(connect(), plan, {name: tensor.shape for name, tensor in expected.items()})
    for source, tensor in expected.items():
        assert same_bits(found[source], tensor.to(TORCH[target])), f"{source} to {target}"


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("target", ["F32", "F16", "BF16"])
def test_eight_bit_blocks_are_multiplied_as_torch_does(
    connect: Connect, tmp_path: Path, target: str, factors: torch.dtype
) -> None:
    """Every one of the 256 values of both dtypes, in blocks that divide neither rows nor columns."""
    rows, columns, block = 700, 1001, (96, 128)
    generator = torch.Generator().manual_seed(1)
    counts = (-(-rows // block[0]), -(-columns // block[1]))
    scale = torch.exp2(torch.randint(-9, 9, counts, generator=generator).float()).to(factors)
    bits = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
    bits[:2, :256] = torch.arange(256, dtype=torch.uint8)
    tensors = {
        "F8_E4M3": bits.view(torch.float8_e4m3fn),
        "F8_E5M2": bits[:8].clone().view(torch.float8_e5m2),
        "scale": scale,
    }
    file, other = tmp_path / "model.safetensors", tmp_path / "scales.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if name != "scale"}, file)
    save_file({"scale": scale}, other)
    begins = {name: entry["begin"] for place in (file, other) for name, entry in header_of(place).items()}
    copies = []
    shapes = {"F8_E4M3": (rows, columns), "F8_E5M2": (8, columns)}
    for name, shape in shapes.items():
        block_scale = BlockScale(str(other), begins["scale"], STORED[factors], columns, *block)
        copies.append(Copy(str(file), begins[name], shape[0] * shape[1], name, name, 0, target, block_scale))
    plan = LoadPlan({copy.segment: copy.segment_bytes for copy in copies}, copies, json.dumps(list(shapes)).encode())
    found = loaded(connect(), plan, shapes)
    wide = scale.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    for name, shape in shapes.items():
        assert same_bits(found[name], (tensors[name].float() * wide[: shape[0]]).to(TORCH[target])), name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"source_dtype": "I8"},
            "I8 with factors of F32 cannot be converted to F32; scaled conversions go from F8_E4M3",
        ),
        ({"num_elements": 15}, "15 elements are no whole rows of 10 columns"),
        ({"scale": BlockScale("f", 0, "I32", 10, 4, 4)}, "F8_E4M3 with factors of I32 cannot be converted"),
        ({"scale": BlockScale("f", 0, "F32", 10, 0, 4)}, "has sizes below 1"),
        ({"scale": None}, "F8_E4M3 cannot be converted to F32"),
    ],
)
def test_wrong_factors_are_refused_before_anything_is_taken(
    connect: Connect, change: dict[str, Any], said: str
) -> None:
    copy = Copy("f", 0, 20, "F8_E4M3", "s", 0, "F32", BlockScale("f", 0, "F32", 10, 4, 4))
    client = connect()
    with pytest.raises(LoadError, match=said):
        client.load_weights("w", LoadPlan({"s": 100}, [dataclasses.replace(copy, **change)]))
    assert client.weights_state("w") is None


def test_factors_that_the_file_does_not_hold_are_told(connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "matrix").write_bytes(bytes(100))
    (tmp_path / "factors").write_bytes(bytes(8))
    scale = BlockScale(str(tmp_path / "factors"), 0, "F32", 10, 4, 4)
    copy = Copy(str(tmp_path / "matrix"), 0, 100, "F8_E4M3", "s", 0, "F32", scale)
    with pytest.raises(LoadError, match="factors is truncated: found 8 bytes, expected at least 36"):
        connect().load_weights("w", LoadPlan({"s": 400}, [copy]))


def test_same_dtypes_and_integers_are_copied_as_they_are(connect: Connect, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    tensors = {"a": special_values(torch.bfloat16, 1000), "b": torch.arange(-500, 500), "c": torch.randn(7, 11, 13)}
    save_file(tensors, file)
    plan = tensor_copies(file, "dense")
    found = loaded(connect(), plan, {name: tensor.shape for name, tensor in tensors.items()})
    assert same_bits(found["a"], tensors["a"])
    assert torch.equal(found["b"], tensors["b"])
    assert torch.equal(found["c"], tensors["c"])


def plain_plan(file: Path, nbytes: int, *, segment_bytes: int | None = None) -> LoadPlan:
    return LoadPlan({"s": segment_bytes or nbytes}, [Copy(str(file), 0, nbytes, "U8", "s", 0, "U8")], b"manifest")


def test_progress_grows_to_the_total_and_what_is_loaded_is_not_loaded_again(connect: Connect, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(1 << 20))
    client = connect()
    seen: list[tuple[int, int]] = []
    client.load_weights("w", plain_plan(file, 1 << 20), on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (1 << 20, 1 << 20)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    content = file.read_bytes()
    file.unlink()
    client.load_weights("w", plain_plan(file, 1 << 20))
    assert client.map_weights("w").segments["s"].memory() == content
    state = client.weights_state("w")
    assert state is not None
    assert state.state == "ready"
    assert client.weights_state("other") is None


def test_bytes_that_no_copy_writes_are_zeros_also_in_reused_granules(connect: Connect, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"\xff" * 100)
    client = connect(1)
    used = client.open_kv_arena("kv", slots=1, slot_bytes=256 * GRANULE_BYTES, granules=256)
    used.map(0, 0, used.granules)
    used.memory()[:] = b"\x77" * (256 * GRANULE_BYTES)
    used.close()
    client.drop_kv_arena("kv")
    client.load_weights("w", plain_plan(file, 100, segment_bytes=200 * GRANULE_BYTES))
    memory = bytes(client.map_weights("w").segments["s"].memory())
    assert memory[:100] == b"\xff" * 100
    assert memory.count(0) == len(memory) - 100


def test_a_missing_file_is_named_and_the_load_can_be_repeated(connect: Connect, tmp_path: Path) -> None:
    client = connect()
    file = tmp_path / "gone.safetensors"
    with pytest.raises(LoadError, match=r"gone.safetensors: No such file.*at least 100 bytes"):
        client.load_weights("w", plain_plan(file, 100))
    state = client.weights_state("w")
    assert state is not None
    assert (state.state, "gone.safetensors" in state.reason) == ("failed", True)
    assert client.info().free_bytes == client.info().budget_bytes
    file.write_bytes(b"x" * 100)
    client.load_weights("w", plain_plan(file, 100))
    assert client.map_weights("w").segments["s"].memory() == b"x" * 100


def test_a_truncated_file_is_named_with_found_and_expected_bytes(connect: Connect, tmp_path: Path) -> None:
    file = tmp_path / "short.safetensors"
    file.write_bytes(b"x" * 99)
    with pytest.raises(LoadError, match=r"short.safetensors is truncated: found 99 bytes, expected at least 100"):
        connect().load_weights("w", plain_plan(file, 100))


def test_weights_beyond_the_budget_say_what_is_needed_and_free(connect: Connect, tmp_path: Path) -> None:
    plan = LoadPlan({"s": 257 * GRANULE_BYTES}, [])
    with pytest.raises(
        BudgetError, match=r"weights 'w': 16842752 bytes .* are needed, 16777216 are free.*Raise the memory budget"
    ):
        connect().load_weights("w", plan)


@pytest.mark.parametrize(
    ("copy", "message"),
    [
        (Copy("f", 0, 10, "F32", "s", 0, "I64"), "F32 cannot be converted to I64"),
        (Copy("f", 0, 10, "F32", "s", 64, "F32"), "ends at byte 104 of segment 's', which has 100"),
        (Copy("f", 0, 1, "F32", "t", 0, "F32"), "a segment that the plan does not have"),
        (Copy("f", 0, 1, "Q4", "s", 0, "F32"), "dtype 'Q4' is not known"),
        (Copy("f", -1, 1, "F32", "s", 0, "F32"), "negative"),
    ],
)
def test_a_wrong_plan_is_refused_before_anything_is_taken(connect: Connect, copy: Copy, message: str) -> None:
    client = connect()
    with pytest.raises(LoadError, match=message):
        client.load_weights("w", LoadPlan({"s": 100}, [copy]))
    assert client.weights_state("w") is None


def test_a_plan_that_writes_a_byte_twice_is_refused(connect: Connect) -> None:
    copies = [Copy("f", 0, 8, "U8", "s", 10, "U8"), Copy("f", 0, 8, "U8", "s", 3, "U8")]
    with pytest.raises(LoadError, match="written twice at byte 10"):
        connect().load_weights("w", LoadPlan({"s": 100}, copies))


@pytest.fixture
def slow_file(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint file on which the helper hangs as soon as it opens it: a FIFO without a writer."""
    path = tmp_path / "slow"
    os.mkfifo(path)
    yield path
    path.unlink()


def test_a_helper_killed_in_the_middle_fails_the_load_with_a_reason_and_it_can_be_repeated(
    connect: Connect, manager: ManagerHandle, slow_file: Path, tmp_path: Path
) -> None:
    client = connect()
    load = BackgroundLoad(client, plain_plan(slow_file, 1000))
    assert readable(load.progressed)
    with pytest.raises(BusyError, match="still being loaded"):
        client.map_weights("w")
    os.kill(helper_pid(manager), signal.SIGKILL)
    error = load.join()
    assert isinstance(error, LoadError)
    assert "killed by signal 9 (SIGKILL)" in str(error)
    assert "after 0 of 1000 bytes" in str(error)
    assert client.info().free_bytes == client.info().budget_bytes
    good = tmp_path / "good"
    good.write_bytes(b"y" * 1000)
    client.load_weights("w", plain_plan(good, 1000))
    assert client.map_weights("w").segments["s"].memory() == b"y" * 1000
    assert client.findings() == []


def test_a_second_caller_joins_the_running_load(connect: Connect, manager: ManagerHandle, slow_file: Path) -> None:
    first = BackgroundLoad(connect(), plain_plan(slow_file, 1000))
    assert readable(first.progressed)
    pid = helper_pid(manager)
    second = BackgroundLoad(connect(), plain_plan(slow_file, 1000))
    assert readable(second.progressed)
    assert helper_pid(manager) == pid
    os.kill(pid, signal.SIGKILL)
    errors = [first.join(), second.join()]
    assert all(isinstance(error, LoadError) for error in errors)


def test_a_load_goes_on_when_its_caller_dies(
    connect: Connect, manager: ManagerHandle, spawn: Callable[[], Child], slow_file: Path
) -> None:
    child = spawn()
    child.run(f"client = HbmClient.connect({str(manager.socket_path)!r}, client_name='c')")
    plan = f"LoadPlan({{'s': 10}}, [Copy({str(slow_file)!r}, 0, 10, 'U8', 's', 0, 'U8')])"
    child.start(f"import os; client.load_weights('w', {plan}, on_progress=lambda *_: os.kill(os.getpid(), 9))")
    child.process.wait(WAIT_S)
    client = connect()
    state = client.weights_state("w")
    assert state is not None
    assert state.state == "loading"
    pid = helper_pid(manager)
    client.drop_weights("w")
    wait_for_exit(pid)


def test_dropping_weights_that_are_being_loaded_ends_the_load(connect: Connect, slow_file: Path) -> None:
    load = BackgroundLoad(connect(), plain_plan(slow_file, 1000))
    assert readable(load.progressed)
    client = connect()
    client.drop_weights("w")
    assert "dropped while they were being loaded" in str(load.join())
    assert client.info().free_bytes == client.info().budget_bytes


def test_a_helper_waits_for_each_load_and_one_that_was_killed_is_done_without(
    connect: Connect, manager: ManagerHandle, tmp_path: Path
) -> None:
    good = tmp_path / "good"
    good.write_bytes(b"y" * 1000)
    client = connect()
    used = []
    for key in ("a", "b"):
        pid = wait_for_helper(manager, but=used)
        if key == "b":
            os.kill(pid, signal.SIGKILL)
            wait_for_exit(pid)
        client.load_weights(key, plain_plan(good, 1000))
        wait_for_exit(pid)
        used.append(pid)
        assert client.map_weights(key).segments["s"].memory() == b"y" * 1000
    assert client.findings() == []
    waiting = wait_for_helper(manager, but=used)
    os.kill(manager.pid, signal.SIGTERM)
    wait_for_exit(waiting)


def test_the_helper_ends_with_its_manager(manager: ManagerHandle, connect: Connect, slow_file: Path) -> None:
    load = BackgroundLoad(connect(), plain_plan(slow_file, 1000))
    assert readable(load.progressed)
    pid = helper_pid(manager)
    os.kill(manager.pid, signal.SIGKILL)
    wait_for_exit(pid)
    assert load.join() is not None


def load_pattern(client: HbmClient, tmp_path: Path, nbytes: int = 3 * GRANULE_BYTES) -> bytes:
    content = os.urandom(nbytes)
    (tmp_path / "pattern").write_bytes(content)
    client.load_weights("w", plain_plan(tmp_path / "pattern", nbytes))
    return content


def test_weights_outlive_the_client_that_loaded_them(
    connect: Connect, manager: ManagerHandle, spawn: Callable[[], Child], tmp_path: Path
) -> None:
    content = os.urandom(1000)
    (tmp_path / "pattern").write_bytes(content)
    child = spawn()
    child.run(f"client = HbmClient.connect({str(manager.socket_path)!r}, client_name='c')")
    child.run(
        f"client.load_weights('w', LoadPlan({{'s': 1000}}, [Copy({str(tmp_path / 'pattern')!r}, 0, 1000, 'U8', 's', 0, 'U8')]))"
    )
    child.run("weights = client.map_weights('w')")
    child.kill()
    assert connect().map_weights("w").segments["s"].memory() == content


def test_a_reader_cannot_write(
    connect: Connect, manager: ManagerHandle, spawn: Callable[[], Child], tmp_path: Path
) -> None:
    client = connect()
    content = load_pattern(client, tmp_path)
    child = spawn()
    child.run(f"client = HbmClient.connect({str(manager.socket_path)!r}, client_name='c')")
    child.run("segment = client.map_weights('w').segments['s']")
    assert child.run("result = segment.memory()[0]") == content[0]
    child.start("import ctypes; ctypes.memset(segment.address, 1, 1)")
    assert child.process.wait(WAIT_S) == -signal.SIGSEGV
    assert client.map_weights("w").segments["s"].memory() == content


def test_a_reader_has_no_private_copy(
    manager: ManagerHandle, connect: Connect, spawn: Callable[[], Child], tmp_path: Path
) -> None:
    load_pattern(connect(), tmp_path, 8 << 20)
    child = spawn()
    child.run(
        f"client = HbmClient.connect({str(manager.socket_path)!r}, client_name='c'); segment = client.map_weights('w').segments['s']"
    )
    child.run("import ctypes; result = sum(segment.memory()[::4096])")
    fields = {}
    inside = False
    address = child.run("result = segment.address")
    for line in Path(f"/proc/{child.pid}/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if "-" in name and not name.endswith(":"):
            inside = int(name.split("-")[0], 16) == address
        elif inside:
            fields[name.rstrip(":")] = rest.split()[0]
    assert int(fields["Rss"]) >= 8 << 10
    # Linux counts shared pages that only one process maps under Private_Dirty too; a copy would be anonymous memory.
    assert int(fields["Anonymous"]) == 0


def test_dropped_weights_stay_readable_and_their_memory_is_kept_until_the_reader_exits(
    connect: Connect, manager: ManagerHandle, spawn: Callable[[], Child], tmp_path: Path
) -> None:
    client = connect()
    content = load_pattern(client, tmp_path)
    child = spawn()
    child.run(
        f"client = HbmClient.connect({str(manager.socket_path)!r}, client_name='c'); segment = client.map_weights('w').segments['s']"
    )
    client.drop_weights("w")
    with pytest.raises(NotFoundError):
        client.map_weights("w")
    info = client.info()
    assert [(found.state, found.readers) for found in info.weights] == [("dropped", [child.pid])]
    assert info.free_bytes == info.budget_bytes - 3 * GRANULE_BYTES
    assert bytes.fromhex(child.run("result = bytes(segment.memory()).hex()")) == content
    child.run("import socket; client._sock.shutdown(socket.SHUT_RDWR)")
    assert client.info().free_bytes == info.free_bytes
    child.kill()
    # The manager learns of the exit by itself; a new arena that needs the memory shows that it did.
    kv = connect(1).open_kv_arena("kv", slots=1, slot_bytes=GRANULE_BYTES, granules=1)
    kv.close()
    assert client.findings() == []


def test_closing_a_mapping_frees_dropped_weights(connect: Connect, tmp_path: Path) -> None:
    client = connect()
    load_pattern(client, tmp_path)
    weights = client.map_weights("w")
    client.drop_weights("w")
    weights.close()
    assert client.info().free_bytes == client.info().budget_bytes
