"""The tests. Those that one module holds and another one collects explain their asserts all the same."""

import pytest

pytest.register_assert_rewrite("tests.kernel_contract")
