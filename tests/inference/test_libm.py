import hashlib

import numpy as np
import pytest

from llamakit.inference import libm

# Every 4099th float32 from 2**-149 to the largest, and what glibc 2.36 on x86-64 makes of all of them.
POSITIVE = np.arange(1, 0x7F800000, 4099, dtype=np.int32).view(np.float32)


@pytest.mark.parametrize(
    ("function", "values", "digest"),
    [
        (libm.expf, np.linspace(-110, 89, 500_001, dtype=np.float32), "43f364a9fef13027"),
        (libm.logf, POSITIVE, "e8440786f7c5a87a"),
        (libm.log2f, POSITIVE, "5a51517d9a6ea760"),
    ],
)
def test_functions_are_glibcs_to_the_last_bit(function, values, digest):
    assert hashlib.sha256(function(values).astype("<f4").tobytes()).hexdigest()[:16] == digest


def test_powers_are_glibcs_to_the_last_bit():
    pairs = zip(np.linspace(0.001, 60, 4001).tolist(), np.linspace(-9, 9, 4001).tolist(), strict=True)
    powers = np.array([libm.powf(x, y) for x, y in pairs], dtype="<f4")
    assert hashlib.sha256(powers.tobytes()).hexdigest()[:16] == "5bcf2144333985c1"


def test_the_ends_of_the_range():
    special = np.float32([0, np.inf, 1])
    assert libm.logf(special).tolist() == libm.log2f(special).tolist() == [-np.inf, np.inf, 0]
    assert np.isnan(libm.logf(np.float32([-1]))[0])
    assert libm.expf(np.float32([-np.inf, -200, 0, 200])).tolist() == [0, 0, 1, np.inf]
    assert [float(libm.powf(x, y)) for x, y in ((0, 2), (5, 0), (2, 200), (2, -200), (0, -1))] == [
        0,
        1,
        np.inf,
        0,
        np.inf,
    ]
