"""Sizes as people write them, and read them."""

import pytest

from hf_esm import HfEsmError
from hf_esm.utils.sizes import bytes_of, readable


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("16GB", 16 * 10**9),
        ("16 gb", 16 * 10**9),
        ("1.5MiB", 3 * 2**19),
        ("4g", 4 * 10**9),
        ("1TB", 10**12),
        ("1e9", 10**9),
        ("300", 300),
        (4.0e9, 4 * 10**9),
        (7, 7),
    ],
)
def test_sizes_are_read(size, expected):
    assert bytes_of(size, "max_memory") == expected


@pytest.mark.parametrize(
    "size", ["", "GB", "0", "-1GB", "0.5", "1.2.3GB", "4 parsecs", "infGB", "nan", 0, -1, True, None, [1]]
)
def test_what_is_no_size_is_refused(size):
    with pytest.raises(HfEsmError, match="`max_memory` must be a size such as '16GB', '512MiB' or a number of bytes"):
        bytes_of(size, "max_memory")


@pytest.mark.parametrize(
    ("count", "expected"), [(1, "1 B"), (1_310_001, "1.32 MB"), (2_500, "2.5 kB"), (10**12, "1 TB")]
)
def test_what_is_said_is_enough(count, expected):
    assert readable(count) == expected
    assert bytes_of(readable(count), "max_memory") >= count
