"""Writes exported files (ONNX, torch.export, OpenVINO), compares them with the detector, and runs them."""
