"""What the tests of exported files need."""
from importlib.util import find_spec

import pytest

missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
needed = pytest.mark.skipif(bool(missing), reason=f"needs the extra export: {', '.join(missing)}")
