from __future__ import annotations

import pytest
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry


@pytest.fixture(autouse=True)
def process_wide_default():
    """No test here, so nothing that it calls, may move what all other networks of the process use."""
    before = _AttentionBackendRegistry._active_backend
    yield
    assert _AttentionBackendRegistry._active_backend == before == AttentionBackendName.NATIVE


@pytest.fixture
def counted(monkeypatch):
    """How often diffusers' kernels are called, by name, with masks and without."""
    calls: dict[str, list[bool]] = {}
    for name, kernel in list(_AttentionBackendRegistry._backends.items()):

        def run(*, kernel=kernel, name=name, **arguments):
            calls.setdefault(name.value, []).append(arguments.get("attn_mask") is not None)
            return kernel(**arguments)

        monkeypatch.setitem(_AttentionBackendRegistry._backends, name, run)
    return calls
