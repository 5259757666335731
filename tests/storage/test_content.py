"""The header of a safetensors file, as the library writes it; anything else is refused and never taken for one."""

from __future__ import annotations

import io
import json

import pytest
import safetensors.numpy
from numpy import float16, ones

from lib_lora_train.storage.content import LONGEST_HEADER, header_of


def test_the_header_is_what_the_library_wrote_and_the_tensors_come_next():
    data = safetensors.numpy.save({"a": ones((2, 3), float16)}, {"ss_steps": "7"})
    file = io.BytesIO(data)
    assert header_of(file) == {"__metadata__": {"ss_steps": "7"}, "a": {
        "dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}}
    assert file.read() == ones((2, 3), float16).tobytes()


def with_length(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


@pytest.mark.parametrize("data", [
    b"", b"\x80\x02}q", with_length(b"[1]"), with_length(b"{"), with_length(b"{}", 1), with_length(b'{"a": 1}', 5),
    with_length(b"{" + b" " * 20, LONGEST_HEADER + 1), with_length(b'{"a": ' + b"[" * 100_000),
    with_length(json.dumps({"a": "é"}, ensure_ascii=False).encode("latin-1"))])
def test_what_is_no_header_is_refused(data: bytes):
    with pytest.raises(ValueError):
        header_of(io.BytesIO(data))
