import dataclasses
import math
import subprocess
import sys

import pytest

from llamakit.errors import UsageError
from llamakit.inference.config import GenerateConfig


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("n_predict", -3, "-n"),
        ("temperature", math.nan, "-t"),
        ("top_p", 1.5, "--top-p"),
        ("min_p", -0.1, "--min-p"),
        ("repeat_penalty", 0.0, "--repeat-penalty"),
        ("repeat_penalty", math.inf, "--repeat-penalty"),
        ("repeat_last_n", -1, "--repeat-last-n"),
        ("seed", -2, "--seed"),
        ("seed", 2**32, "--seed"),
        ("ctx", -1, "--ctx"),
    ],
)
def test_values_that_cannot_be_name_their_flag(field, value, flag):
    with pytest.raises(UsageError, match=f"^{flag} is "):
        GenerateConfig(**{field: value})


def test_it_is_frozen_and_needs_no_torch():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GenerateConfig().seed = 1  # pyright: ignore[reportAttributeAccessIssue]
    code = "import sys, llamakit.inference.config; sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
