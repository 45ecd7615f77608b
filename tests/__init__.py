"""The tests; helpers that assert say what they compared, as the tests themselves do."""

import pytest

pytest.register_assert_rewrite("tests.place")
