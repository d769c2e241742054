"""What only newer releases of torch have: the tests of what needs it are skipped by the condition that refuses it."""

import pytest

from graphreg.torch_internals import TELLS_RESULT

needs_result = pytest.mark.skipif(not TELLS_RESULT, reason="torch before 2.12 does not show what a compiled call returns")
