"""What is read back from an Arrow file."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.data.store import COLUMNS, _numpy


@pytest.mark.parametrize("kind", sorted({np.dtype(t) for t in COLUMNS.values()} | {np.dtype(np.float32)}, key=str))
@given(numbers=st.lists(st.integers(0, 1), max_size=40), start=st.integers(0, 40))
def test_numbers_as_pyarrow_reads_them(kind, numbers, start):
    array = pa.array(np.array(numbers, kind))[start:]
    found = _numpy(array)
    assert found.dtype == kind
    assert found.tolist() == array.to_numpy(zero_copy_only=False).tolist() == numbers[start:]
