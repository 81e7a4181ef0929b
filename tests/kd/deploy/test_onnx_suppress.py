"""ONNX's suppression of overlaps is that of PyTorch."""
import onnx_rules
import pytest
import torch
from torch import nn

from models.deploy import suppress

pytestmark = onnx_rules.needed


class Suppress(nn.Module):
    """Nothing but the operator."""

    def __init__(self, *settings):
        super().__init__()
        self.settings = settings

    def forward(self, boxes, scores, labels):
        from kd.deploy.onnx_graph import one_operator

        return one_operator(boxes, scores, labels, *self.settings)


@pytest.mark.parametrize("classes, threshold", [(1, 0.5), (3, 0), (3, 1), (3, 0.0), (80, 1.0), (3, 0.3)])
def test_it_keeps_the_same(tmp_path, classes, threshold):
    """For one class, too, and where the threshold is a whole number."""
    import onnxruntime

    from kd.deploy.onnx_graph import suppress_in_onnx
    generator = torch.Generator().manual_seed(0)
    low = 40 * torch.rand(2, 50, 2, generator=generator)
    boxes = torch.cat([low, low + 5 + 20 * torch.rand(2, 50, 2, generator=generator)], dim=-1)
    scores = torch.rand(2, 50, generator=generator) * (torch.arange(50) % 5 > 0)
    labels = torch.randint(0, classes, (2, 50), generator=generator)
    model = Suppress(classes, threshold, 50).eval()
    torch.onnx.export(model, (boxes, scores, labels), tmp_path / "a.onnx", dynamo=True,
                      input_names=["boxes", "scores", "labels"], opset_version=18, verbose=False,
                      custom_translation_table={torch.ops.densekd.suppress.default: suppress_in_onnx})
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    found, = session.run(None, {"boxes": boxes.numpy(), "scores": scores.numpy(), "labels": labels.numpy()})
    expected = suppress(boxes, scores, labels, classes, threshold, 50)
    assert torch.equal(torch.from_numpy(found), expected)
    assert (expected > 0).sum() > 2 and ((expected == 0) & (scores > 0)).any() == (threshold < 1)
